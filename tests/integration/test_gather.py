"""Several processes rank together as one process would rank the rows of all."""

import itertools
import math
import os
import time
from unittest import mock

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip('mmdet', reason='RaMBOLoss is registered in mmdet')
from mmengine.logging import MessageHub

from rambo_det import RaMBOLoss, RaMBORetrievalLoss
from rambo_det.functional import (
    Ranking,
    apply_margin,
    detection_ap_loss,
    with_margin,
)
from rambo_det.losses import gather
from tests.helpers.processes import run

CLASSES = 3
IMAGES = 2  # in each process
# Rows of each process in each step: uneven, more than ever before, and none.
ROWS = [(6, 9, 4, 7), (8, 0, 12, 3), (0, 5, 5, 0), (0, 0, 0, 0), (7, 14, 2, 16)]
WITHOUT_POSITIVES = {(0, 0), (4, 1), (4, 3)}  # (step, process)


def batch(step, rank):
    """Features, labels, weights and images of the rows of a process."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    rows = ROWS[step][rank]
    features = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES + 1, (rows,), generator=generator)
    if (step, rank) in WITHOUT_POSITIVES:
        labels.fill_(CLASSES)
    weight = (torch.rand(rows, generator=generator) < 0.8).double()
    images = torch.randint(0, IMAGES, (rows,), generator=generator).sort().values
    return features, labels, weight, images


def union(step, world):
    """The rows of all processes, one process after the other."""
    parts = [batch(step, rank) for rank in range(world)]
    features, labels, weight, images = (torch.cat(column) for column in zip(*parts))
    rank = torch.arange(world).repeat_interleave(torch.tensor(ROWS[step][:world]))
    return features, labels, weight, images + IMAGES * rank


def classifier(columns=CLASSES):
    torch.manual_seed(0)
    return torch.nn.Linear(6, columns).double()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def term(span):
    return dict(weight=0.7, span=span)


CASES = {
    f'{"-".join(spans)}, {perturb}, lambd {lambd}, margin {margin}': dict(
        class_ap=term(spans[0]),
        pooled_ap=term(spans[1]),
        perturb=perturb,
        lambd=lambd,
        margin=margin,
        margin_noise=False,
        memory=2,
    )
    for spans, (perturb, lambd), margin in itertools.product(
        [('batch', 'image'), ('memory', 'batch'), ('image', 'row'), ('image', 'batch')],
        [('together', 2.0), ('singly', 0.5), ('singly', math.inf)],
        [0.0, 0.3],
    )
}
CASES['overlaps'] = dict(
    CASES['memory-batch, singly, lambd inf, margin 0.3'], overlaps=(0.3, 0.5, 0.7)
)
CASES['auxiliary'] = dict(
    scores='log_softmax',
    use_sigmoid=False,
    auxiliary=dict(type='CrossEntropyLoss'),
    lambd=2.0,
    margin=0.0,
    memory=1,
)


def steps_of(rank, world, settings, wrap):
    """Losses and gradients of some steps; ``rank`` None takes the rows of all."""
    loss_cls = RaMBOLoss(**settings)
    columns = loss_cls.get_cls_channels(CLASSES)
    model = wrap(classifier(columns))
    losses, gradients = [], []
    for step in range(len(ROWS)):
        rows = union(step, world) if rank is None else batch(step, rank)
        features, labels, weight, images = rows
        model.zero_grad()
        count = IMAGES if rank is not None else IMAGES * world
        loss = loss_cls(
            model(features),
            labels,
            weight,
            avg_factor=4.0,
            images=(images, count),
            overlaps=features[:, 0].sigmoid(),
        )
        loss.backward()
        losses.append(loss.detach())
        gradients.append(gradient(model))
    return dict(
        losses=torch.stack(losses),
        gradients=torch.stack(gradients),
        memory=loss_cls.get_extra_state(),
    )


def retrieval(rank, world, wrap):
    """As steps_of, of two steps of retrieval; rows have as many classes as a loss."""
    loss = RaMBORetrievalLoss(memory=1, margin_noise=True, margin=0.3)
    model, found = wrap(classifier()), []
    for step in (0, 4):
        features, labels, *_ = union(step, world) if rank is None else batch(step, rank)
        model.zero_grad()
        torch.manual_seed(7 if rank in (None, 0) else rank)  # the first one's counts
        value = loss(model(features), labels)
        value.backward()
        found.append((value.detach(), gradient(model)))
    return dict(zip(('losses', 'gradients'), map(torch.stack, zip(*found))))


def all_cases(rank, world):
    found = {
        name: steps_of(rank, world, settings, DistributedDataParallel)
        for name, settings in CASES.items()
    }
    return dict(found, retrieval=retrieval(rank, world, DistributedDataParallel))


@pytest.fixture(scope='module', params=[2, 4])
def found(request, tmp_path_factory):
    """The number of processes, and what each found in every case."""
    world = request.param
    return world, run(all_cases, world, tmp_path_factory.mktemp('group'), world)


def test_retrieval_ranks_the_images_of_all_processes(found, monkeypatch):
    world, results = found
    # What the processes agree on, and one process has no need to.
    own = RaMBORetrievalLoss._loss

    def drawn(self, feats, labels, together):
        torch.manual_seed(int(torch.randint(2**62, ())))
        return own(self, feats, labels, together)

    monkeypatch.setattr(RaMBORetrievalLoss, '_loss', drawn)
    expected = retrieval(None, world, lambda model: model)
    assert expected['gradients'].abs().sum(1).min() > 0
    for result in results:
        for name, values in expected.items():
            torch.testing.assert_close(
                result['retrieval'][name], values, rtol=1e-6, atol=1e-9
            )


@pytest.mark.parametrize('name', CASES)
def test_mean_gradient_is_that_of_one_process_with_all_rows(name, found):
    world, results = found
    settings = dict(CASES[name])
    # Its mean over processes is DDP's business: rows get the gradient of their own.
    auxiliary = settings.pop('auxiliary', None)
    expected = steps_of(None, world, settings, lambda model: model)
    gradients, losses = expected['gradients'], expected['losses']
    if auxiliary:
        other = dict(settings, auxiliary=auxiliary, loss_weight=0.0)
        alone = [steps_of(r, world, other, lambda model: model) for r in range(world)]
        gradients = gradients + sum(a['gradients'] for a in alone) / world
        losses = losses + sum(a['losses'] for a in alone) / world
    assert gradients[[0, 1, 2, 4]].abs().sum(1).min() > 0
    for result in results:
        torch.testing.assert_close(
            result[name]['gradients'], gradients, rtol=1e-6, atol=1e-9
        )
    mean = sum(result[name]['losses'] for result in results) / world
    torch.testing.assert_close(mean, losses, rtol=1e-6, atol=1e-9)


def test_memory_is_that_of_all_processes_in_each(found):
    world, results = found
    for name, settings in CASES.items():
        if 'memory' not in name:
            continue
        memories = [result[name]['memory'] for result in results]
        for memory in memories:
            assert len(memory['scores']) == settings['memory']
            for step, scores, labels in zip((3, 4), memory['scores'], memory['labels']):
                features, target, weight, _ = union(step, world)
                kept = weight > 0
                with torch.no_grad():
                    now = classifier()(features[kept])
                shifted = with_margin(now, target[kept], settings['margin'])
                torch.testing.assert_close(scores, shifted)
                assert torch.equal(labels, target[kept])
        assert all(str(memory) == str(memories[0]) for memory in memories)


# The random shifts


NOISE = dict(
    class_ap=term('memory'),
    pooled_ap=term('batch'),
    lambd=2.0,
    margin=0.5,
    memory=1,
    loss_weight=1.0,
    gather=True,
)


def noisy_steps(rank, world):
    loss_cls = RaMBOLoss(**NOISE)
    model = DistributedDataParallel(classifier())
    torch.manual_seed(7 + rank)  # what the others would draw must not count
    losses = []
    for step in (0, 1):
        features, labels, weight, _ = batch(step, rank)
        model.zero_grad()
        loss = loss_cls(model(features), labels, weight)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), gradient(model)


def test_all_processes_see_the_same_random_shifts(tmp_path):
    """The seed is the first process'; remembered rows keep the shifts that they had."""
    world = 2
    results = run(noisy_steps, world, tmp_path, world)
    model = classifier()
    torch.manual_seed(7)
    past, expected = [], []
    for step in (0, 1):
        seed = int(torch.randint(2**62, ()))
        features, labels, weight, _ = union(step, world)
        features, labels = features[weight > 0], labels[weight > 0]
        model.zero_grad()
        now = model(features)
        rankings = [Ranking(2.0, True), Ranking(2.0, False, num_rows=len(labels))]
        own = apply_margin(
            now,
            labels.unsqueeze(1) == torch.arange(CLASSES),
            0.5,
            noise=True,
            generator=torch.Generator().manual_seed(seed),
        )
        shifted = torch.cat([own, *(scores for scores, _ in past)])
        past.append((own.detach(), labels))
        labels = torch.cat([labels, *(labels for _, labels in past[:-1])])
        parts = detection_ap_loss(shifted, labels, rankings, perturb='singly')
        loss = sum(0.7 * part.sum() / present.sum() for part, present in parts)
        loss.backward()
        expected.append(loss.detach())
    for losses, grad in results:
        torch.testing.assert_close(losses, torch.stack(expected))
        torch.testing.assert_close(grad, gradient(model), rtol=1e-6, atol=1e-9)


