"""What binds a loss to a head: the recorder, also of heads that nobody named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip('mmdet', reason='RaMBOLoss is registered in mmdet')
from mmdet.registry import MODELS

from rambo_det import RaMBOHeadMixin, RaMBOLoss

PLAIN = dict(
    margin=0.3, margin_noise=False, memory=0, class_ap=dict(span='batch'), lambd=2.0
)


class StockHead(torch.nn.Module):
    """A head that calls its loss once per level, as those of mmdet do."""

    def __init__(self, num_classes=3, loss_cls=None):
        super().__init__()
        self.num_classes = num_classes
        self.loss_cls = MODELS.build(loss_cls)

    def loss_by_feat(self, levels):
        return dict(loss_cls=[self.loss_cls(*level) for level in levels], loss_bbox=0)


class Head(RaMBOHeadMixin, StockHead):
    """The recipe of docs/detectors.md."""

    def loss_by_feat(self, levels, images, num_images=None, objects=None):
        if not self.ranks:
            return super().loss_by_feat(levels)
        with self.recorded_calls(objects) as calls:
            losses = super().loss_by_feat(levels)
        logits = torch.zeros(0, 3)
        losses.update(self.rank_calls(calls, logits, images, num_images, objects))
        return losses


def head(**loss_cls):
    return Head(loss_cls=dict(type='RaMBOLoss', **{**PLAIN, **loss_cls}))


def rows(count, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(count, classes, generator=generator).requires_grad_()
    return pred, torch.randint(0, classes + 1, (count,), generator=generator)


@settings(max_examples=40)
@given(data=st.data())
def test_recorded_calls_are_one_call(data):
    counts = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    total = sum(counts)
    pred, target = rows(total, data.draw(st.integers(0, 10**6)))
    index = torch.tensor(
        data.draw(st.lists(st.integers(0, 2), min_size=total, max_size=total)),
        dtype=torch.long,
    )
    weight = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=total, max_size=total))
    ).reshape(-1)
    without = data.draw(st.integers(0, len(counts)))  # a call that gives no weights
    levels = []
    for place, level in enumerate(zip(*(t.split(counts) for t in (pred, target)))):
        kept = weight.split(counts)[place]
        if place == without:
            kept.fill_(1)
        levels.append((*level, None if place == without else kept, 3.0))
    bound = head()
    losses = bound.loss_by_feat(levels, index, 3)
    (gradient,) = torch.autograd.grad(losses['loss_cls'], pred)

    single = RaMBOLoss(**PLAIN)
    expected = single(pred, target, weight, images=(index, 3))
    assert losses['loss_cls'] == expected
    assert torch.equal(gradient, torch.autograd.grad(expected, pred)[0])
    reported = {k: v for k, v in losses.items() if k.endswith('_ap')}
    assert reported == single.get_accuracy()


def test_a_recorded_call_is_a_zero_in_the_graph():
    bound = head()
    pred, target = rows(4)
    with bound.recorded_calls() as calls:
        zero = bound.loss_cls(pred, target, avg_factor=2.0)
        assert bound.loss_cls.get_accuracy(pred, target) == {}
        assert bound.loss_cls.use_sigmoid and bound.loss_cls.custom_activation
    assert zero == 0 and zero.requires_grad and zero.shape == ()
    ((recorded, labels, weight, avg_factor, reduction),) = calls
    assert recorded is pred and labels is target
    assert (weight, avg_factor, reduction) == (None, 2.0, None)


@pytest.mark.parametrize('error', [RuntimeError, ValueError, KeyboardInterrupt])
def test_a_head_is_as_before_after_any_exception(error):
    bound = head()
    loss_cls, modules = bound.loss_cls, dict(bound.named_modules())
    with pytest.raises(error), bound.recorded_calls():
        assert bound.loss_cls is not loss_cls and not bound.ranks
        raise error
    assert bound.loss_cls is loss_cls and bound.ranks
    assert dict(bound.named_modules()) == modules
    assert 'loss_cls' not in vars(bound)
    levels = [rows(8)]
    losses = bound.loss_by_feat(levels, torch.arange(8) % 2)
    assert losses['loss_cls'] > 0


def test_all_levels_are_one_step_of_the_memory():
    bound = head(memory=3, class_ap=dict(span='memory'))
    for _ in range(2):
        bound.loss_by_feat([rows(4), rows(2)], torch.zeros(6).long())
    assert [len(s) for s in bound.loss_cls.get_extra_state()['scores']] == [6, 6]


def test_no_calls_rank_nothing():
    """Where processes rank together, the others wait for this one."""
    bound = head()
    losses = bound.loss_by_feat([], torch.zeros(0).long(), 2)
    assert losses['loss_cls'] == 0 and 'class_ap' not in losses


def test_a_row_per_loss_is_refused_as_without_binding():
    bound = head()
    with pytest.raises(ValueError, match=r'no loss per row.*OHEM'):
        bound.loss_by_feat([(*rows(4), None, None, 'none')], torch.zeros(4).long())


def test_quality_targets_are_ranked_by_their_labels():
    bound = head()
    pred, target = rows(9)
    images = torch.arange(9) // 5
    quality = bound.loss_by_feat(
        [(pred[:6], (target[:6], torch.rand(6))), (pred[6:], (target[6:], None))],
        images,
    )
    assert (
        quality['loss_cls'] == bound.loss_by_feat([(pred, target)], images)['loss_cls']
    )
    loss_cls = RaMBOLoss(**PLAIN)
    assert loss_cls(pred, (target, torch.rand(9))) == loss_cls(pred, target)
    for wrong in ([target, target, target], 3):
        with pytest.raises(TypeError, match=r'target must be a tensor of labels, or'):
            loss_cls(pred, wrong)


def test_a_label_beyond_the_classes_is_named_where_the_stock_head_trips_over_it():
    """DETR's matching cost looks it up among the columns."""
    bound = head()
    match = r'Head: the ground truth has label 3, but num_classes=3; set'
    with pytest.raises(ValueError, match=match), bound.recorded_calls(
        torch.tensor([0, 3])
    ):
        torch.zeros(3)[3]
    with pytest.raises(IndexError), bound.recorded_calls(torch.tensor([0, 2])):
        torch.zeros(3)[3]


