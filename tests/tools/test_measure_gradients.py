"""The gradients are those of the losses, and their statistics are what they say."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from tests.helpers.demo_configs import RAMBO

pytest.importorskip('mmdet', reason='needs mmdet')

from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from tools.dataset_tools import make_demo_voc
from tools.experiments import measure_gradients as tool

LOSS = (
    'dict(type="RaMBOLoss", loss_weight={weight}, lambd=3.0, margin_noise=False, '
    'memory=0, class_ap=dict(span="{span}"), pooled_ap=dict(span="{span}"))'
)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    make_demo_voc.generate(tmp_path / 'voc', train=8, test=1, size=(128, 96))
    monkeypatch.setenv('RAMBO_DEMO_DATA', str(tmp_path / 'voc'))
    register_all_modules()
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(Config.fromfile(RAMBO).model))
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'epoch_1.pth')
    return tmp_path / 'epoch_1.pth'


def test_statistics():
    gradients = torch.tensor([[3.0, 0.0], [0.0, 4.0], [5.0, 0.0]])
    found = tool.statistics(gradients, torch.tensor([1.0, 0.0]))
    assert found['norm'] == pytest.approx(4.0)
    assert found['between'] == pytest.approx(1 / 3)  # 0, 0 and 1
    assert found['alike'] == pytest.approx(8 / (8**2 + 4**2) ** 0.5)


def test_losses_in_place_of_the_own_one(checkpoint, tmp_path, capsys):
    arguments = [str(RAMBO), str(checkpoint), '--batches', '2']
    arguments += ['--set', 'image', LOSS.format(weight=1.0, span='image')]
    arguments += ['--set', 'ten', LOSS.format(weight=10.0, span='image')]
    arguments += ['--set', 'batch', LOSS.format(weight=1.0, span='batch')]
    report = tool.main([*arguments, '--out', str(tmp_path / 'out.json')])
    assert json.loads((tmp_path / 'out.json').read_text()) == report
    printed = capsys.readouterr().out
    assert tool.table(report['result']) in printed
    assert {'backbone', 'neck', 'shared_fcs'} == set(report['result'])
    for part, rows in report['result'].items():
        own = {'loss_cls', 'loss_bbox', 'loss_rpn_cls', 'loss_rpn_bbox'}
        assert set(rows) == own | {'image', 'ten', 'batch'}
        assert rows['loss_cls']['alike'] == pytest.approx(1.0, abs=1e-3)
        assert rows['image']['norm'] > 0
        # Only the scale differs, and the image of each RoI reaches the losses.
        assert rows['ten']['norm'] == pytest.approx(10 * rows['image']['norm'], 1e-3)
        assert rows['ten']['alike'] == pytest.approx(rows['image']['alike'], abs=1e-3)
        assert rows['batch']['norm'] != pytest.approx(rows['image']['norm'], 1e-3)
        rpn = rows['loss_rpn_cls']['norm']
        assert (rpn == 0) == (part == 'shared_fcs')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--batches', '1'], '--batches must be at least 2, got 1'),
        (['--set', 'x', 'dict(lr=1)'], '--set: expected dict(type='),
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(RAMBO), 'epoch_1.pth', *arguments])
    assert message in capsys.readouterr().err
