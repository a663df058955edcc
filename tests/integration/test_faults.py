"""What goes wrong in long trainings: it stops with an error, or goes on exactly."""

import errno
import gc
import io
import math
import os
import random
import resource
from pathlib import Path

import mmengine.fileio.backends.local_backend as local_backend
import mmengine.hooks.checkpoint_hook as stock_hook
import pytest
import torch
from torch import nn

pytest.importorskip('mmdet', reason='trains with mmengine')
import mmengine.optim.optimizer.amp_optimizer_wrapper as amp

import rambo_det.checkpoint as checkpoint_module
from rambo_det import RaMBOLoss
from rambo_det.checkpoint import load_checkpoint
from tests.helpers.toy_training import Restless, examples, loader, rambo_loss, train
from tests.unit.test_rambo_loss import CLASS, PLAIN, random_batch

INF = math.inf


def gradient(loss_cls, pred, target, weight=None, **given):
    leaf = pred.detach().clone().requires_grad_()
    loss = loss_cls(leaf, target, weight, **given)
    loss.backward()
    return loss.detach(), leaf.grad


# Logits that are not finite


@pytest.mark.parametrize('scores', ['logits', 'sigmoid'])
def test_infinite_logits_rank_first_and_last(scores):
    pred, target = random_batch()
    pred = pred.detach()
    pred[2, 0], pred[5, 1], pred[7] = INF, -INF, -INF
    large = pred.clamp(-40, 40)  # sigmoid(40) is 1 in float64 but for rounding
    loss_cls = RaMBOLoss(**PLAIN, **CLASS, lambd=0.5, scores=scores)
    loss, grad = gradient(loss_cls, pred, target)
    expected, _ = gradient(loss_cls, large, target)
    assert loss == expected and torch.isfinite(grad).all()


@pytest.mark.parametrize('scores', ['softmax', 'log_softmax'])
@pytest.mark.parametrize('bad', [[INF, 0.0, 0.0], [-INF, -INF, -INF]])
def test_infinite_logits_are_refused_where_a_softmax_makes_nan_of_them(scores, bad):
    loss_cls = RaMBOLoss(**PLAIN, **CLASS, scores=scores, use_sigmoid=False)
    pred, target = torch.zeros(4, 3), torch.tensor([0, 1, 2, 2])
    pred[1] = torch.tensor(bad)
    with pytest.raises(ValueError, match=r'infinite logits, NaN .* \(3 of 12 entries'):
        loss_cls(pred, target)
    weight = torch.tensor([1.0, 0, 1, 1])
    assert loss_cls(pred, target, weight).isfinite()  # ignored rows hold anything
    masked = torch.zeros(4, 3)
    masked[:, 0] = -INF  # a class that is switched off
    assert loss_cls(masked, target).isfinite()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('value', [math.nan, -math.nan])
def test_one_nan_among_many_is_found(dtype, value):
    pred = torch.randn(300, 7).to(dtype)
    pred[123, 4] = value
    with pytest.raises(ValueError, match=r'NaN \(1 of 2100 entries\)'):
        RaMBOLoss()(pred, torch.arange(300) % 8)


# Loss scaling

SCALE = 65536.0  # with which GradScaler begins


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scores', ['logits', 'log_softmax'])
@pytest.mark.parametrize('lambd', [0.01, 30.0])
def test_a_scaled_loss_overflows_nowhere_but_in_half_precision(dtype, scores, lambd):
    """The gradient is that of float32, cast once, where it leaves the ranking."""
    softmax = scores != 'logits'
    loss_cls = RaMBOLoss(
        lambd=lambd,
        scores=scores,
        use_sigmoid=not softmax,
        pooled_ap=dict(span='batch'),
        **{**PLAIN, 'margin': 0.15},
    )
    half = torch.randn(600, 6).to(dtype)
    target = torch.arange(600) % (6 if softmax else 7)
    full = half.float().requires_grad_()
    half.requires_grad_()
    losses = loss_cls(half, target), loss_cls(full, target)
    assert losses[0].dtype == torch.float32 and losses[0] == losses[1]
    for loss in losses:
        (loss * SCALE).backward()
    assert torch.isfinite(full.grad).all()
    assert torch.equal(half.grad, full.grad.to(dtype))
    if dtype == torch.bfloat16 or lambd == 30.0:
        assert torch.isfinite(half.grad).all()


