"""Processes side by side, with progress, for tools/compare.py."""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Sequence

LOG = 'train.log'
_TRAIN = re.compile(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\]')
_VALIDATION = re.compile(r'Epoch\(val\)\s+\[(\d+)\].*?AP50: ([0-9.]+)')
_SECONDS_TO_STOP = 15.0


class Stopped(BaseException):
    """The user or the system asked the program to stop; holds the signal."""


@dataclass
class Job:
    """A run: steps one after the other, and what to do with their results.

    Attributes:
        label: What to call it.
        kind: Jobs of the same kind take about as long.
        folder: Where its log is; one process at a time may work there.
        epochs: How many epochs its training has.
        steps: Name and command of each step, the command made when it is due.
        ended: Called with a step, its exit status (None where it was stopped) and
            the seconds it took.
        finish: Called after the last step; returns what to report.
        done: The share of the training that is done before it starts.
    """

    label: str
    kind: str
    folder: Path
    epochs: int
    steps: Sequence[tuple[str, Callable[[], list[str]]]]
    ended: Callable[[str, int | None, float], None]
    finish: Callable[[], str]
    done: float = 0.0


@dataclass
class Failure:
    """A job that did not finish, and why."""

    label: str
    reason: str
    log: Path
    tail: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f'{self.label} failed: {self.reason}; log: {self.log}']
        return '\n'.join(lines + [f'    {line}' for line in self.tail])


class Progress:
    """How far a training is, read from its log as the log grows."""

    def __init__(self, log: Path, epochs: int, done: float = 0.0):
        self.share = done
        self.where = ''
        self.ap50: tuple[int, float] | None = None
        self._log, self._epochs = log, epochs
        self._offset = log.stat().st_size if log.is_file() else 0

    def read(self) -> None:
        """Take in the lines that were added since the last call."""
        with self._log.open('rb') as file:
            file.seek(self._offset)
            text = file.read()
        # The last line may be half written.
        text = text[: text.rfind(b'\n') + 1]
        self._offset += len(text)
        for line in text.decode(errors='replace').splitlines():
            found = _TRAIN.search(line)
            if found:
                epoch, iteration, total = map(int, found.groups())
                self.share = (epoch - 1 + iteration / total) / self._epochs
                self.where = f'epoch {epoch}/{self._epochs}, {iteration}/{total}'
            found = _VALIDATION.search(line)
            if found:
                self.ap50 = int(found[1]), float(found[2])


def remaining(done_before: float, done: float, seconds: float) -> float | None:
    """Return the seconds that are left, or None while nothing is known.

    Args:
        done_before: The share that was done at the start.
        done: The share that is done.
        seconds: The time since the start.
    """
    if done <= done_before:
        return None
    return (1 - done) * seconds / (done - done_before)


def total_remaining(
    active: Sequence[float | None], queued: Sequence[float | None], slots: int
) -> float | None:
    """Return the seconds until all is done, if every job takes as long as guessed.

    Args:
        active: What is left of each job that runs.
        queued: How long each job will take that does not, in their order.
        slots: How many jobs run at a time.
    """
    if any(seconds is None for seconds in (*active, *queued)):
        return None
    ends = sorted([*active, *[0.0] * (slots - len(active))])
    for seconds in queued:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends, default=0.0)


def duration(seconds: float | None) -> str:
    """Lay out a time."""
    if seconds is None:
        return '?'
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


