"""Detectors with several stages or other RoI heads: images, columns and memories."""

import pytest
import torch

pytest.importorskip('mmdet', reason='the heads are registered in mmdet')
from tests.helpers.detectors import (
    CLASSES,
    DENSE,
    QUERY,
    batch,
    build,
    record_calls,
    train_and_predict,
)

CASCADE = 'cascade-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt'
DOUBLE = 'dh-faster-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt'
DYNAMIC = 'dynamic-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt'
LIBRA = 'libra-faster-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt'
SPARSE = 'sparse-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt'


@pytest.mark.parametrize('name', [DOUBLE, DYNAMIC, LIBRA])
def test_detector_trains_and_predicts(name):
    model = build(name)
    head = model.roi_head.bbox_head
    assert head.fc_cls.out_features == CLASSES + head.loss_cls.has_background
    calls = record_calls(head.loss_cls)
    train_and_predict(model)
    assert all(images is not None for *_, images in calls)


def test_a_background_column_where_the_scores_have_one():
    def change(cfg):
        cfg.roi_head.bbox_head.loss_cls.update(scores='log_softmax', use_sigmoid=False)

    model = build(DOUBLE, change)
    assert model.roi_head.bbox_head.fc_cls.out_features == CLASSES + 1
    train_and_predict(model)


def test_each_stage_of_a_cascade_has_its_own_memory():
    def change(cfg):
        for head in cfg.roi_head.bbox_head:
            head.loss_cls.update(memory=3, class_ap=dict(span='memory'))

    model = build(CASCADE, change)
    heads = model.roi_head.bbox_head
    calls = [record_calls(head.loss_cls) for head in heads]
    logs = train_and_predict(model, steps=2)
    assert {f's{stage}.class_ap' for stage in range(3)} <= set(logs)
    for head, own in zip(heads, calls):
        kept = head.loss_cls.get_extra_state()['scores']
        assert len(own) == len(kept) == 2
        for (pred, *_), scores in zip(own, kept):
            assert len(pred) == len(scores)


def test_sparse_rcnn_ranks_the_proposals_of_an_image():
    """Every score is the number of its image, so rows tell where they are from."""
    model = build(SPARSE)
    heads = model.roi_head.bbox_head
    calls = [record_calls(head.loss_cls) for head in heads]
    for head in heads:
        assert head.loss_cls.scores == 'logits'
        forward = head.forward

        def numbered(*args, forward=forward):
            scores, *rest = forward(*args)
            index = torch.arange(2.0).view(2, 1, 1)
            return (scores * 0 + index, *rest)

        head.forward = numbered
    logs = train_and_predict(model)
    assert {'s0.class_ap', 's2.pooled_ap'} <= set(logs)
    for (own,) in calls:
        pred, _, _, (index, num_images) = own
        assert num_images == 2
        assert torch.equal(pred[:, 0].long(), index)


@pytest.mark.parametrize(
    'name, stock',
    [
        (SPARSE, 'DIIHead'),
        (DENSE['RetinaHead'], 'RetinaHead'),
        (QUERY['DETRHead'], 'DETRHead'),
    ],
)
def test_other_losses_work_as_in_the_stock_head(name, stock):
    results = []
    for kind in (f'RaMBO{stock}', stock):

        def change(cfg, kind=kind):
            heads = cfg.get('bbox_head') or cfg.roi_head.bbox_head
            for head in heads if isinstance(heads, list) else [heads]:
                head.type = kind
                head.loss_cls = dict(type='FocalLoss', use_sigmoid=True)

        model = build(name, change)
        torch.manual_seed(0)
        data = batch(model)
        results.append(model.loss(data['inputs'], data['data_samples']))
    torch.testing.assert_close(*results, rtol=0, atol=0)
