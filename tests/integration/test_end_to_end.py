"""Train, test and resume through mmdet's own scripts, as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.helpers.demo_configs import RAMBO

pytest.importorskip('mmdet', reason='runs the scripts of mmdet')
from mmdet.apis import DetInferencer
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from rambo_det.checkpoint import load_checkpoint

SHARED = ROOT.parent / 'shared'
MEMORY = 'roi_head.bbox_head.loss_cls._extra_state'


def run(script, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '2', **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A data folder, and a work folder with one epoch of training in it."""
    data = tmp_path_factory.mktemp('data') / 'shapes'
    work_dir = tmp_path_factory.mktemp('work')
    run(
        'dataset_tools/make_demo_voc.py',
        '--out',
        str(data),
        '--train',
        '12',
        '--test',
        '6',
    )
    environment = dict(RAMBO_DEMO_DATA=str(data))
    log = run('train.py', *train_arguments(work_dir, epochs=1), **environment)
    assert 'class_ap' in log and 'pooled_ap' in log
    return work_dir, environment


def train_arguments(work_dir, epochs):
    return [
        str(RAMBO),
        '--work-dir',
        str(work_dir),
        '--cfg-options',
        f'train_cfg.max_epochs={epochs}',
        'train_cfg.val_interval=1',
        'train_dataloader.batch_size=4',
        'default_hooks.logger.interval=1',
        'default_hooks.checkpoint.interval=1',
        'model.roi_head.bbox_head.loss_cls.class_ap.span=memory',
    ]


def test_checkpoint_holds_the_memory_and_loads_safely(trained):
    work_dir, _ = trained
    checkpoint = load_checkpoint(work_dir / 'epoch_1.pth')
    memory = checkpoint['state_dict'][MEMORY]
    assert len(memory['scores']) == len(memory['labels']) == 3
    assert memory['scores'][0].size(1) == 6


def test_mmdets_test_script_reads_it(trained):
    work_dir, environment = trained
    checkpoint = str(work_dir / 'epoch_1.pth')
    log = run(
        'test.py', str(RAMBO), checkpoint, '--work-dir', str(work_dir), **environment
    )
    assert 'pascal_voc/AP50' in log


def test_inferencer_reads_it(trained):
    work_dir, environment = trained
    image = next(Path(environment['RAMBO_DEMO_DATA']).glob('JPEGImages/*.jpg'))
    inferencer = DetInferencer(
        str(RAMBO), str(work_dir / 'epoch_1.pth'), device='cpu', show_progress=False
    )
    (prediction,) = inferencer(str(image))['predictions']
    assert len(prediction['scores']) == len(prediction['labels'])


def test_training_resumes_with_its_memory(trained):
    work_dir, environment = trained
    log = run(
        'train.py', *train_arguments(work_dir, epochs=2), '--resume', **environment
    )
    assert 'resumed epoch: 1' in log
    checkpoint = load_checkpoint(work_dir / 'epoch_2.pth')
    memory = checkpoint['state_dict'][MEMORY]['scores']
    before = load_checkpoint(work_dir / 'epoch_1.pth')
    # Three steps an epoch and a memory of seven: the first three are still there.
    assert len(memory) == 6
    for old, kept in zip(before['state_dict'][MEMORY]['scores'], memory):
        assert torch.equal(old, kept)


@pytest.mark.needs_shared
@pytest.mark.parametrize(
    'name, variable, folder, images, classes',
    [
        ('bccd', 'RAMBO_BCCD', 'data/bccd/BCCD', 292, 3),
        ('voc_subset', 'RAMBO_VOC_SUBSET', 'data/VOCdevkit', 2000, 20),
    ],
)
def test_real_data(name, variable, folder, images, classes, monkeypatch):
    """Every box that training sees has an area; images come from the right split."""
    root = SHARED / folder
    if not root.is_dir():
        pytest.skip(f'the data are not there: {folder} in a folder beside the checkout')
    monkeypatch.setenv(variable, str(root) + '/')
    register_all_modules()
    cfg = Config.fromfile(next((ROOT / 'configs' / name).glob('*_rambo_*.py')))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(dataset.metainfo['classes']) == classes
    assert images - 5 <= len(dataset) <= images
    flat = [
        index
        for index in range(len(dataset))
        if any(
            instance['bbox'][0] >= instance['bbox'][2]
            or instance['bbox'][1] >= instance['bbox'][3]
            for instance in dataset.get_data_info(index)['instances']
        )
    ]
    assert len(flat) == (2 if classes == 3 else 0)  # BCCD has two without area
    for index in flat or [0]:
        boxes = dataset[index]['data_samples'].gt_instances.bboxes
        assert (boxes.areas > 0).all()
