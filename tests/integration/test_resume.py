"""A resumed training is the uninterrupted one, or says why it cannot be."""

import copy
import io
import itertools
import os
import random
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet', reason='the hooks are registered in mmdet')
from mmengine.hooks import EarlyStoppingHook, Hook

from rambo_det.checkpoint import load_checkpoint
from rambo_det.functional import Past
from rambo_det.hooks import resume as resume_module
from rambo_det.hooks.resume import KEY, random_state, set_random_state
from rambo_det.losses import memory as memory_module
from tests.helpers.processes import run
from tests.helpers.toy_training import (
    Augmented,
    Restless,
    examples,
    loader,
    rambo_loss,
    train,
)
from tests.unit.test_rambo_loss import memory_loss, random_batch

EXACT = [dict(type='ExactResumeHook')]
EMA = dict(type='EMAHook', momentum=0.1, update_buffers=True)


def noisy_loss(**settings):
    """A loss with all that has to be restored: a memory and a margin of noise."""
    term = dict(class_ap=dict(span='memory', weight=1.0))
    return rambo_loss(**{'margin': 1.0, 'margin_noise': True, **term, **settings})


def noisy_training(work_dir, hooks, resume=False, loop=None, **settings):
    validation = dict(
        val_dataloader=loader(examples(number=6)),
        val_cfg=dict(),
        val_evaluator=[Restless()],
        train_dataloader=loader(Augmented(examples()), shuffle=True),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.05)),
    )
    loop = loop or dict(by_epoch=True, max_epochs=4, val_interval=1)
    return train(
        noisy_loss(),
        hooks,
        work_dir,
        4,
        resume=resume,
        loop=loop,
        randomness=settings.pop('randomness', dict(seed=3)),
        **{**validation, **settings},
    )


def go_back_to(work_dir, name):
    """Leave the work folder as a kill after a checkpoint would."""
    for path in work_dir.glob('*.pth'):
        if path.name != name:
            path.unlink()
    (work_dir / 'last_checkpoint').write_text(str(work_dir / name))


def disturb():
    """Another process has other random states."""
    random.seed(), np.random.seed(), torch.seed()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(
        torch.equal(a[key], b[key]) for key in a if not key.endswith('_extra_state')
    )


ITERATIONS = dict(by_epoch=False, max_iters=14, val_interval=3)
BY_EPOCH = dict(name='epoch_2.pth')
BY_ITERATION = dict(
    name='iter_6.pth',
    loop=ITERATIONS,
    checkpoint=dict(type='CheckpointHook', interval=3, by_epoch=False),
)


@pytest.fixture
def no_sleep(monkeypatch):
    """mmengine waits two seconds where it begins with the data again."""
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda _: None)


@pytest.mark.parametrize('settings', [BY_EPOCH, BY_ITERATION], ids=['epoch', 'iter'])
@pytest.mark.parametrize('extra', [{}, dict(randomness=dict(seed=None))])
def test_a_resumed_training_is_the_uninterrupted_one(
    tmp_path, settings, extra, no_sleep
):
    settings = {**settings, **extra}
    name = settings.pop('name')
    runner, whole = noisy_training(tmp_path, EXACT, **settings)
    runner.train()
    go_back_to(tmp_path, name)
    disturb()
    runner, rest = noisy_training(tmp_path, EXACT, resume=True, **settings)
    runner.train()
    assert len(rest.seen) == len(whole.seen) - runner.max_iters // 2 + (
        1 if 'loop' in settings else 0
    )
    assert same(rest, whole)
    assert str(rest.loss.state_dict()) == str(whole.loss.state_dict())


class Spread(Restless):
    """A metric that depends on the weights alone, and goes up and down."""

    def compute_metrics(self, results):
        return dict(score=float(torch.stack(results).double().sum() * 1e3 % 1))


REACTING = dict(
    val_evaluator=[Spread()],
    param_scheduler=[
        dict(type='ReduceOnPlateauLR', monitor='score', rule='greater', patience=0)
    ],
    optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.05), accumulative_counts=3),
)


class Killed(BaseException):
    """Ends a training as a signal would."""


