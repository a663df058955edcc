"""Detectors that are killed, resumed, and used where rambo_det is not installed."""

import os
import random
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from tests import ROOT
from tests.helpers.demo_configs import RAMBO

pytest.importorskip('mmdet', reason='runs the scripts of mmdet')
from mmengine.config import Config

from rambo_det.checkpoint import load_checkpoint
from tests.helpers import detectors
from tests.integration.test_end_to_end import run
from tests.integration.test_import import HIDE

EPOCHS, STEPS = 4, 3  # 12 images in batches of 4


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """The demo with everything that has a state, and its data."""
    folder = tmp_path_factory.mktemp('interrupted')
    data = folder / 'shapes'
    run(
        'dataset_tools/make_demo_voc.py',
        '--out',
        str(data),
        '--train',
        '12',
        '--test',
        '2',
    )
    path = folder / 'config.py'
    path.write_text(
        textwrap.dedent(f"""
        _base_ = {str(RAMBO)!r}
        model = dict(roi_head=dict(bbox_head=dict(loss_cls=dict(
            class_ap=dict(span='memory'), margin=0.5, lambd=0.3))))
        train_dataloader = dict(batch_size=4)
        train_cfg = dict(max_epochs={EPOCHS}, val_interval=1)
        default_hooks = dict(
            logger=dict(interval=1),
            checkpoint=dict(
                _delete_=True, type='SafeCheckpointHook', interval=1, max_keep_ckpts=1))
        custom_hooks = [
            dict(type='RaMBOScheduleHook', param='lambd', start=9.0),
            dict(type='EMAHook', momentum=0.1, update_buffers=True),
            dict(type='RaMBOMonitorHook', interval=2),
            dict(type='ExactResumeHook'),
        ]
        randomness = dict(seed=0, deterministic=True)
        """)
    )
    return path, dict(RAMBO_DEMO_DATA=str(data), OMP_NUM_THREADS='1')


@pytest.fixture(scope='module')
def uninterrupted(config, tmp_path_factory):
    path, environment = config
    work_dir = tmp_path_factory.mktemp('uninterrupted')
    log = run('train.py', str(path), '--work-dir', str(work_dir), **environment)
    assert 'rambo/zero_grad_share' in log
    return load_checkpoint(work_dir / f'epoch_{EPOCHS}.pth')


def train_until(step, signal_number, path, work_dir, environment):
    """Train, and send a signal once a step, counted from 0, is logged."""
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / 'train.py')]
    process = subprocess.Popen(
        [*command, str(path), '--work-dir', str(work_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    wanted = f'Epoch(train) [{step // STEPS + 1}][{step % STEPS + 1}/{STEPS}]'
    lines = []
    for line in process.stdout:
        lines.append(line)
        if wanted in re.sub(r'\s+(?=\d)', '', line):
            process.send_signal(signal_number)
            break
    process.stdout.close()
    assert process.wait(60) == -signal_number, ''.join(lines[-30:])


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


@pytest.mark.slow
@pytest.mark.parametrize('signal_number', [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_training_ends_with_the_same_weights(
    signal_number, config, uninterrupted, tmp_path
):
    path, environment = config
    # After the first checkpoint; another step in each run of the tests.
    step = random.SystemRandom().randrange(STEPS, EPOCHS * STEPS - 1)
    print(f'{signal_number.name} after step {step}')
    train_until(step, signal_number, path, tmp_path, environment)
    done = max(int(p.stem.split('_')[1]) for p in tmp_path.glob('epoch_*.pth'))
    arguments = [str(path), '--work-dir', str(tmp_path), '--resume']
    log = run('train.py', *arguments, **environment)
    assert f'resumed epoch: {done}' in log
    resumed = load_checkpoint(tmp_path / f'epoch_{EPOCHS}.pth')
    parts = ('state_dict', 'ema_state_dict', 'optimizer', 'exact_resume')
    for part in (*parts, 'param_schedulers'):
        assert differences(resumed[part], uninterrupted[part]) == []


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
