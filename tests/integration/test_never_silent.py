"""What would train wrongly without a word: it trains rightly or stops and says why."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction

from rambo_det import RaMBOLoss
from rambo_det.losses.rambo_loss import PATIENCE
from tests.helpers import detectors, toy_training
from tests.helpers.detectors import batch, build

FASTER = 'faster-rcnn_r50_fpn_rambo-rpn_1x_voc0712'
SPARSE = 'sparse-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt'
PLAIN = dict(margin_noise=False, memory=0)
LAYOUTS = [
    (dict(scores='logits'), dict(type='FocalLoss', use_sigmoid=True)),
    (dict(scores='sigmoid'), dict(type='CrossEntropyLoss', use_sigmoid=True)),
    (dict(scores='softmax', use_sigmoid=False), dict(type='CrossEntropyLoss')),
    (dict(scores='log_softmax', use_sigmoid=False), dict(type='CrossEntropyLoss')),
]


# Labels beyond the classes


@pytest.mark.parametrize(
    'name', [FASTER, SPARSE, *detectors.DENSE.values(), *detectors.QUERY.values()]
)
def test_a_num_classes_below_those_of_the_data_is_an_error(name):
    """One class for data of six: without the check, five of them are background."""

    def change(cfg):
        heads = cfg.get('bbox_head') or cfg.roi_head.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            head.num_classes = 1

    model = build(name, change)
    data = batch(model, objects=[12, 9])
    labels = torch.cat([s.gt_instances.labels for s in data['data_samples']])
    assert labels.max() > 0
    error, match = (
        ValueError,
        rf'label {labels.max()}, but .*1 class|num_classes=1; set',
    )
    if name in (SPARSE, detectors.QUERY['DINOHead']):
        # The detector itself looks the label up before the head has its turn.
        error, match = IndexError, 'out of (bounds|range)'
    with pytest.raises(error, match=match):
        model.loss(data['inputs'], data['data_samples'])


# A config that keeps the arguments of the loss that it replaces


@pytest.mark.parametrize(
    'inherited',
    [
        dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        dict(
            type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0
        ),
        dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0),
        dict(
            type='CrossEntropyLoss',
            bg_cls_weight=0.1,
            use_sigmoid=False,
            loss_weight=1.0,
            class_weight=1.0,
        ),
    ],
)
@pytest.mark.parametrize('name', ['RaMBORetinaHead', 'RaMBOShared2FCBBoxHead'])
def test_a_forgotten_delete_is_named(name, inherited):
    where = dict(in_channels=4, num_classes=3, loss_cls=inherited)
    base = Config(dict(head=dict(type=name, **where)))
    base.merge_from_dict({'head.loss_cls.type': 'RaMBOLoss'})
    with pytest.raises((TypeError, ValueError), match='_delete_=True'):
        MODELS.build(base.head)


# Ignored rows


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    with_auxiliary=st.booleans(),
    check=st.booleans(),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    seed=st.integers(0, 10**6),
)
def test_ignored_rows_may_hold_anything(layout, with_auxiliary, check, bad, seed):
    arguments, auxiliary = layout
    loss_cls = RaMBOLoss(
        **PLAIN,
        **arguments,
        check_values=check,
        auxiliary=auxiliary if with_auxiliary else None,
    )
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(12, loss_cls.get_cls_channels(3), generator=generator)
    target = torch.randint(0, 4, (12,), generator=generator)
    weight = (torch.rand(12, generator=generator) < 0.7).float()
    spoiled, odd = pred.clone(), target.clone()
    spoiled[weight == 0] = bad
    odd[weight == 0] = 99
    spoiled.requires_grad_()
    loss = loss_cls(spoiled, odd, weight, avg_factor=5.0)
    loss.backward()
    kept = weight > 0
    expected = pred[kept].requires_grad_()
    value = loss_cls(expected, target[kept], weight[kept], avg_factor=5.0)
    value.backward()
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(spoiled.grad[kept], expected.grad)
    assert not spoiled.grad[~kept].any()


# An infinite λ in a config


@pytest.mark.parametrize('spelling', ['inf', 'infinite'])
def test_an_infinite_lambda_survives_dump_and_reload(spelling, tmp_path):
    loss = dict(type='RaMBOLoss', lambd=spelling, pooled_ap=dict(lambd=spelling))
    cfg = Config(dict(loss=loss))
    cfg.dump(tmp_path / 'config.py')
    for again in (
        Config.fromfile(tmp_path / 'config.py'),
        Config.fromstring(cfg.pretty_text, '.py'),  # what a checkpoint holds
    ):
        loss_cls = MODELS.build(again.loss)
        assert loss_cls.lambd == math.inf
        assert [term.lambd for term in loss_cls.terms] == [math.inf] * 2


def test_an_infinite_lambda_survives_cfg_options(tmp_path):
    cfg = Config(dict(loss=dict(type='RaMBOLoss', lambd=1.0)))
    given = DictAction._parse_iterable('infinite')
    cfg.merge_from_dict({'loss.lambd': given})
    cfg.dump(tmp_path / 'config.py')
    again = Config.fromfile(tmp_path / 'config.py')
    assert MODELS.build(again.loss).lambd == math.inf
    with pytest.raises(ValueError, match=r"finite .* perturb='together', got inf"):
        RaMBOLoss(lambd=given, perturb='together')


# Batches without positives


def step(loss_cls, positives):
    labels = torch.arange(8) % 2 if positives else torch.full((8,), 3)
    loss_cls(torch.randn(8, 3, requires_grad=True), labels).backward()
    return loss_cls.get_accuracy()


def test_a_batch_without_positives_does_not_count_in_the_mean():
    loss_cls = RaMBOLoss()
    logged = [step(loss_cls, positives) for positives in (True, False, True, False)]
    assert [set(values) for values in logged] == [
        {'class_ap', 'pooled_ap'} if positives else set()
        for positives in (True, False, True, False)
    ]
    assert all(value > 0 for values in logged for value in values.values())


def test_without_looking_at_values_the_one_before_is_repeated():
    loss_cls = RaMBOLoss(check_values=False)
    assert all(torch.isnan(v) for v in step(loss_cls, False).values())
    before = step(loss_cls, True)
    assert step(loss_cls, False) == before and before['class_ap'] > 0


def test_a_training_without_positives_says_so_once():
    loss_cls = RaMBOLoss()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(PATIENCE - 1):
            step(loss_cls, False)
        loss_cls.eval()
        step(loss_cls, False)
        loss_cls.train()
    with pytest.warns(UserWarning, match=rf'none of the first {PATIENCE} calls had a'):
        step(loss_cls, False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(PATIENCE):
            step(loss_cls, False)
        other = RaMBOLoss()
        step(other, True)
        for _ in range(2 * PATIENCE):
            step(other, False)


# Schedules that meet, or act on nothing


def schedule(param, **changes):
    return {**dict(type='RaMBOScheduleHook', param=param, start=0.5), **changes}


@pytest.mark.parametrize(
    'hooks, loss, match',
    [
        (
            [schedule('margin'), schedule('margin', start=2.0, begin=1)],
            {},
            'two hooks change margin, and only the last one would count',
        ),
        ([schedule('auxiliary')], dict(auxiliary=None), 'has auxiliary=None, which no'),
        ([schedule('margin')], dict(margin=0.0), 'has margin=0.0, which no factor'),
        ([schedule('loss_weight')], dict(loss_weight=0.0), 'has loss_weight=0.0'),
        ([schedule('lambd')], dict(lambd='infinite'), 'lambd is infinite'),
    ],
)
def test_a_schedule_that_would_do_nothing_is_an_error(hooks, loss, match, tmp_path):
    runner, model = toy_training.train(
        toy_training.rambo_loss(**loss), hooks, tmp_path, epochs=1
    )
    with pytest.raises(ValueError, match=match):
        runner.train()
    assert model.seen == []  # before the first step


def test_schedules_of_several_settings_go_together(tmp_path):
    hooks = [schedule('margin'), schedule('loss_weight')]
    runner, model = toy_training.train(
        toy_training.rambo_loss(), hooks, tmp_path, epochs=1
    )
    runner.train()
    assert model.seen[0]['margin'] == model.seen[0]['loss_weight'] == 0.5


# Semi-supervised detectors


def soft_teacher():
    name = 'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'
    cfg = Config.fromstring(f'_base_ = "mmdet::soft_teacher/{name}"', '.py').model
    cfg.detector = detectors.model_config(FASTER)
    cfg.data_preprocessor.data_preprocessor = cfg.detector.data_preprocessor
    # Pseudo labels from the first step on.
    cfg.semi_train_cfg.update(rpn_pseudo_thr=0.0, cls_pseudo_thr=0.0)
    cfg.semi_train_cfg.update(pseudo_label_initial_score_thr=0.0)
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    return model.train()


def branches(model):
    """A labelled image, and an unlabelled one for teacher and student."""
    inputs, samples = {}, {}
    for name in ('sup', 'unsup_teacher', 'unsup_student'):
        data = batch(model.student, sizes=((64, 96),), objects=[5])
        inputs[name], samples[name] = data['inputs'], data['data_samples']
        for sample in samples[name]:
            sample.set_metainfo(dict(homography_matrix=torch.eye(3).numpy()))
    return inputs, samples


def test_soft_teacher_ranks_both_branches():
    model = soft_teacher()
    calls = detectors.record_calls(model.student.roi_head.bbox_head.loss_cls)
    losses = model.loss(*branches(model))
    total, logs = model.parse_losses(losses)
    total.backward()
    for name in ('loss_cls', 'loss_rpn_cls'):
        assert logs[f'sup_{name}'] > 0 and torch.isfinite(logs[f'unsup_{name}'])
    # The third call is of the boxes of the pseudo labels; its ranking is dropped.
    (_, labels, _, _), (_, pseudo, weight, _), _ = calls
    background = model.student.roi_head.bbox_head.num_classes
    assert (labels < background).any() and (labels == background).any()
    # The teacher's probability of background weighs the negatives: none is ignored.
    negatives = pseudo == background
    assert negatives.any() and (weight[negatives] > 0).all()
    assert (pseudo < background).any() and logs['unsup_loss_cls'] > 0
    head = model.student.roi_head.bbox_head
    assert head.fc_cls.weight.grad.abs().sum() > 0
