"""Query heads: every part ranks its own rows, image by image."""

import pytest
import torch

pytest.importorskip('mmdet', reason='the heads are registered in mmdet')
from rambo_det.functional import Ranking, detection_ap_loss
from tests.helpers.detectors import (
    CLASSES,
    QUERY,
    batch,
    build,
    record_calls,
    train_and_predict,
    truth,
)

PARTS = dict(dict.fromkeys(QUERY, 2), DINOHead=2 + 1 + 2)


@pytest.mark.parametrize('name', QUERY)
def test_detector_trains_and_predicts(name):
    model = build(QUERY[name])
    head = model.bbox_head
    assert type(head).__name__ == f'RaMBO{name}'
    assert head.loss_cls.memory == 0 and head.loss_cls.scores == 'logits'
    calls = record_calls(head.loss_cls)
    train_and_predict(model)
    # Decoder layers, then the encoder's output and the denoising queries.
    assert len(calls) == PARTS[name]
    for pred, _, _, (index, num_images) in calls:
        half = len(pred) // 2
        assert num_images == 2 and index.tolist() == [0] * half + [1] * half


@pytest.mark.parametrize('name', QUERY)
def test_rows_of_an_image_follow_each_other(name):
    """Every score is the number of its image, so rows tell where they are from."""
    model = build(QUERY[name])
    head, data = model.bbox_head, batch(model)
    calls = record_calls(head.loss_cls)
    scores = torch.arange(2.0).view(2, 1, 1).expand(2, 5, CLASSES).clone()
    boxes = torch.rand(2, 5, 4)
    instances, metas, _ = truth(data)
    head.loss_by_feat_single(
        scores, boxes, batch_gt_instances=instances, batch_img_metas=metas
    )
    if name == 'DINOHead':
        most = max(len(i) for i in instances)
        meta = dict(num_denoising_queries=2 * most, num_denoising_groups=1)
        scores = torch.arange(2.0).view(2, 1, 1).expand(2, 2 * most, CLASSES)
        head._loss_dn_single(
            scores, torch.rand(2, 2 * most, 4), instances, metas, dn_meta=meta
        )
    assert len(calls) == 1 + (name == 'DINOHead')
    for pred, _, _, (index, _) in calls:
        assert torch.equal(pred[:, 0].long(), index)


def test_deformable_detr_is_one_direct_call_per_layer():
    def change(cfg):
        cfg.bbox_head.loss_cls.update(
            margin_noise=False,
            margin=0.2,
            lambd=3.0,
            loss_weight=1.0,
            class_ap=dict(weight=0.7, span='batch'),
            pooled_ap=dict(weight=0.3, span='image', lambd=5.0),
        )

    model = build(QUERY['DeformableDETRHead'], change)
    head, data = model.bbox_head, batch(model)
    instances, metas, _ = truth(data)
    scores = torch.randn(3, 2, 12, CLASSES, requires_grad=True)
    boxes = torch.rand(3, 2, 12, 4) * 0.2 + 0.4
    losses = head.loss_by_feat(scores, boxes, None, None, instances, metas)
    parts = [losses['d0.loss_cls'], losses['d1.loss_cls'], losses['loss_cls']]
    (gradient,) = torch.autograd.grad(sum(parts), scores)

    total = 0.0
    for layer, part in enumerate(parts):
        labels = [
            head.get_targets(
                [scores[layer, image].detach()],
                [boxes[layer, image]],
                [instances[image]],
                [metas[image]],
            )[0][0]
            for image in (0, 1)
        ]
        results = detection_ap_loss(
            torch.cat([scores[layer, 0], scores[layer, 1]]),
            torch.cat(labels),
            [
                Ranking(3.0, per_class=True),
                Ranking(5.0, False, torch.tensor([0] * 12 + [1] * 12), 2),
            ],
            margin=0.2,
            perturb='singly',
        )
        expected = sum(
            weight * values[present].mean()
            for weight, (values, present) in zip((0.7, 0.3), results)
        )
        torch.testing.assert_close(part, expected)
        total = total + expected
    torch.testing.assert_close(gradient, torch.autograd.grad(total, scores)[0])
    # What is reported is the last layer's, as it was ranked.
    for name, (values, present) in zip(('class_ap', 'pooled_ap'), results):
        expected = 1 - values[present].mean().item()
        assert losses[name].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('name', QUERY)
def test_memory_is_refused(name):
    def change(cfg):
        cfg.bbox_head.loss_cls.memory = 3

    with pytest.raises(ValueError, match=f'RaMBO{name}: .* memory=3.* set memory=0'):
        build(QUERY[name], change)


def test_background_column_only_in_detr():
    def change(cfg):
        cfg.bbox_head.loss_cls.scores = 'log_softmax'
        cfg.train_cfg.assigner.match_costs[0] = dict(type='ClassificationCost')

    model = build(QUERY['DETRHead'], change)
    assert model.bbox_head.cls_out_channels == CLASSES + 1
    data = batch(model)
    assert torch.isfinite(model.loss(data['inputs'], data['data_samples'])['loss_cls'])
    for name in set(QUERY) - {'DETRHead'}:
        with pytest.raises(ValueError, match=f'RaMBO{name}: .*background column'):
            build(QUERY[name], change)
