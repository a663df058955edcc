"""RaMBOLoss against the mean of oracle losses, and what mmdet asks of it."""

import copy
import io
import math
import warnings

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from tests.helpers import oracle

pytest.importorskip('mmdet', reason='RaMBOLoss is registered in mmdet')
from mmdet.registry import MODELS

from rambo_det import RaMBOLoss

# One term alone, on what all of a batch holds; tests vary from here.
PLAIN = dict(margin=0.0, margin_noise=False, memory=0)
BATCH = dict(weight=1.0, span='batch')
CLASS = dict(class_ap=BATCH, pooled_ap=None, loss_weight=1.0)
POOLED = dict(class_ap=None, pooled_ap=BATCH, loss_weight=1.0)


def random_batch(rows=12, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes + 1, (rows,), generator=generator)
    return pred.requires_grad_(), target


class RoundingDecidesError(Exception):
    """Two scores tie after the perturbation but for rounding."""


ORACLES = {'together': oracle.ap_loss, 'singly': oracle.ap_loss_singly}


def reference(scores, labels, lambd, per_class, images=None, perturb='singly'):
    """Mean oracle loss over the sequences with positives, and its gradient."""
    together = perturb == 'together'
    columns = range(scores.size(1))
    gradient = torch.zeros_like(scores)
    losses = []
    for image in sorted(set(images)) if images else [None]:
        rows = [
            i
            for i in range(len(labels))
            if labels[i] >= 0 and (image is None or images[i] == image)
        ]
        for classes in [[c] for c in columns] if per_class else [list(columns)]:
            at = [(i, c) for i in rows for c in classes]
            values = [scores[i, c].item() for i, c in at]
            flags = [int(labels[i] == c) for i, c in at]
            if any(flags):
                if oracle.rounding_decides(values, flags, lambd, 1e-12, together):
                    raise RoundingDecidesError
                loss, grads = ORACLES[perturb](values, flags, lambd)
                losses.append(loss)
                for (i, c), g in zip(at, grads):
                    gradient[i, c] += g
    count = max(len(losses), 1)
    return sum(losses) / count, gradient / count


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 10),
    classes=st.integers(1, 4),
    num_images=st.integers(1, 3),
    spans=st.tuples(
        st.sampled_from(['batch', 'image']), st.sampled_from(['batch', 'image', 'row'])
    ),
    weights=st.tuples(st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([1.0, 2.0])),
    perturb=st.sampled_from(sorted(ORACLES)),
    lambdas=st.tuples(
        st.floats(0.05, 50), st.one_of(st.floats(0.05, 50), st.just(math.inf))
    ),
    loss_weight=st.sampled_from([1.0, 0.25]),
    data=st.data(),
)
def test_weighted_mean_of_sequences(
    seed, rows, classes, num_images, spans, weights, perturb, lambdas, loss_weight, data
):
    if perturb == 'together':
        lambdas = lambdas[0], min(lambdas[1], 50)
    pred, target = random_batch(rows, classes, seed)
    images = sorted(
        data.draw(
            st.lists(st.integers(0, num_images - 1), min_size=rows, max_size=rows)
        )
    )
    kept = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    loss_cls = RaMBOLoss(
        **PLAIN,
        class_ap=dict(weight=weights[0], span=spans[0], lambd=lambdas[0]),
        pooled_ap=dict(weight=weights[1], span=spans[1], lambd=lambdas[1]),
        loss_weight=loss_weight,
        perturb=perturb,
    )
    weight = torch.tensor(kept, dtype=torch.float32)
    index = torch.tensor(images, dtype=torch.long)
    given = (index, num_images) if data.draw(st.booleans()) else index
    loss = loss_cls(pred, target, weight, avg_factor=7.0, images=given)
    loss.backward()

    labels = [int(t) if k else -1 for t, k in zip(target, kept)]
    expected, gradient = 0.0, torch.zeros_like(pred)
    for term_weight, span, lambd, per_class in zip(
        weights, spans, lambdas, (True, False)
    ):
        groups = {'image': images, 'row': range(rows), 'batch': None}[span]
        try:
            value, grad = reference(
                pred.detach(), labels, lambd, per_class, groups, perturb
            )
        except RoundingDecidesError:
            reject()
        expected += loss_weight * term_weight * value
        gradient += loss_weight * term_weight * grad
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(pred.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('scores', ['sigmoid', 'softmax', 'log_softmax'])
def test_activated_scores_are_ranked(scores):
    """The chain rule through the activation multiplies Algorithm 1's gradient."""
    pred, target = random_batch(rows=20, classes=4)
    softmax = scores != 'sigmoid'
    if softmax:
        pred, target = pred.detach().requires_grad_(), target.clamp(max=3)
    loss_cls = RaMBOLoss(
        lambd=0.4, scores=scores, use_sigmoid=not softmax, **PLAIN, **CLASS
    )
    loss = loss_cls(pred, target)
    loss.backward()

    leaf = pred.detach().clone().requires_grad_()
    ranked = getattr(leaf, scores)(1)[:, :-1] if softmax else leaf.sigmoid()
    value, gradient = reference(ranked.detach(), target.tolist(), 0.4, True)
    ranked.backward(gradient)
    assert loss.item() == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(pred.grad, leaf.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('noise', [False, True])
def test_margin_is_applied_to_what_is_ranked(noise):
    pred, target = random_batch(rows=30)
    loss_cls = RaMBOLoss(lambd=2.0, margin=0.6, margin_noise=noise, memory=0, **CLASS)
    torch.manual_seed(4)
    loss = loss_cls(pred, target)
    loss.backward()
    torch.manual_seed(4)
    size = torch.randn(30, 3, dtype=torch.float64).abs() if noise else torch.ones(30, 3)
    one_hot = torch.nn.functional.one_hot(target, 4)[:, :3]
    shifted = pred.detach() + (0.5 - one_hot) * 0.6 * size
    value, gradient = reference(shifted, target.tolist(), 2.0, True)
    assert loss.item() == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(pred.grad, gradient, rtol=1e-9, atol=1e-12)
    # What is reported is the ranking that was made.
    accuracy = loss_cls.get_accuracy(pred, target)
    assert accuracy['class_ap'].item() == pytest.approx(1 - value, abs=1e-12)


# The memory


def memory_loss(memory=2, **kwargs):
    settings_ = {**PLAIN, 'memory': memory, 'lambd': 3.0, **kwargs}
    term = dict(weight=1.0, span='memory')
    return RaMBOLoss(**settings_, class_ap=term, pooled_ap=None, loss_weight=1.0)


def test_memory_is_the_last_steps_without_gradient():
    loss_cls = memory_loss(memory=2)
    batches = [random_batch(seed=seed) for seed in range(5)]
    weight = torch.ones(12)
    weight[3] = 0  # an ignored row stays ignored when remembered
    for step, (pred, target) in enumerate(batches):
        loss = loss_cls(pred, target, weight)
        loss.backward()
        seen = [batches[step], *batches[max(step - 2, 0) : step]]
        scores = torch.cat([p.detach() for p, _ in seen])
        labels = [-1 if i == 3 else int(t) for _, ts in seen for i, t in enumerate(ts)]
        value, gradient = reference(scores, labels, 3.0, True)
        assert loss.item() == pytest.approx(value, abs=1e-12)
        torch.testing.assert_close(pred.grad, gradient[:12], rtol=1e-9, atol=1e-12)


def test_evaluation_neither_reads_nor_fills_the_memory():
    loss_cls, fresh = memory_loss(), memory_loss()
    loss_cls(*random_batch(seed=0))
    state = loss_cls.state_dict()
    loss_cls.eval()
    batch = random_batch(seed=1)
    assert loss_cls(*batch) == fresh(*batch)
    assert str(loss_cls.state_dict()) == str(state)


def test_memory_survives_a_safe_checkpoint_exactly():
    running, resumed = memory_loss(), memory_loss()
    for seed in range(3):
        running(*random_batch(seed=seed))
    file = io.BytesIO()
    torch.save(running.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(3, 7):
        a, b = random_batch(seed=seed), random_batch(seed=seed)
        loss_a, loss_b = running(*a), resumed(*b)
        loss_a.backward()
        loss_b.backward()
        assert loss_a == loss_b
        assert torch.equal(a[0].grad, b[0].grad)


def test_memory_of_another_model_is_emptied_with_a_warning():
    loss_cls = memory_loss()
    loss_cls(*random_batch(classes=5))
    batch = random_batch(classes=3)
    with pytest.warns(UserWarning, match='have 5 columns.* of this step 3'):
        loss = loss_cls(*batch)
    assert loss == memory_loss()(*batch)


def test_memory_is_not_kept_where_no_term_reads_it():
    loss_cls = RaMBOLoss(memory=7, **CLASS)
    loss_cls(*random_batch())
    assert loss_cls.get_extra_state() == dict(scores=[], labels=[])


def test_an_empty_memory_is_not_in_the_state():
    """Mmengine broadcasts what a new model's state holds, and that must be tensors."""
    loss_cls, other = memory_loss(), memory_loss()
    assert loss_cls.state_dict() == {}
    other(*random_batch(seed=0))
    assert list(other.state_dict()) == ['_extra_state']
    other.load_state_dict(loss_cls.state_dict())
    assert other.get_extra_state() == dict(scores=[], labels=[])


def test_deep_copies_do_not_share_the_memory():
    loss_cls = memory_loss()
    loss_cls(*random_batch(seed=0))
    other = copy.deepcopy(loss_cls)
    other(*random_batch(seed=1))
    assert len(loss_cls.get_extra_state()['scores']) == 1


# Batches that hold little


@pytest.mark.parametrize('memory', [0, 2])
@pytest.mark.parametrize(
    'pred, target, weight',
    [
        (torch.zeros(0, 3), torch.zeros(0), None),
        (torch.randn(5, 3), torch.full((5,), 3), None),
        (torch.randn(5, 3), torch.arange(5) % 4, torch.zeros(5)),
        (torch.randn(1, 1), torch.ones(1), None),
    ],
)
def test_nothing_to_rank_gives_zero_connected_to_the_graph(
    pred, target, weight, memory
):
    loss_cls = RaMBOLoss(
        memory=memory,
        class_ap=dict(weight=1.0, span='memory'),
        pooled_ap=dict(weight=1.0, span='batch'),
    )
    pred = pred.clone().requires_grad_()
    for _ in range(2):
        loss = loss_cls(pred, target.long(), weight)
        assert loss.item() == 0
        loss.backward()
        assert pred.grad is not None and pred.grad.abs().sum() == 0
        # Nothing, so that it does not count in a mean over steps.
        assert loss_cls.get_accuracy(pred, target) == {}


def test_autocast_does_not_change_the_ranks():
    pred, target = random_batch(rows=40)
    pred = pred.detach().float()
    loss_cls = RaMBOLoss(lambd=5.0, **{**PLAIN, 'margin': 0.15})
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = loss_cls(pred, target)
    assert inside == loss_cls(pred, target)


def test_compiled_modules_can_use_the_loss():
    linear = torch.nn.Linear(8, 3)
    loss_cls = RaMBOLoss(lambd=5.0, pooled_ap=dict(span='batch'))
    compiled = torch.compile(lambda x, y: loss_cls(linear(x), y), backend='eager')
    for rows in (20, 21):  # another shape makes dynamo try dynamic ones
        loss = compiled(torch.randn(rows, 8), torch.arange(rows) % 4)
        loss.backward()
    assert linear.weight.grad.abs().sum() > 0


# Images


def test_span_image_in_a_stock_head_warns_once_and_means_the_batch():
    pred, target = random_batch()
    settings_ = {**PLAIN, **POOLED, 'pooled_ap': dict(weight=1, span='image')}
    loss_cls = RaMBOLoss(**settings_)
    with pytest.warns(UserWarning, match='RaMBOShared2FCBBoxHead') as record:
        loss = loss_cls(pred, target)
        loss_cls(pred, target)
    assert len(record) == 1
    assert loss == RaMBOLoss(**PLAIN, **POOLED)(pred, target)


def test_no_warning_where_images_are_known():
    pred, target = random_batch()
    loss_cls = RaMBOLoss()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loss_cls(pred, target, images=torch.arange(12) // 6)
        loss_cls.get_accuracy(pred, target)


# mmdet's interface


def test_built_from_the_registry_and_printed():
    loss_cls = MODELS.build(dict(type='RaMBOLoss', margin=0.5))
    assert isinstance(loss_cls, RaMBOLoss)
    assert 'margin=0.5' in repr(loss_cls) and 'gather=None' in repr(loss_cls)


def test_missing_keys_of_a_term_take_the_default():
    loss_cls = RaMBOLoss(lambd=2.0, class_ap=dict(span='image'), pooled_ap={})
    assert loss_cls.terms == (
        ('class_ap', 1.0, 'image', 2.0),
        ('pooled_ap', 1.0, 'batch', 2.0),
    )


def test_channels_and_activation():
    logits = torch.randn(4, 3)
    loss_cls = RaMBOLoss()
    assert loss_cls.get_cls_channels(3) == 3
    activated = loss_cls.get_activation(logits)
    assert torch.equal(activated[:, :3], logits.sigmoid())
    assert activated.shape == (4, 4)
    # What the classes leave for the background, also where 1 - p would round to 0.
    torch.testing.assert_close(activated[:, 3], 1 - logits.sigmoid().amax(1))
    assert loss_cls.get_activation(logits + 50)[:, 3].min() > 0
    for scores in ('softmax', 'log_softmax'):
        softmax = RaMBOLoss(scores=scores, use_sigmoid=False)
        assert softmax.get_cls_channels(3) == 4
        assert torch.equal(softmax.get_activation(logits), logits.softmax(-1))
    assert loss_cls.get_activation(torch.zeros(0, 3)).shape == (0, 4)


def test_accuracy_is_the_exact_ap_of_the_preceding_call():
    loss_cls = RaMBOLoss(margin=0.0, pooled_ap=dict(span='image'))
    assert loss_cls.get_accuracy(None, None) == {}
    images = [0] * 5 + [1] * 7
    for seed in range(3):
        pred, target = random_batch(seed=seed)
        loss_cls(pred, target, images=torch.tensor(images))
    accuracy = loss_cls.get_accuracy(None, None)
    class_loss, _ = reference(pred.detach(), target.tolist(), 1.0, True)
    pooled_loss, _ = reference(pred.detach(), target.tolist(), 1.0, False, images)
    assert accuracy['class_ap'].item() == pytest.approx(1 - class_loss, abs=1e-12)
    assert accuracy['pooled_ap'].item() == pytest.approx(1 - pooled_loss, abs=1e-12)
    assert not any('loss' in key for key in accuracy)


@pytest.mark.parametrize(
    ('scores', 'auxiliary'),
    [
        ('log_softmax', dict(type='CrossEntropyLoss', loss_weight=0.7)),
        ('logits', dict(type='CrossEntropyLoss', use_sigmoid=True)),
        ('logits', dict(type='FocalLoss', use_sigmoid=True)),
    ],
)
def test_auxiliary_loss_is_added_to_the_ranking(scores, auxiliary):
    settings = dict(**PLAIN, **POOLED, scores=scores, use_sigmoid=scores == 'logits')
    both = RaMBOLoss(**settings, auxiliary=auxiliary)
    ranking, other = RaMBOLoss(**settings), MODELS.build(auxiliary)
    pred = torch.randn(6, 4, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 3, 0])
    args = dict(weight=torch.tensor([1.0, 1, 0, 1, 1, 1]), avg_factor=5.0)
    found = both(pred, target, **args)
    expected = ranking(pred, target, **args) + other(pred, target, **args)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, pred), torch.autograd.grad(expected, pred)
    )
    assert torch.autograd.grad(other(pred, target, **args), pred)[0].any()


@pytest.mark.parametrize('override', [None, 'mean', 'sum'])
def test_reductions_are_the_same(override):
    batch = random_batch()
    loss_cls = RaMBOLoss(**PLAIN, **CLASS)
    assert loss_cls(*batch, reduction_override=override) == loss_cls(*batch)


def test_value_checks_can_be_switched_off():
    loss_cls = RaMBOLoss(check_values=False, **PLAIN, **CLASS)
    assert loss_cls(torch.full((4, 2), math.nan), torch.zeros(4).long()).shape == ()