def test_a_label_beyond_the_classes_is_named_where_it_would_be_background():
    bound = head()
    levels = [(rows(4)[0], torch.tensor([0, 1, 3, 3]))]
    with pytest.raises(ValueError, match=r'label 4, but the classifier has 3 classes'):
        bound.loss_by_feat(levels, torch.zeros(4).long(), 1, torch.tensor([0, 4]))


def test_another_loss_is_left_alone_with_a_warning():
    cross_entropy = dict(type='CrossEntropyLoss', use_sigmoid=True)
    with pytest.warns(
        UserWarning, match=r'Head: loss_cls is CrossEntropyLoss, so that'
    ):
        bound = Head(loss_cls=cross_entropy)
    levels = [rows(4), rows(2)]
    losses = bound.loss_by_feat(levels, torch.zeros(6).long())
    assert len(losses['loss_cls']) == 2


# Several calls before one backward


def test_calls_may_be_summed():
    """As of SoftTeacher's two branches, of two heads, or of decoder layers."""
    loss_cls, alone = RaMBOLoss(**PLAIN), RaMBOLoss(**PLAIN)
    (a, y), (b, z) = rows(8), rows(5, seed=1)
    total = loss_cls(a, y) + loss_cls(b, z)
    total.backward()
    for pred, target in ((a, y), (b, z)):
        leaf = pred.detach().clone().requires_grad_()
        alone(leaf, target).backward()
        assert torch.equal(pred.grad, leaf.grad)


def test_two_heads_may_share_a_loss():
    first, second = head(), head()
    second.loss_cls = first.loss_cls
    losses = [
        h.loss_by_feat([rows(n)], torch.zeros(n).long())
        for h, n in ((first, 8), (second, 4))
    ]
    assert all(loss['loss_cls'] > 0 for loss in losses)