def test_loss_scaling_recovers_from_an_overflow():
    """A gradient too large for float16 costs some steps, and no NaN."""
    if not hasattr(torch.amp, 'GradScaler'):
        pytest.skip('this PyTorch scales losses on GPUs only')
    model = nn.Linear(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler('cpu', init_scale=SCALE)
    loss_cls = RaMBOLoss(
        perturb='together', lambd=0.05, margin=0.15, loss_weight=100.0, memory=0
    )
    inputs, target = torch.randn(60, 4), torch.arange(60) % 6
    before = model.weight.detach().clone()
    scales = []
    for _ in range(12):
        optimizer.zero_grad()
        logits = model(inputs).half()  # as a layer under float16 autocast hands it on
        scaler.scale(loss_cls(logits, target)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == SCALE / 2 and scales[-1] == scales[-2]
    assert torch.isfinite(model.weight).all() and not torch.equal(model.weight, before)


def test_mmengines_mixed_precision_ranks_the_same(tmp_path, monkeypatch):
    """AmpOptimWrapper insists on a GPU; what it does to the loss, a CPU does too."""
    monkeypatch.setattr(amp, 'is_cuda_available', lambda: True)
    loss = rambo_loss(auxiliary=None)
    runner, model = train(
        loss,
        [],
        tmp_path,
        2,
        optim_wrapper=dict(
            type='AmpOptimWrapper',
            dtype='bfloat16',
            optimizer=dict(type='SGD', lr=0.1),
        ),
    )
    seen = []
    loss.register_forward_hook(lambda _, args, value: seen.append((*args, value)))
    before = model.linear.weight.detach().clone()
    runner.train()
    assert len(seen) == 8 and not torch.equal(model.linear.weight, before)
    for pred, target, value in seen:
        assert pred.dtype == torch.bfloat16 and value.dtype == torch.float32
        assert rambo_loss(auxiliary=None)(pred.detach().float(), target) == value


# A full disk


def full_disk(monkeypatch, module, name):
    """Let a module's writing stop half way for files whose path has a name in it."""

    class Half(io.FileIO):
        def write(self, data):
            super().write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.name))

    def half(path, mode='r', *args, **kwargs):
        if 'w' not in mode or name not in str(path):
            return open(path, mode, *args, **kwargs)
        file = Half(path, 'w')
        return file if 'b' in mode else io.TextIOWrapper(file)

    monkeypatch.setattr(module, 'open', half, raising=False)


def trained_until_the_disk_is_full(work_dir, monkeypatch, where, **checkpoint):
    checkpoint = dict(interval=1, **checkpoint)
    module, name = where
    full_disk(monkeypatch, module, name)
    runner, _ = train(rambo_loss(), [], work_dir, 3, checkpoint=checkpoint)
    with pytest.raises(OSError, match='No space left'):
        runner.train()
    monkeypatch.undo()


def resumed(work_dir, **checkpoint):
    last = Path((work_dir / 'last_checkpoint').read_text())
    assert load_checkpoint(last)['meta']['epoch'] == 1
    checkpoint = dict(interval=1, **checkpoint)
    runner, model = train(
        rambo_loss(), [], work_dir, 3, resume=True, checkpoint=checkpoint
    )
    runner.train()
    assert len(model.seen) == 8 and runner.epoch == 3
    return sorted(path.name for path in work_dir.glob('*.pth*'))


SAFE = (checkpoint_module, 'epoch_2.pth')
STOCK = (local_backend, 'epoch_2.pth')
# Both hooks write last_checkpoint with the code of mmengine.
POINTER = (stock_hook, 'last_checkpoint')


@pytest.mark.parametrize('keep', [-1, 1, 2])
def test_full_disk_with_the_safe_hook(tmp_path, monkeypatch, keep):
    settings = dict(type='SafeCheckpointHook', max_keep_ckpts=keep)
    trained_until_the_disk_is_full(tmp_path, monkeypatch, SAFE, **settings)
    # Nothing half written takes the room that is needed so badly.
    assert [path.name for path in tmp_path.glob('epoch*')] == ['epoch_1.pth']
    kept = dict([(-1, [1, 2, 3]), (1, [3]), (2, [2, 3])])[keep]
    assert resumed(tmp_path, **settings) == [f'epoch_{i}.pth' for i in kept]