class KilledAtStages(Hook):
    """Keeps the files that are there before each validation, and may end the training.

    Args:
        begins: Whether it ends before its first epoch.
    """

    priority = 'LOWEST'

    def __init__(self, begins=False):
        self.begins = begins

    def before_val(self, runner):
        for path in Path(runner.work_dir).glob('[ei]*.pth'):
            kept = path.parent / 'before' / path.name
            if not kept.exists() and kept.parent.exists():
                shutil.copy(path, kept)

    def before_train_epoch(self, runner):
        if self.begins:
            raise Killed


@pytest.mark.parametrize('saver', ['CheckpointHook', 'SafeCheckpointHook'])
@pytest.mark.parametrize('by_epoch', [True, False])
def test_what_reacts_to_metrics_and_gradients_that_wait_go_on(
    tmp_path, saver, by_epoch, no_sleep
):
    """From every checkpoint, saved before or amid a validation, or between updates.

    Also if it is killed again when it has done the validation that was left.
    """
    folder, stop = tmp_path / 'whole', dict(monitor='score', rule='greater')
    stop.update(type='EarlyStoppingHook', patience=2, min_delta=0.0)
    checkpoint = dict(type=saver, save_best='score', rule='greater', by_epoch=by_epoch)
    if by_epoch:
        loop = dict(by_epoch=True, max_epochs=12, val_interval=1)
        checkpoint['interval'] = 1
    else:
        loop = dict(by_epoch=False, max_iters=40, val_interval=4)
        checkpoint['interval'] = 2
    settings = dict(REACTING, checkpoint=checkpoint, loop=loop)

    def finish(folder, resume, begins=False):
        hooks = [*EXACT, stop, KilledAtStages(begins)]
        runner, model = noisy_training(folder, hooks, resume=resume, **settings)
        if begins:
            with suppress(Killed):  # unless that was the last validation
                runner.train()
            return None
        runner.train()
        (stopper,) = (h for h in runner.hooks if isinstance(h, EarlyStoppingHook))
        info = runner.message_hub.runtime_info
        best = info['best_score'], Path(info['best_ckpt']).name
        lr = runner.optim_wrapper.get_lr()['lr']
        return runner.iter, lr, best, stopper.wait_count, stopper.best_score, model

    (folder / 'before').mkdir(parents=True)
    *whole, model = finish(folder, False)
    assert 12 < whole[0] < 40 and whole[1][0] < 0.05 and whole[3] == 2
    files = sorted([*folder.glob('[ei]*.pth'), *folder.glob('before/*.pth')])
    assert len(files) > 8
    for number, file in enumerate(files):
        again = tmp_path / str(number)
        again.mkdir()
        shutil.copy(file, again)
        (again / 'last_checkpoint').write_text(str(again / file.name))
        if file.parent.name == 'before':
            disturb()
            finish(again, True, begins=True)
        disturb()
        *rest, other = finish(again, True)
        assert rest == whole, file
        assert same(other, model), file
        # The stock hook deletes what was the best one of the other training.
        assert (folder / whole[2][1]).exists() or saver == 'CheckpointHook'


@pytest.mark.parametrize('position', [-1, 625, 10**9])
def test_a_random_state_beyond_its_keys_is_refused(position):
    state = random_state()
    state['numpy']['position'] = position
    with pytest.raises(ValueError, match='a position among them'):
        set_random_state(state)


@pytest.mark.parametrize('settings', [BY_EPOCH, BY_ITERATION], ids=['epoch', 'iter'])
def test_without_the_hook_it_is_another_one(tmp_path, settings, no_sleep):
    """Shows that the preceding test looks at what the hook is for."""
    settings = dict(settings)
    name = settings.pop('name')
    runner, whole = noisy_training(tmp_path, [], **settings)
    runner.train()
    go_back_to(tmp_path, name)
    runner, rest = noisy_training(tmp_path, [], resume=True, **settings)
    runner.train()
    assert not same(rest, whole)