# What is sent


def count_collectives(rank, world):
    sent = []
    all_gather = gather.all_gather

    def spy(message):
        sent.append(tuple(message.shape))
        return all_gather(message)

    gather.all_gather = spy
    result = []
    for spans in (('batch', 'batch'), ('image', 'row')):
        loss_cls = RaMBOLoss(class_ap=term(spans[0]), pooled_ap=term(spans[1]))
        for step in range(len(ROWS)):
            features, labels, weight, images = batch(step, rank)
            scores = classifier()(features).float()
            loss_cls(scores, labels, weight, images=(images, IMAGES))
            result.append(list(sent))
            sent.clear()
    loss_cls.eval()
    loss_cls(classifier()(features), labels, images=(images, IMAGES))
    return result, sent


def test_rows_are_sent_only_where_a_sequence_has_those_of_several_processes(tmp_path):
    world = 2
    results = run(count_collectives, world, tmp_path, world)
    header = (6,)
    expected = []
    for step in range(len(ROWS)):
        longest = max(int(batch(step, rank)[2].sum()) for rank in range(world))
        columns = [(longest, CLASSES), (longest,)] if longest else []
        expected.append([header, *columns])
    assert [len(messages) for messages in expected] == [3, 3, 3, 1, 3]
    assert results == [(expected + [[header]] * len(ROWS), [])] * world