def test_full_disk_while_the_last_checkpoint_is_named(tmp_path, monkeypatch):
    settings = dict(type='SafeCheckpointHook')
    runner, _ = train(rambo_loss(), [], tmp_path, 1, checkpoint=settings)
    runner.train()
    full_disk(monkeypatch, *POINTER)
    runner, _ = train(rambo_loss(), [], tmp_path, 2, resume=True, checkpoint=settings)
    with pytest.raises(OSError, match='No space left'):
        runner.train()
    monkeypatch.undo()
    resumed(tmp_path, **settings)


def test_full_disk_with_the_stock_hook(tmp_path, monkeypatch):
    """It survives where all checkpoints are kept; a half-written file remains.

    Nothing is left where it keeps one: why there is a SafeCheckpointHook.
    """
    settings = dict(type='CheckpointHook')
    trained_until_the_disk_is_full(tmp_path / 'a', monkeypatch, STOCK, **settings)
    with pytest.raises(ValueError, match='newest complete one there is'):
        load_checkpoint(tmp_path / 'a' / 'epoch_2.pth')
    resumed(tmp_path / 'a', **settings)
    settings['max_keep_ckpts'] = 1
    trained_until_the_disk_is_full(tmp_path / 'b', monkeypatch, STOCK, **settings)
    assert not Path((tmp_path / 'b' / 'last_checkpoint').read_text()).exists()


def test_a_best_checkpoint_is_kept_by_the_safe_hook_too(tmp_path):
    scores = iter(range(3))

    class Rising(Restless):
        def compute_metrics(self, results):
            return dict(score=next(scores))

    settings = dict(type='SafeCheckpointHook', interval=1, max_keep_ckpts=1)
    settings.update(save_best='score', rule='greater')
    validation = dict(val_dataloader=loader(examples(number=6)), val_cfg=dict())
    validation.update(checkpoint=settings, val_evaluator=[Rising()])
    runner, _ = train(rambo_loss(), [], tmp_path, 3, **validation)
    runner.train()
    names = sorted(path.name for path in tmp_path.glob('*.pth*'))
    assert names == ['best_score_epoch_3.pth', 'epoch_3.pth']


# Workers


class Breaking:
    """Examples of which one cannot be loaded."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 13:
            if self.how == 'exit':
                os._exit(3)
            raise OSError(errno.EIO, 'a broken image', '13.jpg')
        return torch.zeros(2), index % 4


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    'how, workers, error, match',
    [
        ('raise', 0, OSError, 'a broken image'),
        ('raise', 2, OSError, 'Caught OSError in DataLoader worker process'),
        ('exit', 2, RuntimeError, 'DataLoader worker .* exited unexpectedly'),
    ],
)
def test_a_worker_that_crashes_stops_the_training(tmp_path, how, workers, error, match):
    data = loader(Breaking(how), num_workers=workers)
    runner, model = train(rambo_loss(), [], tmp_path, 1, train_dataloader=data)
    with pytest.raises(error, match=match):
        runner.train()
    assert len(model.seen) < 4


# Long runs


def _in_use():
    """Return the resident memory in MB, where the system tells, and all tensors."""
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    status = Path('/proc/self/statm')
    pages = int(status.read_text().split()[1]) if status.exists() else 0
    return pages * resource.getpagesize() / 2**20, tensors


@pytest.mark.slow
def test_ten_thousand_steps_of_random_shapes_need_no_more_memory():
    torch.set_num_threads(1)
    loss_cls = RaMBOLoss(class_ap=dict(span='memory'))
    numbers = random.Random(0)
    used = []
    for step in range(10_000):
        rows = numbers.randrange(0, 300)
        pred = torch.randn(rows, 5, requires_grad=True)
        target = torch.randint(0, 6, (rows,))
        weight = (torch.rand(rows) < 0.9).float()
        loss = loss_cls(pred, target, weight)
        loss.backward()
        if step % 10 == 0:
            loss_cls.get_accuracy(pred, target)
        assert loss.isfinite()
        if step % 1000 == 999:
            used.append(_in_use())
    assert len(loss_cls.remembered) == 7
    memory, tensors = zip(*used)
    assert tensors[-1] == tensors[0], used
    # The scores and gradients of all steps, if kept, would be 50 MB.
    assert memory[-1] - memory[1] < 8, used
