"""Detectors of this package become stock mmdet's."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet', reason='needs mmdet')

from tests.helpers.demo_configs import CE, RAMBO
from tests.helpers.random_detector import random_state
from tools.analysis_tools import classifier
from tools.dataset_tools import make_demo_voc
from tools.model_converters import to_stock

VOC = RAMBO.parents[1] / 'pascal_voc'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('demo') / 'voc'
    make_demo_voc.generate(root, train=1, test=6, size=(128, 96))
    return root


@pytest.fixture
def trained(data, monkeypatch):
    """A config and a checkpoint with a classifier that tells classes apart."""
    monkeypatch.setenv('RAMBO_DEMO_DATA', str(data))
    cfg = classifier.load_config(RAMBO)
    state = random_state(cfg)
    state['roi_head.bbox_head.fc_cls.bias'] += torch.linspace(-3, 3, 6)
    meta = dict(dataset_meta=dict(classes=make_demo_voc.CLASSES))
    return cfg, dict(meta=meta, state_dict=state)


@pytest.mark.parametrize('mode', to_stock.MODES)
def test_a_roi_head_becomes_stock(trained, mode):
    cfg, content = trained
    stock, state = to_stock.convert(cfg, content, mode)
    assert 'rambo' not in stock.pretty_text.lower().replace('rambo_demo', '')
    parts = (
        classifier.at_any_score(cfg),
        content['state_dict'],
        classifier.at_any_score(stock),
        state,
    )
    ours, theirs = (
        classifier.detect(c, classifier.build(c, s), mode)
        for c, s in (parts[:2], parts[2:])
    )
    head = classifier.build(stock, state).roi_head.bbox_head
    assert type(head).__module__.startswith('mmdet.')
    assert head.fc_cls.out_features == (6 if mode == 'sigmoid' else 7)
    a, b = (np.vstack([np.vstack(i) for i in r.detections]) for r in (ours, theirs))
    if mode == 'softmax':  # the background's logit is 0
        for part in ('weight', 'bias'):
            rows = state[f'roi_head.bbox_head.fc_cls.{part}']
            old = content['state_dict'][f'roi_head.bbox_head.fc_cls.{part}']
            assert torch.equal(rows[:-1], old) and not rows[-1].any()
        return
    np.testing.assert_array_equal(a[:, :4], b[:, :4])  # boxes in the same order
    expected = a[:, 4]
    if mode == 'softmax-order':
        expected = [to_stock.stock_score(score) for score in a[:, 4]]
    np.testing.assert_allclose(b[:, 4], expected, rtol=1e-3)


@pytest.mark.parametrize(
    'name, loss',
    [
        ('retinanet_r50_fpn_rambo_1x_voc0712', 'FocalLoss'),
        ('deformable-detr_r50_rambo_16xb2-50e_voc0712-cocofmt', 'FocalLoss'),
        ('cascade-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt', 'CrossEntropyCustomLoss'),
        ('faster-rcnn_r50_fpn_rambo-rpn_1x_voc0712', 'CrossEntropyCustomLoss'),
    ],
)
def test_configs_of_all_families_become_stock(name, loss):
    cfg = classifier.load_config(VOC / f'{name}.py')
    stock = to_stock.stock_config(cfg, softmax=False, any_score=False)
    assert loss in stock.pretty_text and 'rambo' not in stock.pretty_text.lower()
    assert 'RaMBO' in cfg.pretty_text
    with torch.device('meta'):
        model = copy.deepcopy(stock.model)
        model.backbone.pop('init_cfg', None)
        built = classifier.MODELS.build(model)
    found = {type(part).__module__.split('.')[0] for part in built.modules()}
    assert 'rambo_det' not in found


def test_softmax_is_for_roi_heads(monkeypatch):
    class Head:
        softmax = False
        head = None

    monkeypatch.setattr(to_stock, 'build', lambda *_: None)
    monkeypatch.setattr(to_stock, 'find_classifier', lambda _: Head)
    cfg = classifier.load_config(VOC / 'retinanet_r50_fpn_rambo_1x_voc0712.py')
    with pytest.raises(ValueError, match='is for RoI heads.*use --mode sigmoid'):
        to_stock.convert(cfg, dict(state_dict={}), 'softmax')


@pytest.mark.slow
def test_the_checkpoint_is_tested_without_the_package(trained, tmp_path, capsys):
    torch.save(trained[1], tmp_path / 'ours.pth')
    out = str(tmp_path / 'stock.pth')
    arguments = [str(RAMBO), str(tmp_path / 'ours.pth'), out]
    found = to_stock.main([*arguments, '--check', str(tmp_path / 'check')])
    assert found['before'] == found['after']
    assert found['largest_difference'] < 1e-6 and found['same_boxes'] == 100
    with pytest.raises(SystemExit):
        other = str(VOC / 'retinanet_r50_fpn_rambo_1x_voc0712.py')
        to_stock.main([other, *arguments[1:]])
    assert 'trained with the classes disc' in capsys.readouterr().err


def test_a_background_column_is_stock_already():
    cfg = classifier.load_config(CE)
    stock = to_stock.stock_config(cfg, softmax=True, any_score=False)
    head = cfg.model.roi_head.bbox_head
    head.type = 'Shared2FCBBoxHead'  # it may be ours for its box loss
    head.pop('box_avg', None)
    assert stock.model == cfg.model
