"""A training of tools/experiments/converged.py that may be stopped and goes on."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import numpy as np
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger

from tools.common.atomic_file import atomic_file

TRAIN, TEST = (Path(__file__).with_name(f'{name}.py') for name in ('train', 'test'))
KEY = 'pascal_voc/mAP'  # one IoU threshold, 0.5: AP50, not rounded
PACKAGES = ('torch', 'mmdet', 'mmcv', 'mmengine', 'rambo_det')
_VARIABLE = re.compile(r'\{\{[\'"]?\s*\$(\w+)\s*:\s*(\S*?)\s*[\'"]?\}\}')


class RunError(Exception):
    """A step of a run has failed."""


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on.

    That of rambo_det has a hash of its source behind it, since a working copy
    changes without its version.
    """
    found = {name: import_module(name).__version__ for name in PACKAGES}
    package = Path(import_module('rambo_det').__file__).parent
    source = hashlib.sha256()
    for path in sorted(package.rglob('*.py')):
        source.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    found['rambo_det'] += f'+{source.hexdigest()[:8]}'
    return {'python': sys.version.split()[0], **found}


@contextlib.contextmanager
def alone_in(folder: Path, wait: bool = True) -> Iterator[int]:
    """Keep other processes that ask for the same out of a folder.

    Raises:
        RunError: If another one is there and this one must not wait.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield lock
    except BlockingIOError:
        raise RunError(
            f'another process is at work in {folder}; wait for it or stop it'
        ) from None
    finally:
        os.close(lock)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Parse ``--cfg-options`` as mmdet's scripts do.

    Raises:
        ValueError: If an option is no pair or would set the seed.
    """
    for option in options:
        if '=' not in option or option.startswith('randomness.seed='):
            raise ValueError(
                '--cfg-options must be pairs key=value and leave the seed to --seeds, '
                f'got {option!r}'
            )
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='*', action=DictAction)
    return parser.parse_args(['--options', *options]).options


def resolve(path: Path, options: Sequence[str]) -> dict[str, Any]:
    """Return what of a config can change a result, but for the seed.

    The names of environment variables stand where the config has the paths in them, so
    that it is the same where the data are moved.

    Raises:
        ValueError: If there is no such file.
    """
    if not path.is_file():
        raise ValueError(f'CONFIG must be a config file, got {path}')
    # mmengine tells of every environment variable that it reads.
    MMLogger.get_instance('mmengine').setLevel(logging.WARNING)
    variables = _VARIABLE.findall(Config.fromfile(path).text)
    before = dict(os.environ)
    try:
        # A default with a slash says that the variable holds a path.
        os.environ.update({n: f'${n}' for n, default in variables if '/' in default})
        cfg = Config.fromfile(path)
    finally:
        os.environ.clear()
        os.environ.update(before)
    cfg.merge_from_dict({**parse_options(options), 'randomness.seed': None})
    found = json.loads(json.dumps(cfg.to_dict(), sort_keys=True, default=repr))
    # Where types are imported from, and a check that stops a training or does nothing.
    found.pop('custom_imports', None)
    if found.get('default_hooks'):
        found['default_hooks'] = {
            name: hook
            for name, hook in found['default_hooks'].items()
            if not isinstance(hook, dict) or hook.get('type') != 'NumClassCheckHook'
        }
    return found


