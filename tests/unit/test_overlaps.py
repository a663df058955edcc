"""AP over overlaps: what the heads hand over, what the loss makes of it, box losses."""

import functools

import pytest
import torch

pytest.importorskip('mmdet', reason='the heads are registered in mmdet')
from mmdet.models.utils import unpack_gt_instances
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps, distance2bbox
from torch import nn

from rambo_det import RaMBOLoss
from rambo_det.functional import detection_ap_loss
from tests.helpers.detectors import CLASSES, DENSE, QUERY, batch, build, truth
from tests.unit.test_bbox_heads import build_head, roi_batch

HEAD = 'RaMBOShared2FCBBoxHead'
THRESHOLDS = (0.3, 0.5, 0.7)
PLAIN = dict(margin=0.0, memory=0, loss_weight=1.0)
ROI = dict(
    faster='faster-rcnn_r50_fpn_rambo_1x_voc0712',
    cascade='cascade-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt',
    sparse='sparse-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt',
)


def with_overlaps(cfg, loss='RaMBOLoss'):
    """Set a loss that needs them wherever a detector ranks, in the RPN too."""
    for value in cfg.values() if isinstance(cfg, dict) else cfg:
        if isinstance(value, dict) and value.get('type') == 'RaMBOLoss':
            if loss == 'RaMBOLoss':
                value['overlaps'] = THRESHOLDS
            else:
                value.clear()
                value['type'] = loss
        elif isinstance(value, (dict, list)):
            with_overlaps(value, loss)


with_rank_sort = functools.partial(with_overlaps, loss='RankSortLoss')


def spy_on(loss):
    """Keep the labels, images and overlaps that a loss is called with."""
    calls, forward = [], loss.forward

    def spy(pred, target, *args, images, overlaps, **kwargs):
        labels = target if isinstance(target, torch.Tensor) else target[0]
        calls.append((labels, images[0], overlaps))
        return forward(pred, target, *args, images=images, overlaps=overlaps, **kwargs)

    loss.forward = spy
    return calls


def check(call, boxes, objects, at_least=1):
    """Each foreground row has the IoU of its box with an object of its class.

    Args:
        call: What the loss was called with.
        boxes: The predicted box of each row, (N, 4).
        objects: For each image its boxes and labels.
    """
    labels, images, overlaps = call
    assert overlaps.shape == labels.shape and not overlaps.requires_grad
    rows = (labels < CLASSES).nonzero().flatten().tolist()
    for row in rows:
        truth, classes = objects[int(images[row])]
        ious = bbox_overlaps(boxes[row : row + 1], truth[classes == labels[row]])
        assert (ious - overlaps[row]).abs().min() < 1e-4
    assert len(rows) >= at_least
    assert len({round(float(overlaps[row]), 4) for row in rows}) >= at_least


@pytest.mark.parametrize('name', ROI)
def test_roi_heads(name):
    model = build(ROI[name], with_overlaps)
    heads = model.roi_head.bbox_head
    heads = heads if isinstance(heads, nn.ModuleList) else [heads]
    given = []
    for head in heads:
        calls, compute = spy_on(head.loss_cls), head.loss_and_target

        def spy(cls_score, bbox_pred, *args, _compute=compute, _calls=calls, **kw):
            result = _compute(cls_score, bbox_pred, *args, **kw)
            rois = kw['rois'] if 'rois' in kw else args[0]
            given.append((_calls[-1], bbox_pred, rois, result['bbox_targets'][0]))
            return result

        head.loss_and_target = spy
        if hasattr(head, 'fc_reg') and name != 'sparse':
            nn.init.normal_(head.fc_reg.weight, std=0.5)
    data = batch(model)
    model.loss(data['inputs'], data['data_samples'])
    instances, *_ = unpack_gt_instances(data['data_samples'])
    objects = [(own.bboxes, own.labels) for own in instances]
    assert len(given) == len(heads)
    for head, (call, deltas, rois, labels) in zip(heads, given):
        assert torch.equal(call[0], labels)
        boxes = deltas.detach().reshape(len(labels), -1, 4)
        columns = labels.clamp(max=boxes.size(1) - 1)
        boxes = boxes[torch.arange(len(labels)), columns]
        if isinstance(rois, torch.Tensor):
            boxes = head.bbox_coder.decode(rois[:, 1:], boxes)
        check(call, boxes, objects)


