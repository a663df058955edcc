"""Processes side by side, for tools/experiments/compare.py."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Sequence

LOG = 'train.log'
_SECONDS_TO_STOP = 15.0


class Stopped(BaseException):
    """The user or the system asked the program to stop; holds the signal."""


@dataclass
class Job:
    """A run: steps one after the other, and what to do with their results.

    Attributes:
        label: What to call it.
        folder: Where its log is; one process at a time may work there.
        steps: Name and command of each step, the command made when it is due.
        ended: Called with a step, its exit status and the seconds it took.
        finish: Called after the last step, one job at a time; returns what to report.
        done: The share of the training that is done before it starts.
    """

    label: str
    folder: Path
    steps: Sequence[tuple[str, Callable[[], list[str]]]]
    ended: Callable[[str, int, float], None]
    finish: Callable[[], str]
    done: float = 0.0


@dataclass(eq=False)
class JobError(Exception):
    """A job that did not finish, and why."""

    label: str
    reason: str
    log: Path
    tail: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f'{self.label} failed: {self.reason}; log: {self.log}']
        return '\n'.join(lines + [f'    {line}' for line in self.tail])


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[int]:
    """Keep others away, also while a process of a killed program goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / 'lock', os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError:
        raise RuntimeError(
            f'another process is at work in {folder}; wait for it or stop it'
        ) from None
    finally:
        os.close(lock)


class Pool:
    """Runs jobs, so many at a time.

    Args:
        slots: How many at a time.
        threads: How many threads each may use.
    """

    def __init__(self, slots: int, threads: int):
        self.slots = slots
        # Threads that wait must not spin where others want the cores too.
        self._environment = {
            'OMP_WAIT_POLICY': 'PASSIVE',
            **os.environ,
            'OMP_NUM_THREADS': str(threads),
            'PYTHONUNBUFFERED': '1',
        }
        self._processes: set[subprocess.Popen] = set()
        self._guard, self._finishing = threading.Lock(), threading.Lock()
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> list[JobError]:
        """Run all jobs, whatever becomes of any of them; return what failed.

        Raises:
            Stopped: If a signal stopped it; then no process is left.
        """
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, _raise) for number in signals}
        workers = ThreadPoolExecutor(self.slots)
        try:
            found = [workers.submit(self._run, job) for job in jobs]
            errors = [future.exception() for future in found]
        finally:
            # Being asked once more must not leave processes behind.
            for number in signals:
                signal.signal(number, signal.SIG_IGN)
            self._stop()
            workers.shutdown()
            for number, handler in before.items():
                signal.signal(number, handler)
        return [error for error in errors if isinstance(error, JobError)]

    def _stop(self) -> None:
        """Stop all processes, by force where asking does not help."""
        with self._guard:
            self._stopped = True
            processes = [*self._processes]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            deadline = time.monotonic() + _SECONDS_TO_STOP
            while processes and time.monotonic() < deadline:
                time.sleep(0.05)
                processes = [p for p in processes if p.poll() is None]

    def _run(self, job: Job) -> None:
        """Run a job.

        Raises:
            JobError: If it does not finish; one run must not take the others with it.
        """
        try:
            with _alone_in(job.folder) as lock:
                begins = f'goes on after {job.done:.0%}' if job.done else 'begins'
                for name, command in job.steps:
                    if self._stopped:
                        return
                    _print(f'{job.label}: {name} {begins}')
                    self._step(job, name, command(), lock)
                    begins = 'begins'
                with self._finishing:
                    _print(f'{job.label}: {job.finish()}')
        except Exception as error:
            if isinstance(error, JobError):
                failure = error
            else:
                reason = f'{type(error).__name__}: {error}'
                failure = JobError(job.label, reason, job.folder / LOG)
            if not self._stopped:
                _print(f'{job.label}: FAILED, {failure.reason}')
            raise failure from error

    def _step(self, job: Job, name: str, command: list[str], lock: int) -> None:
        """Run a step.

        Raises:
            JobError: If its exit status is not 0.
        """
        started = time.monotonic()
        with (job.folder / LOG).open('a', encoding='utf-8') as log:
            log.write(f'\n$ {shlex.join(command)}\n')
            log.flush()
            with self._guard:
                # A session of its own: Ctrl-C in the terminal goes to this program
                # alone, which then stops the step with all processes it has started.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                    pass_fds=[lock],
                )
                self._processes.add(process)
                if self._stopped:
                    os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            self._processes.discard(process)
        job.ended(name, status, time.monotonic() - started)
        if status:
            lines = (job.folder / LOG).read_text(errors='replace').splitlines()
            tail = [line for line in lines if line.strip()][-12:]
            reason = f'{name} ended with status {status}'
            raise JobError(job.label, reason, job.folder / LOG, tail)


def _raise(number: int, frame: object) -> None:
    raise Stopped(signal.Signals(number))


def _print(line: str) -> None:
    print(f'{time.strftime("%H:%M:%S")} {line}', flush=True)
