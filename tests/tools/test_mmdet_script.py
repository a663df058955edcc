"""mmdet's own scripts train the configs, and ours ask for a forgotten import."""

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.helpers.demo_configs import RAMBO

pytest.importorskip('mmdet', reason='runs the scripts of mmdet')
from mmengine.config import Config

import rambo_det
from tools.common.mmdet_script import find_mmdet_script, forgotten_import
from tools.dataset_tools.make_demo_voc import CLASSES, generate

BCCD = 'bccd/faster-rcnn_mobilenetv2_fpn'
CONFIGS = ROOT / 'configs'
CE = CONFIGS / f'{BCCD}_ce_6e_bccd.py'
VOC = 'voc_subset/faster-rcnn_mobilenetv2_fpn'
LINE = "custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)"


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('demo') / 'voc'
    generate(root, 4, 2)
    return root


def run(work_dir, *arguments, **environment):
    """Run a script in a folder and with a path that do not hold our tools/."""
    arguments = [*arguments, '--work-dir', work_dir]
    return subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, arguments)],
        cwd=work_dir.parent,
        env={
            **os.environ,
            'PYTHONPATH': str(ROOT),
            'OMP_NUM_THREADS': '1',
            **environment,
        },
        capture_output=True,
        text=True,
    )


def train(script, config, work_dir, *options, **environment):
    """Train for one epoch, which is one step, and evaluate."""
    options = [
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'default_hooks.logger.interval=1',
        *options,
    ]
    return run(work_dir, script, config, '--cfg-options', *options, **environment)


def own_data(data, folder, base, more=''):
    """Write a config that trains a shipped detector on the demo's data."""
    path = folder / 'own.py'
    path.write_text(
        f'_base_ = {str(CONFIGS / base)!r}\n'
        f"data = dict(data_root='{data}/', metainfo=dict(classes={CLASSES!r}))\n"
        'model = dict(roi_head=dict(bbox_head=dict(num_classes=2)))\n'
        'train_dataloader = dict(dataset=data)\n'
        'val_dataloader = dict(dataset=data)\n'
        f'test_dataloader = val_dataloader\n{more}',
        encoding='utf-8',
    )
    return path


CLASSES_AND_WEIGHTS = (
    f'model.roi_head.bbox_head.num_classes={len(CLASSES)}',
    'model.backbone.init_cfg=None',
)
# The BCCD configs have it; the data of the VOC subset lie in VOC2007/.
FOLDERS = """
for part, split in ((train_dataloader, 'trainval'), (val_dataloader, 'test')):
    part['dataset'] = dict(
        data, ann_file=f'ImageSets/Main/{split}.txt',
        data_prefix=dict(sub_data_root=''))
del part, split
"""


def assert_trained(result, work_dir):
    log = result.stdout + result.stderr
    assert result.returncode == 0, log[-3000:]
    assert 'Epoch(train) [1][1/1]' in log and 'pascal_voc/AP50' in log
    assert (work_dir / 'epoch_1.pth').is_file()


@pytest.mark.slow
def test_mmdet_trains_the_demo(data, tmp_path):
    work = tmp_path / 'work'
    script = find_mmdet_script('train')
    result = train(script, RAMBO, work, RAMBO_DEMO_DATA=str(data))
    assert_trained(result, work)


@pytest.mark.slow
@pytest.mark.parametrize(
    'base, more',
    [
        (f'{BCCD}_rambo_6e_bccd.py', ''),
        (f'{VOC}-tiny_rs-loss_12e_voc-subset.py', FOLDERS),
    ],
)
def test_mmdet_trains_on_ones_own_data(base, more, data, tmp_path):
    config, work = own_data(data, tmp_path, base, more), tmp_path / 'work'
    script = find_mmdet_script('train')
    assert_trained(train(script, config, work, *CLASSES_AND_WEIGHTS), work)


@pytest.mark.slow
def test_a_wrong_number_of_classes_stops_before_the_first_step(data, tmp_path):
    config = own_data(data, tmp_path, f'{BCCD}_rambo_6e_bccd.py')
    work, script = tmp_path / 'work', find_mmdet_script('train')
    result = train(script, config, work, CLASSES_AND_WEIGHTS[1])
    assert result.returncode == 1
    assert 'The `num_classes` (2) in RaMBOShared2FCBBoxHead' in result.stderr
    assert 'Epoch(train)' not in result.stdout + result.stderr


def test_a_forgotten_import_is_asked_for(tmp_path):
    config = tmp_path / 'forgotten.py'
    config.write_text(
        f'_base_ = {str(CE)!r}\n'
        "custom_imports = dict(_delete_=True, imports=['json'])\n"
        'model = dict(roi_head=dict(bbox_head=dict(\n'
        "    type='RaMBOShared2FCBBoxHead',\n"
        "    loss_cls=dict(_delete_=True, type='RaMBOLoss'))))\n"
        "custom_hooks = [dict(type='RaMBOMonitorHook')]\n",
        encoding='utf-8',
    )
    result = train(ROOT / 'tools' / 'train.py', config, tmp_path / 'work')
    assert result.returncode == 1
    *_, message, line = result.stderr.splitlines()
    used = 'RaMBOLoss, RaMBOMonitorHook, RaMBOShared2FCBBoxHead'
    assert message.startswith(f'tools/train.py: {config} uses {used} of rambo_det')
    assert line == LINE
    assert LINE in (ROOT / 'README.md').read_text(encoding='utf-8')


def test_nothing_of_the_package_asks_for_no_import():
    stock = "_base_ = 'mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py'"
    cfg = Config.fromstring(stock, '.py')
    assert forgotten_import(cfg, rambo_det.__all__) is None


@pytest.mark.slow
def test_our_scripts_train_and_test_without_it(data, tmp_path):
    """PyTorch reads mmengine's checkpoints only where the package is imported."""
    config, work = own_data(data, tmp_path, CE.relative_to(CONFIGS)), tmp_path / 'work'
    tools = ROOT / 'tools'
    assert_trained(train(tools / 'train.py', config, work, *CLASSES_AND_WEIGHTS), work)
    result = run(
        *[work, tools / 'test.py', config, work / 'epoch_1.pth'],
        *['--cfg-options', *CLASSES_AND_WEIGHTS],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert 'pascal_voc/AP50' in result.stdout + result.stderr