@pytest.mark.parametrize('agnostic', [False, True])
@pytest.mark.parametrize('decoded', [False, True])
@pytest.mark.parametrize(
    'loss', [dict(type='RaMBOLoss', overlaps=THRESHOLDS), dict(type='RankSortLoss')]
)
def test_roi_head_alone(agnostic, decoded, loss):
    """Without sampling results; and where boxes are decoded before the loss."""
    head = build_head(
        HEAD,
        loss,
        reg_class_agnostic=agnostic,
        reg_decoded_bbox=decoded,
        loss_bbox=dict(type='IoULoss' if decoded else 'L1Loss'),
    )
    calls = spy_on(head.loss_cls)
    logits, deltas, rois, labels, weights, targets, box_weights = roi_batch()
    rois[:, 3:] += 1
    deltas = (deltas[:, :4] if agnostic else deltas).detach()
    targets = 0.3 * targets
    truth = head.bbox_coder.decode(rois[:, 1:], targets)
    if decoded:
        targets = truth
    head.loss(logits, deltas, rois, labels, weights, targets, box_weights)
    own = deltas.view(8, -1, 4)
    own = own[torch.arange(8), 0 if agnostic else labels.clamp(max=2)]
    boxes = head.bbox_coder.decode(rois[:, 1:], own)
    expected = bbox_overlaps(boxes, truth, is_aligned=True)
    found, rows = calls[0][2], labels < 3
    torch.testing.assert_close(found[rows], expected[rows], rtol=1e-4, atol=1e-5)


def decoded_rows(head, outputs):
    """The predicted boxes of all rows, level by level, image by image."""
    boxes = []
    sizes = [scores.shape[-2:] for scores in outputs[0]]
    priors = head.prior_generator.grid_priors(sizes, device='cpu')
    for level, (prior, deltas) in enumerate(zip(priors, outputs[1])):
        stride = head.prior_generator.strides[level][0]
        for own in deltas.detach().permute(0, 2, 3, 1):
            kind = type(head).__name__
            if 'GFL' in kind:
                centre = (prior[:, :2] + prior[:, 2:]) / 2
                own = stride * head.integral(own)
                boxes.append(distance2bbox(centre, own.view(-1, 4)))
            elif 'RTM' in kind:
                boxes.append(distance2bbox(prior[:, :2], own.reshape(-1, 4)))
            else:
                boxes.append(head.bbox_coder.decode(prior, own.reshape(-1, 4)))
    return torch.cat(boxes)


@pytest.mark.parametrize(
    'name',
    ['RetinaHead', 'ATSSHead', 'FCOSHead', 'NASFCOSHead', 'GFLHead', 'RTMDetSepBNHead'],
)
def test_dense_heads(name):
    model = build(DENSE[name], with_overlaps)
    head, data = model.bbox_head, batch(model)
    calls = spy_on(head.loss_cls)
    outputs = head(model.extract_feat(data['inputs']))
    # The stock heads give RTMDet's boxes as distances in pixels, FCOS' in strides.
    noise = [0.2 * torch.rand_like(deltas) for deltas in outputs[1]]
    noisy = [deltas + add for deltas, add in zip(outputs[1], noise)]
    outputs = (outputs[0], noisy, *outputs[2:])
    instances, *rest = truth(data)
    head.loss_by_feat(*outputs, instances, *rest)
    if name in ('FCOSHead', 'NASFCOSHead') and head.norm_on_bbox:
        strides = [stride[0] for stride in head.prior_generator.strides]
        scaled = [deltas * s for deltas, s in zip(outputs[1], strides)]
        outputs = (outputs[0], scaled, *outputs[2:])
    objects = [(own.bboxes, own.labels) for own in instances]
    check(calls[0], decoded_rows(head, outputs), objects, at_least=2)