def half_precision(rank, world):
    features, labels, _, _ = batch(0, rank)
    loss_cls = RaMBOLoss(**CASES['memory-batch, together, lambd 2.0, margin 0.3'])
    loss_cls.gather = True
    return loss_cls(features[:, :CLASSES].bfloat16(), labels), loss_cls.state_dict()


def test_half_precision_is_ranked_and_kept_in_full(tmp_path):
    results = run(half_precision, 2, tmp_path, 2)
    features, labels, _, _ = union(0, 2)
    loss_cls = RaMBOLoss(**CASES['memory-batch, together, lambd 2.0, margin 0.3'])
    expected = loss_cls(features[:, :CLASSES].bfloat16(), labels)
    for loss, state in results:
        torch.testing.assert_close(loss, expected)
        (scores,) = state['_extra_state']['scores']
        now = features[:, :CLASSES].bfloat16().float()
        assert torch.equal(scores, with_margin(now, labels, 0.3))


def labels_beyond_float(rank):
    exchange = gather.Exchange('a test')
    columns = [
        torch.full((rank, 3), 0.1),
        torch.full((rank,), 2**24 + 1),
        torch.full((rank,), 0.1, dtype=torch.float64),
    ]
    numbers, received = exchange(torch.tensor([2**40 + rank]), columns)
    return numbers, received


def test_all_values_arrive_as_they_are(tmp_path):
    for numbers, columns in run(labels_beyond_float, 3, tmp_path):
        assert numbers == [[2**40 + rank] for rank in range(3)]
        scores, labels, quality = columns
        for rank in range(3):
            assert torch.equal(scores[rank], torch.full((rank, 3), 0.1))
            assert torch.equal(labels[rank], torch.full((rank,), 2**24 + 1))
            assert quality[rank].dtype == torch.float64
            assert quality[rank].tolist() == [0.1] * rank


# When not to


def calls_of_the_first_alone(rank):
    """Would wait for the other process for ever if it sent anything."""
    features, labels, _, images = batch(1, rank)
    if rank == 1:
        return None
    stock, off, evaluated = (
        RaMBOLoss(pooled_ap=dict(span='image'), gather=gather)
        for gather in (None, False, True)
    )
    evaluated.eval()
    scores = features[:, :CLASSES]
    with pytest.warns(UserWarning, match="span 'image', but the head does not say"):
        losses = [stock(scores, labels), evaluated(scores, labels)]
    losses.append(off(scores, labels, images=(images, IMAGES)))
    return losses


def test_stock_heads_and_evaluation_wait_for_nobody(tmp_path):
    losses, _ = run(calls_of_the_first_alone, 2, tmp_path)
    assert all(0 < loss < math.inf for loss in losses)


def one_process(rank):
    features, labels, weight, _ = batch(1, rank)
    settings = dict(NOISE, margin_noise=False)
    losses = []
    for choice in (True, False):
        loss_cls = RaMBOLoss(**dict(settings, gather=choice))
        losses.append(loss_cls(features[:, :CLASSES], labels, weight))
    return losses


@pytest.mark.parametrize('in_group', [True, False])
def test_one_process_ranks_its_own_rows(in_group, tmp_path):
    together, alone = run(one_process, 1, tmp_path)[0] if in_group else one_process(0)
    assert together == alone > 0


# Errors


