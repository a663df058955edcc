"""Dense heads: rows, images, and the loss of one direct call on the whole image."""

import copy
import pickle

import pytest
import torch

pytest.importorskip('mmdet', reason='the heads are registered in mmdet')
from mmdet.registry import MODELS

from rambo_det import RaMBOLoss
from rambo_det.functional import Ranking, detection_ap_loss
from tests.helpers import detectors
from tests.helpers.detectors import (
    CLASSES,
    DENSE,
    batch,
    build,
    record_calls,
    train_and_predict,
    truth,
)

FASTER = 'faster-rcnn_r50_fpn_rambo-rpn_1x_voc0712'
# No noise, so that two calculations see the same scores.
EXACT = dict(
    perturb='together',
    margin_noise=False,
    margin=0.2,
    lambd=3.0,
    loss_weight=1.0,
    class_ap=dict(weight=0.7, span='batch'),
    pooled_ap=dict(weight=0.3, span='image', lambd=5.0),
)


def set_loss(**kwargs):
    def change(cfg):
        cfg.bbox_head.loss_cls.update(kwargs)

    return change


def direct(rows, labels):
    """The loss of EXACT by one direct call; a list of rows and labels per image."""
    groups = torch.cat([torch.full((len(r),), i) for i, r in enumerate(rows)])
    (per_class, present), (pooled, with_positive) = detection_ap_loss(
        torch.cat(rows),
        torch.cat(labels),
        [
            Ranking(3.0, per_class=True),
            Ranking(5.0, per_class=False, groups=groups, num_groups=len(rows)),
        ],
        margin=0.2,
    )
    assert present.any() and with_positive.any()
    return 0.7 * per_class[present].mean() + 0.3 * pooled[with_positive].mean()


def rows_of_image(cls_scores, image, columns):
    """All rows of an image, level by level, position by position."""
    return torch.cat(
        [level[image].permute(1, 2, 0).reshape(-1, columns) for level in cls_scores]
    )


def predictions(model, data):
    """What the head predicts, the class scores as leaves that spread like trained."""
    head = model.bbox_head
    outs = head(model.extract_feat(data['inputs']))
    scores = [torch.randn_like(s).requires_grad_() for s in outs[0]]
    return scores, [part for part in outs[1:]]


@pytest.mark.parametrize('name', DENSE)
def test_images_of_rows(name):
    """Every score is the number of its image, so rows tell where they are from."""
    model = build(DENSE[name])
    head, data = model.bbox_head, batch(model)
    assert type(head).__name__ == f'RaMBO{name}'
    calls = record_calls(head.loss_cls)
    scores, rest = predictions(model, data)
    number = [
        torch.arange(2.0).view(2, 1, 1, 1).expand_as(s).clone().requires_grad_()
        for s in scores
    ]
    losses = head.loss_by_feat(number, *rest, *truth(data))
    ((pred, _, _, (index, num_images)),) = calls  # once for all levels
    assert num_images == 2
    assert torch.equal(pred[:, 0].long(), index)
    assert len(pred) == sum(level.numel() for level in number) // CLASSES
    assert losses['loss_cls'].shape == ()
    assert {'class_ap', 'pooled_ap'} <= set(losses)


@pytest.mark.parametrize('name', DENSE)
def test_detector_trains_and_predicts_the_classes_alone(name):
    def change(cfg):
        cfg.test_cfg.score_thr = 0.0
        if 'exp_on_reg' in cfg.bbox_head:  # no boxes of negative size
            cfg.bbox_head.exp_on_reg = True

    assert train_and_predict(build(DENSE[name], change))['loss_cls'] > 0