@pytest.mark.parametrize('name', QUERY)
def test_query_heads(name):
    """All parts that predict boxes; each query's, in pixels, with the matched one."""
    model = build(QUERY[name], with_overlaps)
    head, data = model.bbox_head, batch(model)
    calls, predicted = spy_on(head.loss_cls), []
    for method in ('loss_by_feat_single', '_loss_dn_single'):
        compute = getattr(head, method, None)

        def spy(scores, boxes, *args, _compute=compute, **kwargs):
            sizes = [size[::-1] * 2 for size in ((64, 96), (80, 64))]
            boxes_in_pixels = bbox_cxcywh_to_xyxy(boxes.detach()) * torch.tensor(
                sizes
            ).unsqueeze(1)
            predicted.append(boxes_in_pixels.view(-1, 4))
            return _compute(scores, boxes, *args, **kwargs)

        setattr(head, method, spy)
    model.loss(data['inputs'], data['data_samples'])
    instances, *_ = unpack_gt_instances(data['data_samples'])
    objects = [(own.bboxes, own.labels) for own in instances]
    assert len(calls) == len(predicted) > 1
    for call, boxes in zip(calls, predicted):
        check(call, boxes, objects)


def test_rpn_and_its_proposals():
    model = build('faster-rcnn_r50_fpn_rambo-rpn_1x_voc0712', with_overlaps)
    calls = spy_on(model.rpn_head.loss_cls)
    data = batch(model)
    model.loss(data['inputs'], data['data_samples'])
    ((labels, _, overlaps),) = calls
    assert overlaps.shape == labels.shape
    assert 0 < overlaps[labels == 0].max() <= 1


# The loss


def rows(count=40, classes=3):
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(count, classes, generator=generator)
    labels = torch.randint(0, classes + 1, (count,), generator=generator)
    return pred, labels, torch.rand(count, generator=generator)


@pytest.mark.parametrize('weights', ['equal', 'positives'])
def test_the_loss_is_a_mean_over_thresholds(weights):
    """A row is a positive at thresholds up to its overlap, that included."""
    pred, labels, overlaps = rows()
    overlaps[:5] = 0.5
    loss_cls = RaMBOLoss(overlaps=THRESHOLDS, overlap_weights=weights, **PLAIN)
    found = loss_cls(pred, labels, overlaps=overlaps)
    expected = 0.0
    for term in loss_cls.terms:
        ranking = [loss_cls._ranking(term, type('Rows', (), dict(labels=labels)))]
        ((_, present),) = detection_ap_loss(pred, labels, ranking)
        for threshold in THRESHOLDS:
            reached = labels.masked_fill(overlaps < threshold, 3)
            ((own, _),) = detection_ap_loss(pred, reached, ranking)
            if weights == 'positives':
                count = torch.stack([labels.bincount(minlength=4)[:3]])
                some = torch.stack([reached.bincount(minlength=4)[:3]])
                if not term.per_class:
                    count, some = count.sum(1), some.sum(1)
                own = own * (some / count).view(-1)
            expected += own.sum() / present.sum() / len(THRESHOLDS)
    torch.testing.assert_close(found, expected)
    assert sum(1 - ap for ap in loss_cls.get_accuracy().values()) == pytest.approx(
        float(found), rel=1e-5
    )


def test_a_threshold_of_zero_is_reached_by_all():
    pred, labels, overlaps = rows()
    plain = RaMBOLoss(**PLAIN)(pred, labels)
    same = RaMBOLoss(overlaps=[0], **PLAIN)(pred, labels, overlaps=0 * overlaps)
    assert (
        same
        == plain
        != RaMBOLoss(overlaps=[0.5], **PLAIN)(pred, labels, overlaps=overlaps)
    )


def test_the_quality_of_a_target_is_the_overlap():
    pred, labels, overlaps = rows()
    loss_cls = RaMBOLoss(overlaps=THRESHOLDS, **PLAIN)
    expected = loss_cls(pred, labels, overlaps=overlaps)
    assert loss_cls(pred, (labels, overlaps)) == expected


def test_the_memory_keeps_what_rows_reach():
    settings = {**PLAIN, 'memory': 2, 'class_ap': dict(span='memory')}
    running, resumed, whole, plain = (
        RaMBOLoss(**settings, overlaps=x) for x in (*3 * (THRESHOLDS,), None)
    )
    steps = [rows(count) for count in (20, 30, 25)]
    for pred, labels, overlaps in steps[:2]:
        running(pred, labels, overlaps=overlaps)
        plain(pred, labels)
    assert set(plain.state_dict()['_extra_state']) == {'scores', 'labels'}
    state = running.state_dict()
    assert [len(of) for of in state['_extra_state']['levels']] == [20, 30]
    resumed.load_state_dict(state)
    pred, labels, overlaps = steps[2]
    losses = [of(pred, labels, overlaps=overlaps) for of in (running, resumed)]
    assert losses[0] == losses[1]
    # The class-wise term ranks all rows as if they were of one step.
    whole.terms = running.terms[:1]
    both = whole(
        *(torch.cat(x) for x in list(zip(*steps))[:2]),
        overlaps=torch.cat(list(zip(*steps))[2]),
    )
    ap = running.get_accuracy()['class_ap']
    torch.testing.assert_close(ap, 1 - both)
    # A memory from a training without overlaps, and the other way round.
    resumed.load_state_dict(plain.state_dict())
    plain.load_state_dict(state)
    assert torch.isfinite(resumed(pred, labels, overlaps=overlaps))
    assert torch.isfinite(plain(pred, labels))


