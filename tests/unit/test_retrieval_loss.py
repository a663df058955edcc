"""RaMBORetrievalLoss against the mean of oracle losses, and what mmdet asks of it."""

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.helpers import oracle

pytest.importorskip('mmdet', reason='RaMBORetrievalLoss is registered in mmdet')
from mmdet.models.reid import linear_reid_head
from mmdet.structures import ReIDDataSample
from mmengine.registry import init_default_scope

from rambo_det import RaMBORetrievalLoss, UnitReIDHead
from rambo_det.losses.ranking_loss import PATIENCE

ORACLES = {'together': oracle.ap_loss, 'singly': oracle.ap_loss_singly}


def batch(seed=0, count=9, classes=3, columns=4):
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return feats.requires_grad_(), labels


def similarities(queries, gallery, kind):
    if kind == 'cosine':
        queries, gallery = (x / x.norm(dim=1, keepdim=True) for x in (queries, gallery))
        return queries @ gallery.t()
    return -(queries[:, None] - gallery).square().sum(2).clamp(min=1e-12).sqrt()


def reference(loss, feats, labels, past):
    """The loss and its gradient, each query a list of similarities to the others."""
    gallery = torch.cat([feats, *(x for x, _ in past)])
    classes = torch.cat([labels, *(y for _, y in past)])
    scores = similarities(feats, gallery, loss.similarity)
    losses, gradient = [], torch.zeros_like(scores)
    for query, label in enumerate(labels.tolist()):
        at = [i for i in range(len(gallery)) if i != query]
        flags = [int(classes[i] == label) for i in at]
        if not any(flags):
            continue
        shifts = [loss.margin / 2 * (1 - 2 * flag) for flag in flags]
        values = [scores[query, i].item() + shift for i, shift in zip(at, shifts)]
        weighting = loss.weighting if loss.metric == 'recall' else None
        value, grad = ORACLES[loss.perturb](values, flags, loss.lambd, None, weighting)
        losses.append(value)
        gradient[query, at] = torch.tensor(grad, dtype=scores.dtype)
    count = max(len(losses), 1)
    (expected,) = torch.autograd.grad(scores, feats, gradient / count)
    return sum(losses) / count, expected


@pytest.mark.parametrize('memory', [0, 2])
@pytest.mark.parametrize('similarity', ['cosine', 'euclidean'])
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(metric='recall', perturb='singly'),
        dict(metric='recall', perturb='singly', lambd=0.4, weighting='loglog'),
        dict(metric='recall', perturb='together', lambd=0.3),
        dict(metric='ap', perturb='singly', margin=0.0),
        dict(metric='ap', perturb='together', lambd=0.3),
    ],
    ids=str,
)
def test_it_is_the_mean_over_queries_of_the_oracle(kwargs, similarity, memory):
    loss = RaMBORetrievalLoss(similarity=similarity, memory=memory, **kwargs)
    past = []
    for seed in range(5):
        feats, labels = batch(seed, count=9 + seed)
        value, gradient = reference(loss, feats, labels, past)
        found = loss(feats, labels)
        found.backward()
        assert found.item() == pytest.approx(value, abs=1e-12)
        torch.testing.assert_close(feats.grad, gradient, rtol=1e-9, atol=1e-12)
        past = [*past, (feats.detach(), labels)][-memory:] if memory else []
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize('similarity', ['cosine', 'euclidean'])
@pytest.mark.parametrize('metric', ['recall', 'ap'])
@pytest.mark.parametrize(
    'feats, labels',
    [
        (torch.randn(4, 3), [5, 5, 5, 5]),  # no negatives
        (torch.randn(4, 3), [0, 1, 2, 3]),  # no positives
        (torch.randn(1, 3), [0]),
        (torch.zeros(0, 3), []),
    ],
)
def test_nothing_to_rank_is_zero_with_zero_gradient(feats, labels, metric, similarity):
    feats = feats.clone().requires_grad_()
    loss = RaMBORetrievalLoss(metric, similarity)
    found = loss(feats, torch.tensor(labels, dtype=torch.long))
    found.backward()
    assert found.item() == 0 and not feats.grad.any()


