"""The RoI heads inside mmdet: image grouping, stock heads, a whole detector."""

import pytest
import torch

pytest.importorskip('mmdet', reason='the heads are registered in mmdet')
from mmdet.registry import MODELS

import rambo_det
from rambo_det import RaMBOLoss
from tests.helpers import detectors

HEADS = ['Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead', 'ConvFCBBoxHead']
IMAGES = dict(weight=1.0, span='image')


def build_head(name, loss_cls, classes=3, **more):
    extra = dict(num_shared_fcs=1) if 'ConvFC' in name else {}
    return MODELS.build(
        dict(
            type=name,
            in_channels=8,
            fc_out_channels=16,
            roi_feat_size=2,
            num_classes=classes,
            loss_cls=loss_cls,
            **extra,
            **more,
        )
    )


def roi_batch(counts=(5, 3), classes=3):
    """Logits, boxes, RoIs, labels, weights, box targets and weights of a batch."""
    torch.manual_seed(0)
    rows = sum(counts)
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rois = torch.cat([index[:, None].float(), torch.rand(rows, 4)], dim=1)
    return (
        torch.randn(rows, classes, requires_grad=True),
        torch.randn(rows, 4 * classes, requires_grad=True),
        rois,
        torch.arange(rows) % (classes + 1),
        torch.ones(rows),
        torch.randn(rows, 4),
        torch.ones(rows, 4),
    )


@pytest.mark.parametrize('name', HEADS)
def test_head_ranks_each_image(name):
    loss_cls = dict(
        type='RaMBOLoss', memory=0, margin=0.0, class_ap=None, pooled_ap=IMAGES
    )
    head = build_head('RaMBO' + name, loss_cls)
    batch = roi_batch()
    losses = head.loss(*batch)
    losses['loss_cls'].backward()

    # A loss for each image: one that is called twice before backward asks for a head.
    batch_wide = dict(loss_cls, pooled_ap=dict(weight=1.0, span='batch'))
    first, second = MODELS.build(batch_wide), MODELS.build(batch_wide)
    pred, target = batch[0].detach().clone().requires_grad_(), batch[3]
    expected = (first(pred[:5], target[:5]) + second(pred[5:], target[5:])) / 2
    expected.backward()
    torch.testing.assert_close(losses['loss_cls'], expected)
    torch.testing.assert_close(batch[0].grad, pred.grad)
    assert set(losses) == {'loss_cls', 'loss_bbox', 'pooled_ap'}
    assert 0 < losses['pooled_ap'] <= 1


@pytest.mark.parametrize('name', HEADS)
def test_plain_swap_in_a_stock_head(name):
    head = build_head(name, dict(type='RaMBOLoss', pooled_ap=IMAGES, memory=0))
    assert head.fc_cls.out_features == 3
    with pytest.warns(UserWarning, match='RaMBOShared2FCBBoxHead'):
        losses = head.loss(*roi_batch())
    assert torch.isfinite(losses['loss_cls'])


def test_head_works_with_other_losses():
    loss_cls = dict(type='CrossEntropyLoss', use_sigmoid=False)
    batch = roi_batch(classes=3)
    logits = torch.randn(8, 4)
    ours = build_head('RaMBOShared2FCBBoxHead', loss_cls).loss(logits, *batch[1:])
    stock = build_head('Shared2FCBBoxHead', loss_cls).loss(logits, *batch[1:])
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[key], stock[key]) for key in ours)


def test_no_proposals():
    head = build_head('RaMBOShared2FCBBoxHead', dict(type='RaMBOLoss'))
    batch = roi_batch(counts=(0, 0))
    losses = head.loss(*batch)
    # The stock head has no loss_cls here, so that the classifier gets no gradient.
    losses['loss_cls'].backward()
    assert losses['loss_cls'] == 0 and batch[0].grad.shape == (0, 3)
    assert losses['loss_bbox'] == 0


def test_an_image_without_proposals_costs_nothing():
    loss_cls = dict(
        type='RaMBOLoss', memory=0, margin=0.0, class_ap=None, pooled_ap=IMAGES
    )
    head = build_head('RaMBOShared2FCBBoxHead', loss_cls)
    full, holed = roi_batch(counts=(5, 3)), list(roi_batch(counts=(5, 3)))
    holed[2] = holed[2].clone()
    holed[2][5:, 0] = 2  # image 1 of 3 has none
    assert head.loss(*full)['loss_cls'] == head.loss(*holed)['loss_cls']


@pytest.mark.parametrize(
    'kind, loss_cls',
    [
        ('RaMBOShared2FCBBoxHead', {}),
        ('RaMBOShared4Conv1FCBBoxHead', dict(scores='sigmoid')),
        ('Shared2FCBBoxHead', dict(scores='softmax', use_sigmoid=False)),
    ],
)
def test_detector_trains_and_predicts(kind, loss_cls):
    def change(cfg):
        head = cfg.roi_head.bbox_head
        head.type = kind
        head.loss_cls.update(class_ap=dict(span='memory'), **loss_cls)
        if '4Conv' in kind:
            head.conv_out_channels = 16
        if not kind.startswith('RaMBO'):
            del head.box_avg  # which stock heads do not have

    model = detectors.build('faster-rcnn_r50_fpn_rambo_1x_voc0712', change)
    head = model.roi_head.bbox_head
    detectors.train_and_predict(model, steps=2)  # the second step reads the memory
    assert head.fc_cls.weight.grad.abs().sum() > 0
    assert len(head.loss_cls.get_extra_state()['scores']) == 2


def test_no_attribute_that_the_class_check_of_mmdet_reads():
    """NumClassCheckHook compares ``num_classes`` of every module."""
    assert not hasattr(RaMBOLoss(), 'num_classes')


def test_public_names():
    assert all(hasattr(rambo_det, name) for name in rambo_det.__all__)