@pytest.mark.parametrize('name', ['RetinaHead', 'FCOSHead'])
def test_a_dense_head_is_one_direct_call(name):
    model = build(DENSE[name], set_loss(**EXACT))
    head, data = model.bbox_head, batch(model)
    scores, rest = predictions(model, data)
    losses = head.loss_by_feat(scores, *rest, *truth(data))
    gradients = torch.autograd.grad(losses['loss_cls'], scores)

    instances, metas, ignored = truth(data)
    sizes, labels = [s.shape[-2:] for s in scores], []
    # One image at a time: then the stock head's targets have no images to mix.
    for image in (0, 1):
        if name == 'RetinaHead':
            anchors, valid = head.get_anchors(sizes, metas[image : image + 1], 'cpu')
            given = anchors, valid, instances[image : image + 1], metas[image:][:1]
            found, weights, *_ = head.get_targets(*given, ignored[image:][:1])
            found = [own.masked_fill(w == 0, -1) for own, w in zip(found, weights)]
            labels.append(torch.cat([level[0] for level in found]))
        else:
            points = head.prior_generator.grid_priors(sizes, device='cpu')
            found = head.get_targets(points, [instances[image]])[0]
            labels.append(torch.cat(found))
    expected = direct([rows_of_image(scores, i, CLASSES) for i in (0, 1)], labels)
    torch.testing.assert_close(losses['loss_cls'], expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, scores))


def test_faster_rcnn_with_a_ranked_rpn_is_two_direct_calls():
    def change(cfg):
        cfg.rpn_head.loss_cls.update(EXACT)
        cfg.roi_head.bbox_head.loss_cls = dict(type='RaMBOLoss', **EXACT, memory=0)

    model = build(FASTER, change)
    data = batch(model)
    rpn, roi = model.rpn_head, model.roi_head.bbox_head
    seen = {}

    def keep(head, method, name):
        stock = getattr(head, method)

        def spy(*args, **kwargs):
            seen[name] = args, kwargs
            return stock(*args, **kwargs)

        setattr(head, method, spy)

    keep(rpn, 'loss_by_feat', 'rpn')
    keep(roi, 'loss', 'roi')
    stock = rpn.get_targets

    def targets(*args, **kwargs):
        seen['labels'] = stock(*args, **kwargs)
        return seen['labels']

    rpn.get_targets = targets
    torch.manual_seed(0)
    losses = model.loss(data['inputs'], data['data_samples'])
    weights = [rpn.rpn_cls.weight, roi.fc_cls.weight]
    total = losses['loss_rpn_cls'] + losses['loss_cls']
    gradients = torch.autograd.grad(total, weights, retain_graph=True)

    scores = seen['rpn'][0][0]
    labels, kept = seen['labels'][:2]
    kept = [lab.masked_fill(w == 0, -1) for lab, w in zip(labels, kept)]
    first = direct(
        [rows_of_image(scores, image, 1) for image in (0, 1)],
        [torch.cat([level[image] for level in kept]) for image in (0, 1)],
    )
    cls_score, _, rois, labels, *_ = seen['roi'][0]
    of_image = [rois[:, 0] == image for image in (0, 1)]
    second = direct([cls_score[i] for i in of_image], [labels[i] for i in of_image])
    torch.testing.assert_close(losses['loss_rpn_cls'], first)
    torch.testing.assert_close(losses['loss_cls'], second)
    expected = torch.autograd.grad(first + second, weights)
    for a, b in zip(gradients, expected):
        torch.testing.assert_close(a, b)
    assert {'rpn_class_ap', 'class_ap'} <= set(losses)


def test_rows_that_do_not_fit_the_levels_are_refused():
    model = build(DENSE['RetinaHead'])
    data = batch(model)
    scores, rest = predictions(model, data)
    stock = model.bbox_head.loss_by_feat_single

    def twice(*args, **kwargs):
        stock(*args, **kwargs)
        return stock(*args, **kwargs)

    model.bbox_head.loss_by_feat_single = twice
    with pytest.raises(ValueError, match=r'RaMBORetinaHead: .* rows, but its levels'):
        model.bbox_head.loss_by_feat(scores, *rest, *truth(data))


# What the config leaves open