def _flat(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the path of every leaf, and the leaf."""
    if isinstance(value, (dict, list)) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in pairs:
            yield from _flat(child, f'{path}.{key}' if path else str(key))
    else:
        yield path, repr(value)


def changes(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 5) -> str:
    """Say in a line what differs between two resolved configs."""
    before, after = dict(_flat(old)), dict(_flat(new))
    texts = [
        f'{key}: {before.get(key, "nothing")} -> {after.get(key, "nothing")}'
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    more = f' and {len(texts) - limit} more' if len(texts) > limit else ''
    return '; '.join(texts[:limit]) + more


@dataclass(frozen=True)
class Training:
    """A config to be trained and tested with a seed.

    Attributes:
        config: The config.
        resolved: What of it can change the result.
        seed: The seed.
        folder: The work dir.
        options: The ``--cfg-options``, as they came.
    """

    config: Path
    resolved: dict[str, Any]
    seed: int
    folder: Path
    options: Sequence[str]

    @property
    def sha(self) -> str:
        """The SHA-256 of the resolved config."""
        return hashlib.sha256(json.dumps(self.resolved).encode()).hexdigest()

    @cached_property
    def state(self) -> dict[str, Any]:
        """What is known of it; written to run.json in its folder."""
        path = self.folder / 'run.json'
        return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}

    def note(self, **news: Any) -> None:
        """Add to what is known of it."""
        self.state.update(news)
        with atomic_file(self.folder / 'run.json') as draft:
            draft.write_text(json.dumps(self.state), encoding='utf-8')

    def checkpoint(self) -> Path | None:
        """Find the last checkpoint, even if the folder was moved."""
        pointer = self.folder / 'last_checkpoint'
        if not pointer.is_file():
            return None
        path = self.folder / Path(pointer.read_text().strip()).name
        return path if path.is_file() else None

    def refuse(self) -> None:
        """Raise if what is there must not be used.

        Raises:
            ValueError: If a checkpoint is there that is not known to be of this config.
        """
        if self.checkpoint() is None or self.state.get('config_sha') == self.sha:
            return
        said = 'no run.json says with what config'
        if self.state:
            differs = changes(self.state['resolved'], self.resolved)
            said = f'another config than it is now ({differs}); restore the config'
        raise ValueError(
            f'{self.folder} was trained with {said}, or move or delete that folder'
        )

    def make(self) -> dict[str, Any]:
        """Train from the last checkpoint on, if need be, and test; return a record.

        Raises:
            RunError: If a step fails.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone_in(self.folder, wait=False) as lock:
            if not (self.state.get('trained') and self.checkpoint()):
                self._train(lock)
            checkpoint = self.checkpoint()
            if checkpoint is None:
                raise RunError(f'the training left no checkpoint in {self.folder}')
            dump = self.folder / 'detections.pkl'
            command = [TEST, self.config, checkpoint, '--out', dump]
            self._step(lock, [*command, '--work-dir', self.folder / 'test'])
            return evaluate(self, dump)

    def _train(self, lock: int) -> None:
        checkpoint, state = self.checkpoint(), self.state
        if checkpoint is None:
            # What an attempt without a checkpoint has left is of no use.
            state.update(config_sha=self.sha, resolved=self.resolved, sessions=0)
            state.update(since=time.strftime('%Y%m%d_%H%M%S'), train_seconds=0.0)
        self.note(sessions=state['sessions'] + 1, versions=versions(), trained=False)
        command = [TRAIN, self.config, '--work-dir', self.folder]
        command += ['--resume', checkpoint] if checkpoint else []
        keep = 'default_hooks.checkpoint.max_keep_ckpts'
        # It deletes the old one first: stopped in between, nothing would be left.
        more = [f'{keep}=2'] if dict(_flat(self.resolved)).get(keep) == '1' else []
        begin = time.monotonic()
        try:
            self._step(lock, command, more)
            state['trained'] = True
        finally:
            self.note(train_seconds=state['train_seconds'] + time.monotonic() - begin)

    def _step(self, lock: int, command: list[Any], more: Sequence[str] = ()) -> None:
        """Run a script of mmdet; stop it with all its processes if this one is stopped.

        Raises:
            RunError: If its exit status is not 0.
        """
        options = [*self.options, f'randomness.seed={self.seed}', *more]
        command = [sys.executable, '-W', 'ignore', *command, '--cfg-options', *options]
        command = [str(part) for part in command]
        path = self.folder / 'train.log'
        print(f'{time.strftime("%H:%M:%S")} {shlex.join(command[3:])}', flush=True)
        with path.open('a', encoding='utf-8') as log:
            log.write(f'\n$ {shlex.join(command)}\n')
            log.flush()
            # A session of its own, to stop it with all processes it has started. They
            # keep the lock, should this process be killed.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'},
                start_new_session=True,
                pass_fds=[lock],
            )
            try:
                status = process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        if status:
            lines = path.read_text(errors='replace').splitlines()
            tail = [f'    {line}' for line in lines if line.strip()][-12:]
            text = f'{Path(command[3]).name} ended with status {status}; log: {path}'
            raise RunError('\n'.join([text, *tail]))