PLAIN = dict(margin_noise=False, gather=True)
OTHER_SPANS = dict(PLAIN, class_ap=dict(span='image'), pooled_ap=dict(span='row'))


def watched(loss, scores, labels):
    loss.ranked.register_forward_hook(lambda *_: 1 / 0)
    loss(scores, labels)


def before_the_call(loss, scores, labels):
    with loss.expected():
        raise IndexError('no such level')


def after_the_checks(loss, scores, labels):
    with mock.patch.object(gather, '_count_present', side_effect=MemoryError('full')):
        loss(scores, labels)


def another_iteration(loss, scores, labels):
    hub = MessageHub.get_current_instance()
    hub.update_info('iter', 7)
    try:
        loss(scores, labels)
    finally:
        hub.pop_info('iter')


# What the second process does, what it raises, and what is in the others' messages.
STOPPED, DIFFERS = 'process 1 stopped before it ranked', 'RuntimeError'
FAILURES = dict(
    nan=(lambda f, x, y: f(x * math.nan, y), 'ValueError: RaMBOLoss: pred', STOPPED),
    watched=(watched, 'ZeroDivisionError: division', STOPPED),
    head=(before_the_call, 'IndexError: no such level', STOPPED),
    memory=(after_the_checks, 'MemoryError: full', STOPPED),
    classes=(lambda f, x, y: f(x.repeat(1, 2), y), DIFFERS, '6 x float32, 1 x int64'),
    precision=(lambda f, x, y: f(x.double(), y), DIFFERS, 'columns 3 x float64'),
    spans=(lambda f, x, y: f.others[1](x, y, images=y), DIFFERS, 'columns none'),
    loss=(lambda f, x, y: f.others[0](x, y), DIFFERS, 'call 1 of loss'),
    iteration=(another_iteration, DIFFERS, 'process 1: iteration 8, call 1'),
)


def wait_for_the_second(rank):
    """What each process raises, and how long it took."""
    found = []
    for fail, *_ in FAILURES.values():
        # The same number of losses in each process, as if they built a model.
        loss, *others = [RaMBOLoss(**kw) for kw in (PLAIN, PLAIN, OTHER_SPANS, PLAIN)]
        loss.others = others
        given = torch.randn(4, CLASSES), torch.arange(4)
        began = time.monotonic()
        try:
            fail(loss, *given) if rank == 1 else loss(*given)
        except Exception as error:
            message = f'{type(error).__name__}: {error}'
            found.append((message, time.monotonic() - began))
        assert others[2](*given).isfinite()  # all goes on
    return found


def test_a_process_that_fails_or_differs_is_named_by_the_others_at_once(tmp_path):
    for rank, found in enumerate(run(wait_for_the_second, 3, tmp_path)):
        for (_, own, others), (message, seconds) in zip(FAILURES.values(), found):
            assert message.startswith(own if rank == 1 else DIFFERS), message
            assert others in message or (rank == 1 and own != DIFFERS), message
            assert seconds < 1
        assert len(found) == len(FAILURES)


def one_call_less(rank):
    """Two losses in each step; the third process leaves out one call."""
    first, second = RaMBOLoss(**PLAIN), RaMBOLoss(**PLAIN)
    found = []
    for step in range(3):
        for loss_cls in (first, second):
            if (rank, step, loss_cls) == (2, 1, first):
                continue
            scores = torch.full((4, CLASSES), float(step))
            try:
                loss_cls(scores, torch.arange(4))
                found.append('')
            except RuntimeError as error:
                return [*found, str(error)]
    return found


def test_a_call_that_is_left_out_is_an_error_in_all(tmp_path):
    results = run(one_call_less, 3, tmp_path)
    for *before, message in results:
        assert before == ['', ''] and 'do not rank the same together' in message
        assert message.count('call 2 of loss') == 3


def one_call_less_of_one_loss(rank, folder):
    """The third process leaves out a step, which none can know, and ends first.

    None of them can come to the end of the test's group then.
    """
    loss_cls, message, seconds = RaMBOLoss(**PLAIN), '', 0.0
    for step in range(3):
        if (rank, step) != (2, 1):
            began = time.monotonic()
            try:
                loss_cls(torch.randn(4, CLASSES), torch.arange(4))
            except RuntimeError as error:
                message, seconds = str(error), time.monotonic() - began
    torch.save((message, seconds), folder / f'{rank}.pt')
    os._exit(0)


def test_a_process_that_ends_too_early_is_an_error_of_the_others_at_once(tmp_path):
    *others, (none, _) = run(one_call_less_of_one_loss, 3, tmp_path, tmp_path)
    assert none == ''
    for message, seconds in others:
        assert 'another process has ended' in message and 'call 3 of loss' in message
        assert seconds < 1