class _Active:
    """A job at work."""

    def __init__(self, job: Job, environment: dict[str, str]):
        self.job = job
        self.step = -1
        self.process: subprocess.Popen | None = None
        self.progress = Progress(job.folder / LOG, job.epochs, job.done)
        self.reported: object = None
        self.begin = self.last_report = time.monotonic()
        self._environment = environment
        self._lock = self._take_lock()

    def _take_lock(self) -> int:
        """Keep others away, also while a process of a killed program goes on."""
        lock = os.open(self.job.folder / 'lock', os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise RuntimeError(
                f'another process is at work in {self.job.folder}; wait for it or '
                'stop it'
            ) from None
        return lock

    def next_step(self) -> bool:
        """Start the next step, if there is one."""
        self.step += 1
        if self.step == len(self.job.steps):
            return False
        command = self.job.steps[self.step][1]()
        self.started = time.monotonic()
        with (self.job.folder / LOG).open('a', encoding='utf-8') as log:
            log.write(f'\n$ {shlex.join(command)}\n')
            log.flush()
            # A session of its own: Ctrl-C in the terminal goes to this program
            # alone, which then stops the step with all processes it has started.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                pass_fds=[self._lock],
            )
        return True

    def ended(self, status: int | None) -> None:
        """Tell the job that its step has ended."""
        self.process = None
        name = self.job.steps[self.step][0]
        self.job.ended(name, status, time.monotonic() - self.started)

    def stop(self) -> None:
        """Stop the step's processes, by force where asking does not help."""
        if self.process is None:
            return
        _signal(self.process, signal.SIGTERM)
        try:
            self.process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            _signal(self.process, signal.SIGKILL)
            self.process.wait()
        self.ended(None)

    def release(self) -> None:
        """Let others work in the folder."""
        os.close(self._lock)


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class Pool:
    """Runs jobs, so many at a time.

    Args:
        slots: How many at a time.
        threads: How many threads each may use.
        poll: Seconds between looks at the processes.
        report_every: Seconds after which progress is reported again.
    """

    def __init__(
        self,
        slots: int,
        threads: int,
        poll: float = 1.0,
        report_every: float = 120.0,
    ):
        self.slots, self.poll, self.report_every = slots, poll, report_every
        # Threads that wait must not spin where others want the cores too.
        self._environment = {
            'OMP_WAIT_POLICY': 'PASSIVE',
            **os.environ,
            'OMP_NUM_THREADS': str(threads),
            'PYTHONUNBUFFERED': '1',
        }
        self._queue: list[Job] = []
        self._active: list[_Active] = []
        self._durations: dict[str, list[float]] = {}
        self.failures: list[Failure] = []

    def run(self, jobs: Sequence[Job]) -> list[Failure]:
        """Run all jobs, whatever becomes of any of them; return what failed."""
        self._queue = list(jobs)
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, _raise) for number in signals}
        try:
            while self._queue or self._active:
                while self._queue and len(self._active) < self.slots:
                    self._start(self._queue.pop(0))
                for active in list(self._active):
                    self._look_after(active)
                if self._active:
                    time.sleep(self.poll)
        finally:
            # Being asked once more must not leave processes behind.
            for number in signals:
                signal.signal(number, signal.SIG_IGN)
            for active in self._active:
                active.stop()
                active.release()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.failures

    def _start(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        try:
            active = _Active(job, self._environment)
        except RuntimeError as error:
            self._fail(job, str(error))
            return
        self._active.append(active)
        begins = f'goes on after {job.done:.0%}' if job.done else 'begins'
        self._report(active, begins)
        self._step(active)

    def _step(self, active: _Active) -> None:
        """Start the next step or finish the job."""
        try:
            if active.next_step():
                return
            result = active.job.finish()
        except Exception as error:  # one run must not take the others with it
            self._end(active)
            self._fail(active.job, f'{type(error).__name__}: {error}')
            return
        self._end(active)
        self._report(active, result)

    def _look_after(self, active: _Active) -> None:
        status = active.process.poll()
        active.progress.read()
        self._report_progress(active, running=status is None)
        if status is None:
            return
        job, step = active.job, active.job.steps[active.step][0]
        if step == 'train' and not status and job.done < 1:
            seconds = (time.monotonic() - active.started) / (1 - job.done)
            self._durations.setdefault(job.kind, []).append(seconds)
            active.progress.share = 1.0
        active.ended(status)
        if status:
            self._end(active)
            lines = (job.folder / LOG).read_text(errors='replace').splitlines()
            tail = [line for line in lines if line.strip()][-12:]
            self._fail(job, f'{step} ended with status {status}', tail)
        else:
            self._report(active, f'{step} is done')
            self._step(active)

    def _end(self, active: _Active) -> None:
        self._active.remove(active)
        active.release()

    def _fail(self, job: Job, reason: str, tail: Sequence[str] = ()) -> None:
        failure = Failure(job.label, reason, job.folder / LOG, list(tail))
        self.failures.append(failure)
        _print(f'{job.label}: FAILED, {reason}')

    def _report_progress(self, active: _Active, running: bool) -> None:
        progress = active.progress
        late = time.monotonic() - active.last_report >= self.report_every
        if progress.ap50 != active.reported:
            active.reported = progress.ap50
            epoch, ap50 = progress.ap50
            self._report(active, f'AP50 {100 * ap50:.1f} after epoch {epoch}')
        elif running and late and progress.where:
            self._report(active, progress.where)

    def _report(self, active: _Active, event: str) -> None:
        active.last_report = time.monotonic()
        _print(f'{active.job.label}: {event} (all: {duration(self._eta())} left)')

    def _left(self, active: _Active) -> float | None:
        job = active.job
        seconds = time.monotonic() - active.begin
        left = remaining(job.done, active.progress.share, seconds)
        return self._guess(job) if left is None else left

    def _guess(self, job: Job) -> float | None:
        """How long a job will take, by those of its kind, or else by all."""
        if job.done >= 1:
            return 0.0
        known = self._durations.get(job.kind) or [
            seconds for kind in self._durations.values() for seconds in kind
        ]
        for active in () if known else self._active:
            seconds = time.monotonic() - active.begin
            left = remaining(active.job.done, active.progress.share, seconds)
            if left is not None:
                known = [*known, (left + seconds) / (1 - active.job.done)]
        return (1 - job.done) * sum(known) / len(known) if known else None

    def _eta(self) -> float | None:
        return total_remaining(
            [self._left(active) for active in self._active],
            [self._guess(job) for job in self._queue],
            self.slots,
        )


def _raise(number: int, frame: object) -> None:
    raise Stopped(signal.Signals(number))


def _print(line: str) -> None:
    print(f'{time.strftime("%H:%M:%S")} {line}', flush=True)
