"""Detectors that are killed, resumed, and used where rambo_det is not installed."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip('mmdet', reason='runs the scripts of mmdet')
from mmengine.config import Config

from rambo_det.checkpoint import load_checkpoint
from tests.helpers import detectors
from tests.integration.test_import import HIDE
from tests.integration.test_resume import REACTING, noisy_training

# Where it is killed differs each time; RAMBO_KILLS=100 --timeout=0 tries more.
KILLS = int(os.environ.get('RAMBO_KILLS', 4))
COUNTED = dict(
    epoch=dict(by_epoch=True, max_epochs=12, val_interval=2),
    iter=dict(by_epoch=False, max_iters=48, val_interval=5),
)
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
SCORE = dict(monitor='score', rule='greater', patience=4)


def train_to_the_end(folder, unit):
    """Train, or go on, with everything that has a state; save every few steps."""
    # mmengine waits where it begins with the data again.
    mock.patch('mmengine.runner.loops.time.sleep').start()
    try:
        saving = dict(type='SafeCheckpointHook', interval=1, max_keep_ckpts=1)
        saving.update(by_epoch=unit == 'epoch', save_best='score', rule='greater')
        runner, _ = noisy_training(
            folder,
            [
                dict(type='ExactResumeHook'),
                dict(type='EMAHook', momentum=0.1, update_buffers=True),
                dict(type='RaMBOScheduleHook', param='lambd', start=9.0),
                dict(SCORE, type='EarlyStoppingHook', min_delta=-9.0),
            ],
            resume=True,
            loop=COUNTED[unit],
            checkpoint=saving,
            **dict(REACTING, param_scheduler=[dict(SCORE, type='ReduceOnPlateauLR')]),
        )
        runner.train()
    except BaseException:
        Path(folder, 'error').write_text(traceback.format_exc())
        raise


def start(folder, unit):
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['mmdet.apis', 'rambo_det'])
    process = context.Process(target=train_to_the_end, args=(folder, unit))
    process.start()
    return process


def differences(a, b, name=''):
    """Name what differs in two checkpoints."""
    if torch.is_tensor(a):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [d for key in a for d in differences(a[key], b[key], f'{name}.{key}')]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        return [
            d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, name)
        ]
    return [] if a == b else [name]


@pytest.mark.parametrize('unit', COUNTED)
def test_a_training_that_is_killed_goes_on_bit_for_bit(unit, tmp_path):
    """Wherever it is killed, also while it saves, validates or begins again."""
    whole, chance = tmp_path / 'whole', random.SystemRandom()
    process = start(whole, unit)
    process.join()
    began = time.monotonic()
    process = start(tmp_path / 'again', unit)
    process.join()
    seconds = time.monotonic() - began
    kills, number = 0, 0
    while kills < KILLS:
        folder, number = tmp_path / str(number), number + 1
        while not (folder / 'done').exists():
            process = start(folder, unit)
            if kills < KILLS:
                process.join(chance.uniform(0, seconds))
                if process.is_alive():
                    os.kill(process.pid, chance.choice(SIGNALS))
                    kills += 1
            process.join()
            if process.exitcode == 0:
                (folder / 'done').touch()
            error = folder / 'error'
            assert not error.exists(), error.read_text()
        paths = [sorted(f.name for f in p.glob('*.*pth*')) for p in (folder, whole)]
        assert paths[0] == paths[1] and len(paths[0]) == 2
        ends = [load_checkpoint(f / paths[0][1]) for f in (folder, whole)]
        for part in ends[0].keys() - {'meta', 'message_hub'}:
            assert differences(ends[0][part], ends[1][part]) == []
        hubs = [end['message_hub']['runtime_info']['best_score'] for end in ends]
        assert hubs[0] == hubs[1]
        assert not [*folder.rglob('*unfinished*')]
    print(f'{kills} kills in {number} trainings')


# Without rambo_det

INFER = """
import os, torch
from mmdet.apis import inference_detector, init_detector
from mmdet.utils import register_all_modules
register_all_modules()
config, checkpoint, image, out = {arguments!r}
model = init_detector(config, checkpoint, device='cpu', palette='random')
found = inference_detector(model, image).pred_instances
torch.save(dict(bboxes=found.bboxes, scores=found.scores, labels=found.labels), out)
assert 'rambo_det' not in sys.modules
"""


def rank_softmax_in_roi_heads(model):
    """Stock RoI heads have a column for the background, whatever their loss."""
    if 'roi_head' in model:
        loss_cls = model.roi_head.bbox_head.loss_cls
        loss_cls.update(scores='log_softmax', use_sigmoid=False)


def plain(name, head):
    """The config with mmdet's own head and loss, for inference."""
    model = detectors.model_config(name)
    rank_softmax_in_roi_heads(model)
    bbox_head = model.bbox_head if 'bbox_head' in model else model.roi_head.bbox_head
    scores = bbox_head.loss_cls.get('scores', 'logits')
    bbox_head.type = head
    bbox_head.pop('box_avg', None)  # of the training alone
    if scores == 'logits':
        bbox_head.loss_cls = dict(type='FocalLoss', use_sigmoid=True)
    else:
        bbox_head.loss_cls = dict(type='CrossEntropyLoss', use_sigmoid=False)
    return model