def stock(loss):
    return build_head('Shared2FCBBoxHead', loss).loss(*roi_batch())


def call(overlaps):
    pred, labels, _ = rows()
    return RaMBOLoss(overlaps=THRESHOLDS)(pred, labels, overlaps=overlaps)


def other_coder():
    model = build(DENSE['RetinaHead'], with_overlaps)
    model.bbox_head.bbox_coder.add_ctr_clamp = True
    data = batch(model)
    return model.loss(data['inputs'], data['data_samples'])


@pytest.mark.parametrize(
    ('make', 'error', 'match'),
    [
        (lambda: RaMBOLoss(overlaps=0.5), TypeError, 'a tuple of IoU thresholds'),
        (lambda: RaMBOLoss(overlaps=()), TypeError, 'a tuple of IoU thresholds'),
        (lambda: RaMBOLoss(overlaps=('a',)), TypeError, "overlaps.*number, got 'a'"),
        (lambda: RaMBOLoss(overlaps=(0.6, 0.5)), ValueError, 'ascending'),
        (lambda: RaMBOLoss(overlaps=(0.5, 50)), ValueError, r'in \[0, 1\], got'),
        (lambda: RaMBOLoss(overlap_weights='x'), ValueError, "'equal' or 'positives'"),
        (
            lambda: stock(dict(type='RaMBOLoss', overlaps=THRESHOLDS)),
            RuntimeError,
            'RaMBOLoss.*type=RaMBOShared2FCBBoxHead, or overlaps=None',
        ),
        (
            lambda: stock(dict(type='RankSortLoss')),
            RuntimeError,
            'RankSortLoss.*type=RaMBOShared2FCBBoxHead, or APLoss',
        ),
        (lambda: call(None), RuntimeError, 'gives overlaps='),
        (lambda: call(torch.zeros(3)), ValueError, r'shape \(40,\).*got \(3,\)'),
        (lambda: call(torch.zeros(40).long()), TypeError, 'torch.int64'),
        (other_coder, ValueError, 'RetinaHead.*DeltaXYWHBBoxCoder'),
        (lambda: build(DENSE['DDODHead'], with_overlaps), ValueError, 'RaMBODDODHead'),
        (lambda: build(DENSE['YOLOFHead'], with_overlaps), ValueError, 'no box'),
        (lambda: build(DENSE['YOLOFHead'], with_rank_sort), ValueError, 'or APLoss'),
    ],
)
def test_what_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


# The average of the box loss


@pytest.mark.parametrize(
    'kind, columns',
    [('RaMBOLoss', 3), ('APLoss', 3), ('RoIFocalLoss', 3), ('CrossEntropyLoss', 4)],
)
def test_box_losses_divided_by_the_positives(kind, columns, recwarn):
    torch.manual_seed(0)
    found = []
    for box_avg, labels in (('rows', None), ('positives', None), ('positives', 3)):
        head = build_head(HEAD, dict(type=kind), box_avg=box_avg)
        _, *given = roi_batch()
        given[2] = given[2] if labels is None else torch.full_like(given[2], labels)
        logits = torch.randn(8, columns)
        found.append(head.loss(logits, *given)['loss_bbox'])
    positives = int((roi_batch()[3] < 3).sum())
    torch.testing.assert_close(found[1], found[0] * 8 / positives)
    assert positives < 8 and found[0] > 0 and found[2] == 0
    warned = [w for w in recwarn if 'the stock head would do' in str(w.message)]
    assert len(warned) == (kind not in ('RaMBOLoss', 'APLoss'))
    with pytest.raises(ValueError, match="box_avg must be 'rows' or 'positives'"):
        build_head(HEAD, dict(type=kind), box_avg='all')