def test_validation_does_not_disturb_the_training(tmp_path):
    runs = []
    for interval in (1, 9):
        loop = dict(by_epoch=True, max_epochs=3, val_interval=interval)
        runner, model = noisy_training(tmp_path / str(interval), EXACT, loop=loop)
        runner.train()
        runs.append(model)
    assert same(*runs)


def test_workers_that_start_anew_each_epoch_are_exact_too(tmp_path):
    data = loader(
        Augmented(examples()), shuffle=True, num_workers=1, persistent_workers=False
    )
    loop = dict(by_epoch=True, max_epochs=2)
    settings = dict(train_dataloader=data, loop=loop)
    runner, whole = noisy_training(tmp_path, EXACT, **settings)
    runner.train()
    go_back_to(tmp_path, 'epoch_1.pth')
    disturb()
    runner, rest = noisy_training(tmp_path, EXACT, resume=True, **settings)
    runner.train()
    assert same(rest, whole)


def test_random_states_round_trip_through_a_safe_checkpoint():
    random.gauss(0, 1), np.random.randn()  # each keeps a second number for later
    file = io.BytesIO()
    torch.save(random_state(), file)

    def draw():
        numbers = [random.gauss(0, 1), random.random(), *np.random.randn(3)]
        return [*numbers, *torch.randn(3).tolist()]

    expected = draw()
    disturb()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert draw() == expected


class Warnings:
    """Catches what the runner warns of."""

    def __init__(self, runner, monkeypatch):
        self.lines = []
        monkeypatch.setattr(runner.logger, 'warning', self.lines.append)

    def about(self, text):
        return [line for line in self.lines if text in line]


def trained(tmp_path, hooks=EXACT):
    """Return a work folder with two epochs in it."""
    loop = dict(by_epoch=True, max_epochs=2)
    runner, _ = noisy_training(tmp_path, hooks, loop=loop)
    runner.train()
    return tmp_path