TEST_PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]


RETINA = 'retinanet_r50_fpn_rambo_1x_voc0712', 'RetinaHead'
GFL = 'gfl_r50_fpn_rambo_1x_voc0712-cocofmt', 'GFLHead'
ROI = 'faster-rcnn_r50_fpn_rambo_1x_voc0712', 'Shared2FCBBoxHead'


@pytest.mark.parametrize(
    'name, head, published',
    [
        (*RETINA, True),
        pytest.param(*RETINA, False, marks=pytest.mark.slow),
        pytest.param(*GFL, False, marks=pytest.mark.slow),
        pytest.param(*ROI, True, marks=pytest.mark.slow),
    ],
)
def test_inference_without_rambo_det(name, head, published, tmp_path):
    """A trained checkpoint in mmdet's own config predicts the same boxes."""
    import mmcv
    import numpy as np
    from mmdet.apis import inference_detector
    from mmengine.optim import OptimWrapper
    from mmengine.registry import init_default_scope

    model = detectors.build(name, rank_softmax_in_roi_heads)
    data = detectors.batch(model)
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
    loss, _ = model.parse_losses(model.loss(data['inputs'], data['data_samples']))
    optimizer.update_params(loss)
    image = tmp_path / 'image.png'
    mmcv.imwrite(np.random.RandomState(0).randint(0, 255, (80, 96, 3), np.uint8), image)
    checkpoint = dict(
        meta=dict(dataset_meta=dict(classes=tuple('abcdef'))),
        state_dict=model.state_dict(),
    )
    environment = dict(os.environ)
    if not published:
        # As it comes out of a training: with the history of the log, which stock
        # mmengine does not load on PyTorch >= 2.6 without being told to.
        from tests.integration.test_checkpoint import message_hub_state

        checkpoint['message_hub'] = message_hub_state()
        environment['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'
    torch.save(checkpoint, tmp_path / 'checkpoint.pth')
    cfg = Config(
        dict(
            model=plain(name, head),
            test_dataloader=dict(dataset=dict(pipeline=TEST_PIPELINE)),
            default_scope='mmdet',
        )
    )
    cfg.dump(tmp_path / 'config.py')
    assert 'rambo' not in (tmp_path / 'config.py').read_text().lower()
    files = ('config.py', 'checkpoint.pth', 'image.png', 'found.pth')
    code = HIDE.format(names={'rambo_det'}) + INFER.format(
        arguments=[str(tmp_path / file) for file in files]
    )
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    log = result.stdout + result.stderr
    assert 'missing keys' not in log and 'size mismatch' not in log
    # Nothing but the score memory is new to mmdet.
    for line in log.splitlines():
        assert 'unexpected key' not in line or line.endswith('loss_cls._extra_state')

    init_default_scope('mmdet')
    model.cfg = cfg
    expected = inference_detector(model.eval(), str(image)).pred_instances
    found = torch.load(tmp_path / 'found.pth')
    assert len(expected) > 0
    assert torch.equal(found['labels'], expected.labels)
    torch.testing.assert_close(found['scores'], expected.scores)
    torch.testing.assert_close(found['bboxes'], expected.bboxes)