@pytest.mark.parametrize('metric', ['recall', 'ap'])
@pytest.mark.parametrize('similarity', ['cosine', 'euclidean'])
def test_embeddings_without_direction_or_distance_have_finite_gradients(
    metric, similarity
):
    feats = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    feats.requires_grad_()
    loss = RaMBORetrievalLoss(metric, similarity)(feats, torch.tensor([0, 0, 1, 1, 1]))
    loss.backward()
    assert loss.item() > 0  # all ties count against it
    assert torch.isfinite(feats.grad).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype):
    feats, labels = batch(count=64, classes=8)
    half = feats.detach().to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    loss = RaMBORetrievalLoss()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = loss(half, labels)
    expected = loss(full, labels)
    (found + expected).backward()
    assert found == expected and found.dtype == torch.float32
    assert torch.equal(half.grad, full.grad.to(dtype))


def test_the_memory_is_saved_and_fills_in_training_only():
    loss, other = RaMBORetrievalLoss(memory=2), RaMBORetrievalLoss(memory=2)
    assert not loss.state_dict()
    for seed in range(3):
        loss(*batch(seed))
    other.load_state_dict(loss.state_dict())
    feats, labels = batch(7)
    alone = RaMBORetrievalLoss()(feats, labels)
    assert loss.eval()(feats, labels) == alone and len(loss.remembered) == 2
    assert loss.train()(feats, labels) == other(feats, labels) != alone
    with pytest.warns(UserWarning, match='RaMBORetrievalLoss: the rows of the memory'):
        assert loss(*batch(7, columns=5)) > 0


@pytest.mark.parametrize('by_tables', [True, False])
@pytest.mark.parametrize('metric', ['recall', 'ap'])
def test_no_tensor_is_much_larger_than_the_matrix(metric, by_tables, monkeypatch):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for leaf in tree_flatten(result)[0]:
                if isinstance(leaf, torch.Tensor):
                    self.numbers = max(self.numbers, leaf.numel())
            return result

    if not by_tables:
        module = import_module('rambo_det.functional.average_precision')
        monkeypatch.setattr(module, 'suits', lambda *args: False)
    count = 128
    feats, labels = batch(count=count, classes=32)
    loss = RaMBORetrievalLoss(metric, memory=1)
    loss(*batch(1, count=count, classes=32))
    with Largest() as largest:
        loss(feats, labels).backward()
    assert count * 2 * count <= largest.numbers <= 3 * count * 2 * count


def test_a_training_without_positives_says_so():
    loss = RaMBORetrievalLoss()
    feats, labels = torch.randn(4, 3), torch.arange(4)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(PATIENCE - 1):
            loss(feats, labels)
    with pytest.warns(UserWarning, match='Give the training set a triplet_sampler'):
        loss(feats, labels)


@pytest.mark.parametrize('with_cross_entropy', [True, False])
def test_it_takes_the_place_of_mmdets_triplet_loss(with_cross_entropy):
    if linear_reid_head.mmpretrain is None:
        pytest.skip('mmdet has ReID heads only with mmpretrain')
    assert find_spec('torchvision') or 'torchvision' not in sys.modules
    init_default_scope('mmdet')
    other = dict(type='mmpretrain.CrossEntropyLoss') if with_cross_entropy else None
    head = UnitReIDHead(
        num_fcs=0,
        in_channels=6,
        fc_channels=6,
        out_channels=4,
        num_classes=3 if with_cross_entropy else None,
        loss_cls=other,
        loss_triplet=dict(type='RaMBORetrievalLoss'),
    )
    feats, labels = (torch.randn(12, 6),), torch.arange(12) % 3
    samples = [ReIDDataSample().set_gt_label(label) for label in labels.split(4)]
    losses = head.loss(feats, samples)
    sum(losses[name] for name in losses if name.endswith('loss')).backward()
    assert losses['triplet_loss'] == head.loss_triplet(head.fc_out(feats[0]), labels)
    assert head.fc_out.weight.grad.abs().sum() > 0
    embeddings = [sample.pred_feature for sample in head.predict(feats)]
    lengths = torch.stack(embeddings).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(12))
