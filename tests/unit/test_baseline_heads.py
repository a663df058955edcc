"""The rivals' losses in mmdet's RoI head."""

import pytest
import torch

pytest.importorskip('mmdet', reason='the heads are registered in mmdet')
from mmdet.registry import MODELS

from rambo_det.baselines import RivalLoss, ap_loss, rank_sort_loss

CLASSES = 3


def build(name, **kwargs):
    head = MODELS.build(
        dict(
            type='RivalShared2FCBBoxHead',
            in_channels=2,
            fc_out_channels=8,
            roi_feat_size=2,
            num_classes=CLASSES,
            loss_cls=dict(type='RivalLoss', name=name, **kwargs),
            loss_bbox=dict(type='L1Loss'),
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder', target_stds=(0.1, 0.1, 0.2, 0.2)
            ),
        )
    )
    head.init_weights()
    return head


def batch(head):
    torch.manual_seed(0)
    rois = torch.tensor([[0.0, 10, 10, 30, 40]] * 6)
    labels = torch.tensor([0, 3, 2, 3, 1, 0])
    weights = torch.tensor([1.0, 1, 1, 1, 1, 0])  # the last one is ignored
    targets = torch.randn(6, 4)
    outputs = head(torch.randn(6, 2, 2, 2))
    outputs[1].data.normal_()
    return (*outputs, rois, labels, weights, targets, torch.ones(6, 4))


def iou(a, b):
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    both = (high - low).clamp(min=0).prod()
    return both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


def test_rank_sort_gets_the_iou_of_the_predicted_boxes():
    head = build('rank_sort', loss_weight=2.0)
    args = batch(head)
    logits, deltas, rois, labels, _, targets, _ = args
    quality = []
    for row in (0, 2, 4):
        column = 4 * labels[row]
        found = head.bbox_coder.decode(
            rois[row : row + 1, 1:], deltas[row : row + 1, column : column + 4]
        )
        truth = head.bbox_coder.decode(rois[row : row + 1, 1:], targets[row : row + 1])
        quality.append(iou(found[0], truth[0]))
    expected = 2.0 * rank_sort_loss(logits[:5], labels[:5], torch.stack(quality))
    torch.testing.assert_close(head.loss(*args)['loss_cls'], expected)
    worse = rank_sort_loss(logits[:5], labels[:5], 1 - torch.stack(quality))
    assert 2.0 * worse != expected


def test_ignored_rows_do_not_count():
    head = build('ap')
    args = batch(head)
    expected = ap_loss(args[0][:5], args[3][:5])
    torch.testing.assert_close(head.loss(*args)['loss_cls'], expected)


def test_focal_loss_is_the_mean_over_the_positives():
    head = build('focal')
    args = batch(head)
    probs = args[0][:5].sigmoid()
    total = torch.zeros(())
    for row, label in enumerate(args[3][:5].tolist()):
        for column in range(CLASSES):
            p = probs[row, column]
            total -= (
                0.25 * (1 - p) ** 2 * p.log()
                if column == label
                else 0.75 * p**2 * (1 - p).log()
            )
    torch.testing.assert_close(head.loss(*args)['loss_cls'], total / 3)


@pytest.mark.parametrize('name', ['focal', 'ap', 'rank_sort'])
def test_the_head_learns_and_predicts_one_column_per_class(name):
    head = build(name)
    args = batch(head)
    losses = head.loss(*args)
    sum(losses.values()).backward()
    assert head.fc_cls.weight.grad.any() and head.fc_reg.weight.grad.any()
    scores = head.loss_cls.get_activation(args[0])
    assert scores.shape == (6, CLASSES + 1)
    torch.testing.assert_close(head.fc_cls.bias.sigmoid(), torch.full((CLASSES,), 0.01))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="name must be 'focal' or .* got 'auc'"):
        RivalLoss('auc')
