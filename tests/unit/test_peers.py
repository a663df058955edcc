"""The losses of other papers: their definitions by loops, and in the heads of mmdet."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip('mmdet', reason='the losses are registered in mmdet')
from mmdet.registry import MODELS

import rambo_det
from rambo_det.functional import peers
from rambo_det.losses import RankingLoss
from tests.helpers.detectors import CLASSES, DENSE, QUERY, batch, build, record_calls

NAMES = ['APLoss', 'BucketedAPLoss', 'RankSortLoss', 'BucketedRankSortLoss']
SORTS = [name for name in NAMES if 'Sort' in name]
FASTER = 'faster-rcnn_r50_fpn_rambo_1x_voc0712'
CASCADE = 'cascade-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt'
SPARSE = 'sparse-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt'


# The definitions


def step(x, delta):
    """The smoothed Heaviside function H of AP Loss and RS Loss."""
    if delta and abs(x) <= delta:
        return x / (2 * delta) + 0.5
    return float(x >= 0)


def ap_by_pairs(scores, positives, negatives, delta, interpolate=True, own=1.0):
    """Chen et al.: L_ij, the interpolated precision, and the error-driven update."""
    expected, gradient, highest = 0.0, [0.0] * len(scores), 0.0
    for i in sorted(positives, key=lambda i: scores[i]):
        h = {j: step(scores[j] - scores[i], delta) for j in positives + negatives}
        rank = own + sum(value for j, value in h.items() if j != i)
        precision = 1 - sum(h[j] / rank for j in negatives)
        highest = max(highest, precision) if interpolate else precision
        scale = (1 - highest) / (1 - precision) if precision < 1 else 0.0
        for j in negatives:
            error = h[j] / rank * scale / len(positives)
            expected += error
            gradient[i] -= error
            gradient[j] += error
    return expected, gradient


def rank_sort_by_pairs(scores, positives, negatives, delta, quality):
    """Oksuz et al.: ranking and sorting errors, spread by their primary terms."""
    quality = dict(zip(positives, quality))
    expected, gradient = 0.0, [0.0] * len(scores)
    for i in positives:
        h = {j: step(scores[j] - scores[i], delta) for j in positives + negatives}
        false = sum(h[j] for j in negatives)
        place = sum(h[j] for j in positives)
        ranking = false / (place + false)
        right = [j for j in positives if quality[j] >= quality[i]]
        wrong = {j: h[j] for j in positives if quality[j] < quality[i]}
        now = sum(h[j] * (1 - quality[j]) for j in positives) / place
        goal = sum(h[j] * (1 - quality[j]) for j in right) / sum(h[j] for j in right)
        shares = [({j: h[j] for j in negatives}, ranking), (wrong, now - goal)]
        for causes, error in shares:
            expected += error / len(positives)
            total = sum(causes.values())
            for j, part in causes.items():
                if total > 0:
                    gradient[j] += part / total * error / len(positives)
                    gradient[i] -= part / total * error / len(positives)
    return expected, gradient


def in_buckets(scores, positives, negatives, delta):
    """Yavuz et al.: the negatives between two positives get their mean score."""
    lowest, buckets, moved = min(scores[i] for i in positives), {}, list(scores)
    for j in negatives:
        if scores[j] >= lowest - delta:
            before = sum(scores[i] > scores[j] for i in positives)
            buckets.setdefault(before, []).append(j)
    for bucket in buckets.values():
        for j in bucket:
            moved[j] = sum(scores[k] for k in bucket) / len(bucket)
    return moved


def reference(name, pred, labels, quality, delta):
    """The loss and its gradient (N, C), by loops over pairs."""
    classes, scores = pred.size(1), pred.detach().double().flatten().tolist()
    rows = [row for row, label in enumerate(labels.tolist()) if label < classes]
    positives = [row * classes + labels[row].item() for row in rows]
    if not positives:
        return 0.0, torch.zeros_like(pred)
    negatives = [j for j in range(len(scores)) if j not in positives]
    if name.startswith('Bucketed'):
        scores = in_buckets(scores, positives, negatives, delta)
    parts = scores, positives, negatives, delta
    if name in SORTS:
        loss, gradient = rank_sort_by_pairs(*parts, quality[rows].tolist())
    elif name == 'APLoss':
        loss, gradient = ap_by_pairs(*parts)
    else:
        loss, gradient = ap_by_pairs(*parts, interpolate=False, own=step(0, delta))
    return loss, torch.tensor(gradient, dtype=torch.float64).view_as(pred).to(pred)


# Some differ by exactly δ, some by less than rounding, some are far apart.
GRID = st.integers(-8, 8).map(lambda n: n / 4)
REAL = st.floats(-6, 6, width=32)
SCORES = {'grid': GRID, 'real': REAL, 'far': st.sampled_from([-1e9, -50.0, 0, 1, 1e9])}


@st.composite
def batches(draw):
    """Logits with ties, labels and qualities, with any number of positives."""
    rows, classes = draw(st.integers(0, 9)), draw(st.integers(1, 3))
    kind = SCORES[draw(st.sampled_from(sorted(SCORES)))]
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))

    def tensor(values, count, dtype=dtype):
        found = draw(st.lists(values, min_size=count, max_size=count))
        return torch.tensor(found, dtype=dtype)

    pred = tensor(kind, rows * classes).view(rows, classes).requires_grad_()
    labels = tensor(st.integers(0, classes), rows, torch.long)
    quality = tensor(st.sampled_from([0.0, 0.3, 0.5, 0.51, 0.9, 1.0]), rows)
    return pred, labels, quality


@pytest.mark.parametrize('name', NAMES)
@given(drawn=batches(), delta=st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]))
def test_loss_and_gradient_are_the_definition(name, drawn, delta):
    pred, labels, quality = drawn
    loss_cls = MODELS.build(dict(type=name, delta=delta, loss_weight=0.5))
    target = (labels, quality) if name in SORTS else labels
    loss = loss_cls(pred, target)
    (3 * loss).backward()  # an incoming gradient other than 1
    expected, gradient = reference(name, pred, labels, quality, delta)
    tolerance = 1e-12 if pred.dtype == torch.float64 else 2e-6
    assert loss.dtype == pred.dtype and loss.shape == ()
    assert loss.item() == pytest.approx(0.5 * expected, rel=0, abs=tolerance)
    torch.testing.assert_close(pred.grad, 1.5 * gradient, rtol=0, atol=3 * tolerance)


@given(drawn=batches())
def test_without_a_soft_step_bucketing_changes_no_gradient(drawn):
    """Theorem 4.1 of Yavuz et al., for RS Loss and scores without ties."""
    pred, labels, quality = drawn
    order = pred.detach().flatten().sort(stable=True).indices.argsort()
    pred = order.view_as(pred).double().requires_grad_()
    losses = [MODELS.build(dict(type=name, delta=0.0)) for name in SORTS]
    plain, bucketed = (
        torch.autograd.grad(loss(pred, (labels, quality)), pred)[0] for loss in losses
    )
    torch.testing.assert_close(bucketed, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', NAMES)
def test_many_positives_are_compared_in_parts(name, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(40, 2, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 3, (40,), generator=generator)
    quality = torch.rand(40, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(peers, '_PAIRS', 100)
    loss_cls = MODELS.build(dict(type=name))
    loss = loss_cls(pred, (labels, quality) if name in SORTS else labels)
    loss.backward()
    expected, gradient = reference(name, pred, labels, quality, loss_cls.delta)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(pred.grad, gradient, rtol=0, atol=1e-12)


# What mmdet's heads ask for


def rows(count=8, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(count, classes, generator=generator)
    labels = torch.arange(count) % (classes + 1)
    return pred.requires_grad_(), labels, torch.rand(count, generator=generator)


def call(name, pred, labels, quality, *args, **kwargs):
    loss_cls = MODELS.build(dict(type=name))
    return loss_cls(
        pred, (labels, quality) if name in SORTS else labels, *args, **kwargs
    )


@pytest.mark.parametrize('name', NAMES)
def test_registered_by_importing_the_package_alone(name):
    assert MODELS.get(name) is getattr(rambo_det, name)
    loss_cls = MODELS.build(dict(type=name))
    assert isinstance(loss_cls, RankingLoss) and loss_cls.use_sigmoid
    assert 'delta=' in repr(loss_cls)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_rows_of_weight_0_are_ignored(name, bad):
    """Whatever they hold; and the factor that mmdet averages by is."""
    pred, labels, quality = rows()
    weight = torch.tensor([1.0, 1, 0, 1, 2, 0, 1, 1])
    kept = weight > 0
    spoiled = pred.detach().masked_fill(~kept.unsqueeze(1), bad).requires_grad_()
    odd = labels.masked_fill(~kept, 99), quality.masked_fill(~kept, bad)
    loss = call(name, spoiled, *odd, weight, avg_factor=77.0)
    loss.backward()
    expected = call(name, pred[kept], labels[kept], quality[kept])
    assert loss == expected > 0
    expected.backward()
    assert torch.equal(spoiled.grad, pred.grad)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('count', [0, 5])
def test_a_batch_without_objects_has_loss_0_and_zero_gradient(name, count):
    pred = torch.full((count, 3), -math.inf).requires_grad_()
    none = torch.full((count,), 3), torch.zeros(count)
    for weight in (None, torch.zeros(count)):
        loss = call(name, pred, *none, weight)
        (gradient,) = torch.autograd.grad(loss, pred)
        assert loss == 0 and not gradient.any()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_ranked_in_float32(name, dtype):
    pred, *rest = rows(40)
    pred = pred.detach().to(dtype).requires_grad_()
    full = pred.detach().float().requires_grad_()
    loss, expected = call(name, pred, *rest), call(name, full, *rest)
    assert loss.dtype == torch.float32 and loss == expected
    loss.backward()
    expected.backward()
    assert torch.equal(pred.grad, full.grad.to(dtype)) and pred.grad.any()


def test_infinite_logits_have_a_finite_loss():
    pred, *rest = rows()
    pred.data[0], pred.data[1], pred.data[4, 2] = math.inf, -math.inf, math.inf
    for name in NAMES:
        loss = call(name, pred, *rest)
        (gradient,) = torch.autograd.grad(loss, pred)
        assert 0 < loss < 2 and torch.isfinite(gradient).all()


PRED, LABELS, QUALITY = torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), torch.ones(4)
BAD = {
    'unknown argument': (dict(gamma=2.0), {}, TypeError, "'gamma'.*_delete_=True"),
    'softmax': (dict(use_sigmoid=False), {}, ValueError, 'must be True.*_delete_=True'),
    'delta': (dict(delta=-1), {}, ValueError, 'delta must be a finite non-negative'),
    'weight': (dict(loss_weight='1'), {}, TypeError, 'loss_weight must be'),
    'shape': ({}, dict(pred=PRED[None]), ValueError, r'pred must have shape \(N, C\)'),
    'integers': ({}, dict(pred=LABELS), TypeError, 'pred must be floating point'),
    'NaN': ({}, dict(pred=PRED * math.nan), ValueError, r'contains NaN \(12 of 12'),
    'label': ({}, dict(labels=LABELS + 1), ValueError, r'labels 0..C-1 .* got \[4\]'),
    'objects': ({}, dict(objects=LABELS), ValueError, 'an object .* has label 3'),
    'per row': ({}, dict(reduction_override='none'), ValueError, 'no loss per row'),
}


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_named(name, case):
    arguments, given, error, match = BAD[case]
    given = dict(dict(pred=PRED, labels=LABELS), **given)
    pred, labels = given.pop('pred'), given.pop('labels')
    with pytest.raises(error, match=f'^{name}: .*{match}'):
        loss_cls = MODELS.build(dict(type=name, **arguments))
        loss_cls(pred, (labels, QUALITY) if name in SORTS else labels, **given)


@pytest.mark.parametrize('name', SORTS)
@pytest.mark.parametrize(
    'target, error, match',
    [
        (LABELS, TypeError, 'target must be .labels, quality., got labels alone'),
        (
            (LABELS, LABELS),
            TypeError,
            'quality must be floating point, got torch.int64',
        ),
        (
            (LABELS, QUALITY[:3]),
            ValueError,
            r'quality must have shape \(4,\).*got \(3,',
        ),
        (
            (LABELS, QUALITY * math.nan),
            ValueError,
            'quality must be an overlap in .0, 1., got nan',
        ),
        (
            (LABELS, QUALITY * 2),
            ValueError,
            'quality must be an overlap in .0, 1., got 2 to 2',
        ),
    ],
)
def test_a_bad_quality_is_named(name, target, error, match):
    with pytest.raises(error, match=f'^{name}: {match}'):
        MODELS.build(dict(type=name))(PRED, target)


# In the heads: one word of the config changes


def switch(name):
    """Put another loss wherever the detector ranks."""

    def change(cfg):
        heads = [cfg.get('bbox_head') or cfg.roi_head.bbox_head, cfg.get('rpn_head')]
        for head in heads[0] if isinstance(heads[0], list) else heads:
            if head is not None and head.type.startswith('RaMBO'):
                head.loss_cls = dict(type=name)

    return change


def train_step(model, data):
    losses = model.loss(data['inputs'], data['data_samples'])
    total, logs = model.parse_losses(losses)
    total.backward()
    assert all(torch.isfinite(torch.as_tensor(value)) for value in logs.values())
    return logs


RANKED = [
    *[(FASTER, name) for name in [*NAMES, 'RoIFocalLoss']],
    *[(DENSE['RetinaHead'], name) for name in NAMES],
    *[(DENSE[h], 'RankSortLoss') for h in ('ATSSHead', 'GFLHead', 'RTMDetSepBNHead')],
    *[(DENSE[h], 'APLoss') for h in ('FCOSHead', 'YOLOFHead')],
    *[(name, 'APLoss') for name in (SPARSE, QUERY['DeformableDETRHead'])],
    (CASCADE, 'RankSortLoss'),
    ('faster-rcnn_r50_fpn_rambo-rpn_1x_voc0712', 'RankSortLoss'),
]


@pytest.mark.parametrize('detector, name', RANKED)
@pytest.mark.filterwarnings('ignore:.*so that nothing is ranked')
def test_a_detector_trains_and_predicts(detector, name):
    model = build(detector, switch(name))
    heads = [m for m in model.modules() if isinstance(m, MODELS.get(name))]
    calls = [record_calls(head) for head in heads] if name in NAMES else []
    data = batch(model)
    logs = train_step(model, data)
    found = [key for key in logs if key.endswith('loss_cls') or 'rpn_cls' in key]
    assert found and all(logs[key] > 0 for key in found)
    for own in calls:
        assert all(images is not None for *_, images in own) and own
    model.eval()
    with torch.no_grad():
        for result in model.predict(data['inputs'], data['data_samples']):
            labels = result.pred_instances.labels
            assert ((labels >= 0) & (labels < CLASSES)).all()


@pytest.mark.parametrize('detector', [FASTER, DENSE['RetinaHead']])
@pytest.mark.parametrize('name', ['APLoss', 'RankSortLoss'])
def test_images_without_objects_train(detector, name):
    model = build(detector, switch(name))
    logs = train_step(model, batch(model, objects=[0, 0]))
    assert logs['loss_cls'] == 0


@pytest.mark.parametrize('head', ['FCOSHead', 'DDODHead'])
def test_heads_that_do_not_tell_the_overlap_are_named(head):
    model = build(DENSE[head], switch('RankSortLoss'))
    data = batch(model)
    with pytest.raises(TypeError, match='got labels alone.*with others use APLoss'):
        model.loss(data['inputs'], data['data_samples'])


def test_a_stock_head_that_ranks_levels_is_refused():
    def change(cfg):
        cfg.bbox_head.update(type='RetinaHead', loss_cls=dict(type='APLoss'))
        cfg.bbox_head.loss_cls.use_sigmoid = True

    model = build(DENSE['RetinaHead'], change)
    data = batch(model)
    with pytest.raises(RuntimeError, match='^APLoss: RetinaHead called .* per pyramid'):
        model.loss(data['inputs'], data['data_samples'])


# The overlap of each box


def iou(a, b):
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    both = (high - low).clamp(min=0).prod()
    return both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


@pytest.mark.parametrize('decoded', [False, True])
@pytest.mark.parametrize('agnostic', [False, True])
def test_roi_heads_tell_the_overlap_of_each_box(decoded, agnostic):
    head = MODELS.build(
        dict(
            type='RaMBOShared2FCBBoxHead',
            in_channels=2,
            fc_out_channels=8,
            roi_feat_size=2,
            num_classes=3,
            reg_class_agnostic=agnostic,
            reg_decoded_bbox=decoded,
            loss_cls=dict(type='RankSortLoss', loss_weight=2.0),
            loss_bbox=dict(type='L1Loss'),
        )
    )
    rois = torch.tensor([[0.0, 10, 10, 30, 40]] * 6)
    labels = torch.tensor([0, 3, 2, 3, 1, 0])
    weights = torch.tensor([1.0, 1, 1, 1, 1, 0])  # the last one is ignored
    decode, targets = head.bbox_coder.decode, torch.randn(6, 4) / 4
    boxes = decode(rois[:, 1:], targets)
    cls_score, bbox_pred = head(torch.randn(6, 2, 2, 2))
    bbox_pred.data.normal_().div_(4)
    quality = torch.zeros(6)
    for row in (0, 2, 4, 5):
        at = 0 if agnostic else 4 * labels[row]
        found = decode(rois[row : row + 1, 1:], bbox_pred[row : row + 1, at : at + 4])
        quality[row] = iou(found[0], boxes[row])
    given = boxes if decoded else targets
    losses = head.loss(
        cls_score, bbox_pred, rois, labels, weights, given, torch.ones(6, 4)
    )
    expected = 2 * peers.rank_sort_loss(cls_score[:5], labels[:5], quality[[0, 2, 4]])
    torch.testing.assert_close(losses['loss_cls'], expected)
    other = peers.rank_sort_loss(cls_score[:5], labels[:5], 1 - quality[[0, 2, 4]])
    assert losses['loss_cls'] != 2 * other


@pytest.mark.parametrize('name', ['RetinaHead', 'ATSSHead'])
def test_dense_heads_tell_the_overlap_of_each_box(name):
    head = build(DENSE[name], switch('RankSortLoss')).bbox_head
    count, height, width, images = head.num_base_priors, 2, 3, 2
    anchors = torch.rand(images, height * width * count, 4) * 20
    anchors[..., 2:] += anchors[..., :2] + 5
    deltas = torch.randn(images, 4 * count, height, width) / 4
    scores = torch.randn(images, CLASSES * count, height, width)
    labels = torch.randint(0, CLASSES + 1, anchors.shape[:2])
    ones, targets = torch.ones_like(anchors), torch.randn_like(anchors) / 4
    decode = head.bbox_coder.decode
    truth = decode(anchors.view(-1, 4), targets.view(-1, 4)).view_as(anchors)
    given = dict(cls_score=scores, bbox_pred=deltas, anchors=anchors, labels=labels)
    given.update(label_weights=ones[..., 0], avg_factor=1.0)
    if name == 'ATSSHead':  # regresses to boxes, the other to deltas
        centerness = torch.zeros(images, count, height, width)
        given.update(bbox_targets=truth, centerness=centerness)
    else:
        given.update(bbox_targets=targets, bbox_weights=ones)
    with head.recorded_calls() as calls:
        head.loss_by_feat_single(**given)
    ((_, (told, quality), *_),) = calls
    assert torch.equal(told, labels.flatten())
    expected = torch.zeros_like(labels, dtype=torch.float)
    for image, row in (labels < CLASSES).nonzero().tolist():
        place, which = divmod(row, count)
        y, x = divmod(place, width)
        delta = deltas[image, 4 * which : 4 * which + 4, y, x]
        box = decode(anchors[image, row][None], delta[None])[0]
        expected[image, row] = iou(box, truth[image, row])
    torch.testing.assert_close(quality, expected.flatten())
    assert quality.max() > 0.5


def test_focal_loss_of_roi_heads_is_the_mean_over_the_positives():
    loss_cls = MODELS.build(
        dict(type='RoIFocalLoss', use_sigmoid=True, loss_weight=2.0)
    )
    pred, labels, _ = rows(6)
    weight = torch.tensor([1.0, 1, 1, 1, 1, 0])
    probs, total = pred.sigmoid(), 0.0
    for row, label in enumerate(labels[:5].tolist()):
        for column in range(3):
            p = probs[row, column]
            total -= (
                0.25 * (1 - p) ** 2 * p.log()
                if column == label
                else 0.75 * p**2 * (1 - p).log()
            )
    count = (labels[:5] < 3).sum()
    loss = loss_cls(pred, labels, weight, avg_factor=77.0, reduction_override=None)
    torch.testing.assert_close(loss, 2 * total / count)
    assert loss_cls.get_cls_channels(3) == 3
    assert loss_cls.get_activation(pred).shape == (6, 4)