@pytest.mark.parametrize('name', DENSE)
def test_defaults_of_dense_heads(name):
    cfg = detectors.model_config(DENSE[name])
    cfg.bbox_head.loss_cls = dict(type='mmdet.RaMBOLoss')
    loss_cls = MODELS.build(cfg).bbox_head.loss_cls
    found = loss_cls.scores, loss_cls.memory, loss_cls.use_sigmoid
    assert found == ('logits', 0, True)


@pytest.mark.parametrize('name', ['RetinaHead', 'ATSSHead', 'FCOSHead', 'NASFCOSHead'])
def test_background_column_where_the_stock_head_has_one(name):
    model = build(DENSE[name], set_loss(scores='log_softmax'))
    assert model.bbox_head.cls_out_channels == CLASSES + 1
    model.test_cfg.score_thr = 0.0
    assert train_and_predict(model)['loss_cls'] > 0


@pytest.mark.parametrize(
    'name', ['YOLOFHead', 'GFLHead', 'RTMDetSepBNHead', 'DDODHead']
)
def test_background_column_is_refused_elsewhere(name):
    with pytest.raises(ValueError, match=f"RaMBO{name}: .*use 'logits' or 'sigmoid'"):
        build(DENSE[name], set_loss(scores='softmax'))


class LabelFocalLoss(torch.nn.Module):
    """FocalLoss that leaves the quality out."""

    def __init__(self, config):
        super().__init__()
        self.loss = MODELS.build(config)

    def forward(self, pred, target, weight=None, avg_factor=None):
        labels = target[0] if isinstance(target, tuple) else target
        return self.loss(pred, labels, weight, avg_factor=avg_factor)


@pytest.mark.parametrize('name', ['RetinaHead', 'FCOSHead', 'GFLHead'])
def test_auxiliary_loss_is_the_mean_of_the_stock_head(name):
    """Also where the head calls it once per level."""
    focal = dict(type='FocalLoss', use_sigmoid=True, loss_weight=3.0)
    model = build(DENSE[name], set_loss(**EXACT, auxiliary=focal))
    head, data = model.bbox_head, batch(model)
    scores, rest = predictions(model, data)
    found = []
    for loss in (head.loss_cls, RaMBOLoss(**EXACT, memory=0), LabelFocalLoss(focal)):
        head.loss_cls = loss
        value = head.loss_by_feat(scores, *rest, *truth(data))['loss_cls']
        found.append(sum(value) if isinstance(value, list) else value)
    torch.testing.assert_close(found[0], found[1] + found[2])
    assert found[2] > 0


def test_auxiliary_loss_is_refused_where_the_head_divides_later():
    focal = dict(type='FocalLoss', use_sigmoid=True)
    with pytest.raises(ValueError, match='RTMDetSepBNHead: .* leave auxiliary out'):
        build(DENSE['RTMDetSepBNHead'], set_loss(auxiliary=focal))


def test_a_memory_can_be_asked_for():
    model = build(DENSE['RetinaHead'], set_loss(memory=2, class_ap=dict(span='memory')))
    data = batch(model)
    for _ in range(3):
        model.loss(data['inputs'], data['data_samples'])
    state = model.bbox_head.loss_cls.get_extra_state()
    assert len(state['scores']) == 2  # an entry per step, not per level


def test_stock_head_per_batch_ranks_the_batch():
    def change(cfg):
        cfg.bbox_head.type = 'FCOSHead'
        cfg.bbox_head.loss_cls.update(use_sigmoid=True, memory=0)
        cfg.bbox_head.loss_cls.pooled_ap = dict(span='batch')

    model = build(DENSE['FCOSHead'], change)
    data = batch(model)
    assert model.loss(data['inputs'], data['data_samples'])['loss_cls'] > 0
    # Unlike a RoI head it drops no column of the test scores, also in EMA's copy.
    model.test_cfg.score_thr = 0.0
    for detector in (
        model.eval(),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        with torch.no_grad():
            for result in detector.predict(data['inputs'], data['data_samples']):
                labels = result.pred_instances.labels
                assert len(labels) and labels.max() < CLASSES