def test_loading_weights_for_another_training_restores_nothing(tmp_path):
    path = trained(tmp_path / 'a') / 'epoch_2.pth'
    assert any('_extra_state' in key for key in load_checkpoint(path)['state_dict'])
    model = train(noisy_loss(), EXACT, tmp_path / 'b', 1, load_from=str(path))
    runner, model = model
    first = []

    class Look(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            first.append(len(model.loss.remembered))

    runner.register_hook(Look())
    runner.train()
    assert first[0] == 0 and first[1] == 1
    assert runner.iter == 4


def rewrite(path, change):
    checkpoint = load_checkpoint(path)
    change(checkpoint)
    torch.save(checkpoint, path)


STOP = dict(type='EarlyStoppingHook', monitor='score', rule='greater', patience=9)


@pytest.mark.parametrize(
    'change, hooks, match',
    [
        (lambda file: file[KEY].update(processes=4), [], 'it has 4 processes and this'),
        (
            lambda file: file[KEY].update(states=[]),
            [],
            'state of only 0 of 1 processes',
        ),
        (
            lambda file: file.pop(KEY),
            [],
            'not go on exactly .* saved without this hook',
        ),
        (
            lambda file: file.pop('optimizer'),
            [],
            'has no optimizer, whose states begin',
        ),
        (lambda file: None, [STOP], 'not restored: EarlyStoppingHook'),
    ],
)
def test_what_is_not_restored_is_named(tmp_path, monkeypatch, change, hooks, match):
    rewrite(trained(tmp_path) / 'epoch_2.pth', change)
    runner, _ = noisy_training(tmp_path, [*EXACT, *hooks], resume=True)
    seen = Warnings(runner, monkeypatch)
    runner.train()
    assert any(re.search(match, line) for line in seen.lines)


# What cannot be resumed


def test_another_number_of_classes_is_refused(tmp_path):
    trained(tmp_path)
    runner, _ = noisy_training(tmp_path, EXACT, resume=True, classes=5)
    with pytest.raises(ValueError, match='linear.weight has shape') as error:
        runner.train()
    message = str(error.value)
    assert '(3, 2) and the model needs (5, 2)' in message and 'load_from' in message


def test_missing_weights_are_refused(tmp_path):
    path = trained(tmp_path) / 'epoch_2.pth'
    rewrite(path, lambda checkpoint: checkpoint['state_dict'].pop('linear.bias'))
    runner, _ = noisy_training(tmp_path, EXACT, resume=True)
    with pytest.raises(ValueError, match='linear.bias is missing. Check num_classes'):
        runner.train()


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'changed', 'missing'])
@pytest.mark.parametrize('hooks', [EXACT, []], ids=['exact', 'plain'])
@pytest.mark.parametrize('other', [True, False])
def test_a_damaged_checkpoint_is_named_with_a_good_one(tmp_path, damage, hooks, other):
    trained(tmp_path)
    last, good = tmp_path / 'epoch_2.pth', tmp_path / 'epoch_1.pth'
    data = last.read_bytes()
    error, expected = ValueError, 'is damaged, truncated, or not written by torch.save'
    if damage == 'missing':
        last.unlink()
        error, expected = FileNotFoundError, "no checkpoint .*epoch_2.pth' to load"
    elif damage == 'changed':  # in the middle, which is numbers
        middle = len(data) // 2
        last.write_bytes(data[:middle] + b'12345678' + data[middle + 8 :])
    else:
        last.write_bytes(data[: len(data) // 2 if damage == 'truncated' else 0])
    if not other:
        good.unlink()
    runner, _ = noisy_training(tmp_path, hooks, resume=True)
    with pytest.raises(error, match=expected) as raised:
        runner.train()
    advice = f'newest complete one there is {good}' if other else 'no other complete'
    assert advice in str(raised.value)


@pytest.mark.parametrize(
    'saver, pointer',
    [
        *itertools.product(['exact', 'safe', 'safe, elsewhere'], [b'', None]),
        ('exact', bytes(40)),
        ('safe', b'\xff\xfe'),
    ],
)
def test_without_a_last_checkpoint_the_newest_complete_one_is_taken(
    tmp_path, monkeypatch, pointer, saver
):
    folder, checkpoint = tmp_path / 'work', dict(type='CheckpointHook', interval=1)
    hooks = EXACT if saver == 'exact' else []
    if saver != 'exact':
        checkpoint['type'] = 'SafeCheckpointHook'
    files = folder
    if saver == 'safe, elsewhere':
        checkpoint['out_dir'] = str(tmp_path / 'out')
        files = tmp_path / 'out' / 'work'
    settings = dict(checkpoint=checkpoint, loop=dict(by_epoch=True, max_epochs=3))
    runner, _ = noisy_training(folder, hooks, **settings)
    runner.train()
    (files / 'epoch_3.pth').write_bytes((files / 'epoch_3.pth').read_bytes()[:-99])
    shutil.copy(files / 'epoch_1.pth', files / 'best_score_epoch_1.pth')
    if pointer is None:
        (folder / 'last_checkpoint').unlink()
    else:
        (folder / 'last_checkpoint').write_bytes(pointer)
    runner, model = noisy_training(folder, hooks, resume=True, **settings)
    seen = Warnings(runner, monkeypatch)
    runner.train()
    assert seen.about(f'going on from {files / "epoch_2.pth"}')
    assert len(model.seen) == 4
    for path in files.glob('*.pth'):
        path.write_bytes(b'')
    (folder / 'last_checkpoint').write_text('')
    runner, _ = noisy_training(folder, hooks, resume=True, **settings)
    with pytest.raises(ValueError, match='no checkpoint there is complete'):
        runner.train()


def test_no_checkpoint_yet_means_from_the_start(tmp_path):
    """As mmengine does: the same command starts and resumes."""
    runner, model = train(rambo_loss(), EXACT, tmp_path, 1, resume=True)
    runner.train()
    assert len(model.seen) == 4


def test_workers_that_live_on_are_warned_of(tmp_path, monkeypatch):
    data = loader(examples(), num_workers=1, persistent_workers=True)
    runner, _ = train(rambo_loss(), EXACT, tmp_path, 1, train_dataloader=data)
    seen = Warnings(runner, monkeypatch)
    runner.train()
    assert seen.about('persistent_workers=False')


def test_a_checkpoint_within_an_epoch_is_warned_of(tmp_path, monkeypatch):
    checkpoint = dict(type='CheckpointHook', interval=3, by_epoch=False)
    loop = dict(by_epoch=True, max_epochs=2)
    settings = dict(checkpoint=checkpoint, loop=loop)
    runner, _ = noisy_training(tmp_path, EXACT, **settings)
    runner.train()
    go_back_to(tmp_path, 'iter_3.pth')
    runner, _ = noisy_training(tmp_path, EXACT, resume=True, **settings)
    seen = Warnings(runner, monkeypatch)
    runner.train()
    assert seen.about('at iteration 3, within an epoch of 4')


# The memory


@pytest.mark.parametrize('length, kept', [(2, 2), (9, 5), (0, 0)])
def test_a_memory_of_another_length_keeps_what_there_is(length, kept):
    running, other = memory_loss(memory=5), memory_loss(memory=length)
    batches = [random_batch(seed=seed) for seed in range(8)]
    for batch in batches[:6]:
        running(*batch)
    other.load_state_dict(running.state_dict())
    steps = other.get_extra_state()['scores']
    assert len(steps) == kept
    for found, (pred, _) in zip(reversed(steps), reversed(batches[:6])):
        assert torch.equal(found, pred.detach())
    for batch in batches[6:]:
        other(*batch)
    assert len(other.get_extra_state()['scores']) == min(kept + 2, length)


def as_process(monkeypatch, rank, processes):
    monkeypatch.setattr(memory_module, 'get_dist_info', lambda: (rank, processes))


@pytest.mark.parametrize(
    'saved, now, match',
    [
        ((0, 1), (1, 2), None),  # one had the images of all
        ((0, 4), (0, 1), 'by one of 4 processes and there are 1 now'),
        ((0, 2), (1, 2), 'is that of process 0; ExactResumeHook saves'),
        ((1, 2), (1, 2), None),
    ],
)
def test_the_memory_of_another_process_is_not_used(monkeypatch, saved, now, match):
    as_process(monkeypatch, *saved)
    running = memory_loss()
    running(*random_batch())
    state = running.state_dict()
    as_process(monkeypatch, *now)
    other = memory_loss()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        other.load_state_dict(state)
    if match is None:
        assert not seen and len(other.remembered) == 1
    else:
        assert match in str(seen[0].message) and len(other.remembered) == 0
        assert f'full after {other.memory} steps' in str(seen[0].message)


@pytest.mark.parametrize('now', [(1, 2), (0, 1), (3, 4)])
def test_a_memory_that_all_processes_share_is_right_for_any(monkeypatch, now):
    as_process(monkeypatch, 0, 2)
    shared, other = memory_module.ScoreMemory(3), memory_module.ScoreMemory(3)
    scores, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    shared.append(Past(scores, labels), shared=True)
    assert set(shared.state()) == {'scores', 'labels'}
    as_process(monkeypatch, *now)
    other.load(shared.state())
    assert torch.equal(other.recall(scores)[0].scores, scores)
    assert set(other.state()) == {'scores', 'labels'}
    other.append(Past(scores, labels))  # of its own from here on
    assert ('rank' in other.state()) == (now[1] > 1)


def test_each_process_gets_its_own_memory_back(tmp_path, monkeypatch):
    """The first process saves what all remember; here the second one resumes."""
    trained(tmp_path)
    path = tmp_path / 'epoch_2.pth'
    mine = dict(scores=[torch.full((4, 3), 7.0)], labels=[torch.zeros(4).long()])
    mine.update(rank=1, processes=2)

    def two_processes(checkpoint):
        saved = checkpoint[KEY]
        saved['processes'] = 2
        state = dict(saved['states'][0], memory=dict(loss=mine))
        saved['states'].append(state)

    rewrite(path, two_processes)
    runner, model = noisy_training(tmp_path, EXACT, resume=True)
    as_process(monkeypatch, 1, 2)
    monkeypatch.setattr(resume_module, 'get_world_size', lambda: 2)
    monkeypatch.setattr(resume_module, 'get_rank', lambda: 1)
    runner.load_or_resume()
    assert (model.loss.get_extra_state()['scores'][0] == 7).all()


def _in_two_processes(rank, folder, resume):
    """Train in one of two processes; return the weights and what is remembered."""
    os.environ.update(LOCAL_RANK=str(rank))
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
    runner, model = noisy_training(
        folder,
        EXACT,
        resume=resume,
        loop=dict(by_epoch=True, max_epochs=3),
        randomness=dict(seed=3, diff_rank_seed=True),
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=wrapper),
    )
    runner.train()
    return model.state_dict()


@pytest.mark.slow
def test_two_processes_resume_with_what_each_had(tmp_path):
    found = []
    for resume in (False, True):
        (tmp_path / str(resume)).mkdir()
        arguments = tmp_path / str(resume), tmp_path / 'work', resume
        found.append(run(_in_two_processes, 2, *arguments))
        go_back_to(tmp_path / 'work', 'epoch_2.pth')
        saved = load_checkpoint(tmp_path / 'work' / 'epoch_2.pth')
        assert len(saved[KEY]['states']) == saved[KEY]['processes'] == 2
    whole, resumed = found
    for states in zip(whole, resumed):
        for key, value in states[0].items():
            assert str(value) == str(states[1][key])
    memories = [str(state['loss._extra_state']['scores']) for state in whole]
    assert memories[0] != memories[1]


@pytest.mark.parametrize(
    'state',
    [
        dict(scores=[torch.zeros(4, 3)], labels=[]),
        dict(scores=[torch.zeros(4)], labels=[torch.zeros(4)]),
        dict(scores=[torch.zeros(4, 3)], labels=[torch.zeros(3)]),
        dict(scores=3, labels=4),
        dict(steps=[]),
        [1, 2],
    ],
)
def test_a_damaged_memory_is_refused(state):
    with pytest.raises(ValueError, match='the memory in the checkpoint must be'):
        memory_loss().load_state_dict({'_extra_state': state})


def test_idle_copies_have_no_memory_to_save():
    """What mmengine's averaged models rely on, see EMAHook."""
    loss_cls = memory_loss()
    loss_cls(*random_batch())
    other = copy.deepcopy(loss_cls)
    assert other.state_dict() == {} and len(other.remembered) == 1
    other.load_state_dict(loss_cls.state_dict())
    assert other.state_dict() == {} and len(other.remembered) == 1
    other(*random_batch())
    assert len(other.state_dict()['_extra_state']['scores']) == 2


# Averaged weights


@pytest.mark.parametrize('begin', [0, 2])
@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize('load', ['nothing', 'weights', 'no average'])
def test_ema(tmp_path, begin, update_buffers, load):
    """Validation and checkpoints have the averaged weights; training goes on."""
    ema = dict(EMA, begin_epoch=begin, update_buffers=update_buffers)
    settings = {}
    if load != 'nothing':  # from a training without EMA, with a full memory
        settings['load_from'] = str(
            trained(tmp_path / 'before', hooks=[]) / 'epoch_2.pth'
        )
        settings['resume'] = load == 'no average'
    in_validation = []

    class Look(Hook):
        priority = 'LOW'

        def before_val_epoch(self, runner):
            in_validation.append(copy.deepcopy(runner.model.state_dict()))

    runner, model = noisy_training(tmp_path / 'ema', [ema], **settings)
    runner.register_hook(Look())
    runner.train()
    saved = load_checkpoint(tmp_path / 'ema' / 'epoch_4.pth')
    averaged, own = saved['state_dict'], saved['ema_state_dict']
    assert torch.equal(averaged['linear.weight'], in_validation[-1]['linear.weight'])
    assert torch.equal(own['module.linear.weight'], model.linear.weight)
    assert not torch.equal(averaged['linear.weight'], model.linear.weight)
    # The memory is that of the training, and in one place.
    assert not any('_extra_state' in key for key in own)
    kept = averaged['loss._extra_state']['scores']
    for a, b in zip(kept, model.loss.get_extra_state()['scores']):
        assert torch.equal(a, b)
    assert len(kept) == model.loss.memory