def training_curve(folder: Path, since: str = '') -> list[dict[str, float]]:
    """Read what was logged, a mean for each epoch, and AP50 where it was evaluated.

    What a run that was interrupted had logged is replaced by what it logged of the
    same iterations when it went on.

    Args:
        folder: The work dir.
        since: The time at which the training began, like the name of a log's folder.
    """
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    # The folders' names are the times at which they were made.
    for path in sorted(folder.glob('2*/vis_data/scalars.json')):
        if path.parts[-3] < since:
            continue
        for text in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off when stopped
                line = json.loads(text)
                lines['loss' in line, line['step']] = line
    epochs: dict[int, dict[str, list[float]]] = {}
    for (training, step), line in lines.items():
        values = epochs.setdefault(line['epoch'] if training else step, {})
        for key, value in line.items():
            if training and (key.startswith('loss') or key.endswith('_ap')):
                values.setdefault(key, []).append(value)
        if not training and KEY in line:
            values['AP50'] = [100 * line[KEY]]
    return [
        dict(epoch=epoch, **{k: float(f'{np.mean(v):.5g}') for k, v in values.items()})
        for epoch, values in sorted(epochs.items())
        if values
    ]


def evaluate(training: Training, dump: Path) -> dict[str, Any]:
    """Return the record of a training, from what the test script has dumped.

    The detections are kept in ``detections.npz``.

    Raises:
        RunError: If AP50 is not what mmdet has printed.
    """
    from tools.analysis_tools.detections import (
        best_f1,
        coco_class_ap,
        load_run,
        save_detections,
    )

    folder, state = training.folder, training.state
    # The script has left the config there with the options in it.
    run = load_run(folder / 'test' / training.config.name, dump)
    coco = coco_class_ap(run)
    by_iou = [np.nanmean(row) for row in coco]  # 0.5, 0.55, … 0.95
    report = sorted((folder / 'test').glob('2*/2*.json'))[-1]
    printed = json.loads(report.read_text()).get(KEY)
    if printed is not None and abs(printed - run.mean_ap) > 1e-5:
        raise RunError(f'AP50 is {run.mean_ap:.6f}, but {printed:.6f} in {report}')
    f1, threshold, f1_at_half = best_f1(run)
    save_detections(run, folder / 'detections.npz')
    dump.unlink()

    def percent(value: float, digits: int = 3) -> float | None:
        return None if np.isnan(value) else round(100 * float(value), digits)

    return dict(
        AP50=percent(run.mean_ap),
        AP=percent(np.mean(by_iou)),
        AP75=percent(by_iou[5]),
        best_f1=percent(f1),
        best_threshold=round(threshold, 4),
        f1_at_half=percent(f1_at_half),
        images=len(run.images),
        seconds=round(state['train_seconds'], 1),
        sessions=state['sessions'],
        versions=state['versions'],
        class_AP50={
            name: percent(curve.ap if curve.objects else np.nan, 2)
            for name, curve in zip(run.classes, run.curves)
        },
        class_AP={n: percent(v, 2) for n, v in zip(run.classes, coco.mean(axis=0))},
        curve=training_curve(folder, state['since']),
    )
