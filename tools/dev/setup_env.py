#!/usr/bin/env python3
"""Make the virtual environment of one stack from the pins in ``requirements/``.

``--stack mmdet`` makes ``.venv``, ``--stack onedl`` makes ``.venv-onedl``. mmcv's
compiled ops are published as source only: the first set-up compiles them (about 10
minutes on 2 cores) and keeps the wheel in ``${XDG_CACHE_HOME:-~/.cache}/rambo_det``
for every later environment. A finished environment carries a stamp, and running again
returns at once. Changed pins update it, an unfinished one is made anew: it is safe to
interrupt this program anywhere.

Exit status: 0 ready, 1 a step failed, 2 something is missing, 130 interrupted.

It uses the standard library only, and syntax that every Python 3 parses: a wrong
Python has to get as far as the message that says so.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence

VERSION = 1  # raise it to have every environment made anew
PYTHON = (3, 11)
PY = '.'.join(map(str, PYTHON))
ROOT = Path(__file__).resolve().parents[2]
VENVS = {'mmdet': '.venv', 'onedl': '.venv-onedl'}
STAMP = 'rambo_det.stamp'
PROMPT = 'rambo_det'  # tells an environment made here from someone else's
REPORT_EVERY = 15.0  # seconds between two signs of life
ANOTHER_PYTHON = f'Pass another one: make demo PYTHON=/path/to/python{PY}'

PROBE_TORCH = """
import torch
from torch.utils.cpp_extension import CUDA_HOME
print(torch.__version__, int(torch.cuda.is_available() and CUDA_HOME is not None))
"""
CHECK_IMPORTS = """
from mmcv.ops import nms, roi_align
import mmdet.datasets, mmdet.evaluation, mmdet.models
"""


class SetupError(Exception):
    """A set-up that cannot go on, and the exit status that says why."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def say(text: str) -> None:
    """Print one line at once, also into a pipe."""
    print('[setup] ' + text, flush=True)


def duration(seconds: float) -> str:
    """Write a duration, as in ``3 min 05 s``."""
    minutes, rest = divmod(int(seconds), 60)
    return f'{minutes} min {rest:02d} s' if minutes else f'{rest} s'


def cache_root() -> Path:
    """Return the folder that outlives checkouts and environments."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.join('~', '.cache')
    return Path(os.path.expanduser(base)) / 'rambo_det'


def pins(root: Path, name: str) -> Path:
    """Return a file of pins."""
    return root / 'requirements' / f'{name}.txt'


def mmcv_pin(root: Path, stack: str) -> str:
    """Return the stack's mmcv requirement, such as ``mmcv==2.1.0``."""
    text = pins(root, stack).read_text()
    return str(re.findall(r'^(?:onedl-)?mmcv==\S+', text, re.MULTILINE)[0])


def stamp(root: Path, stack: str) -> List[str]:
    """Return the two hashes that a finished environment carries.

    If the first changes, it has to be made anew: compiled ops belong to their torch,
    and scripts hold the path. If the second does, new packages can be added to it.
    """
    base = hashlib.sha256(f'{VERSION} {PY} {root} {stack}'.encode())
    base.update(pins(root, 'build').read_bytes())
    rest = hashlib.sha256()
    for name in ('runtime', stack, 'dev'):
        rest.update(pins(root, name).read_bytes() + b'\0')
    return [base.hexdigest(), rest.hexdigest()]


def found_stamp(venv: Path) -> List[str]:
    """Return the stamp of an environment, empty if it is unfinished or broken."""
    path, python = venv / STAMP, venv / 'bin' / 'python'
    # exists() follows the link to the Python that the environment was made from.
    return path.read_text().split() if path.exists() and python.exists() else []


def wheel_tag(torch_version: str, cuda: bool = False) -> str:
    """Name what, besides its own version, a compiled wheel depends on."""
    tag = f'cp{PYTHON[0]}{PYTHON[1]}-torch{torch_version}'
    return tag + '-cuda' if cuda else tag


def find_wheel(folder: Path, pin: str) -> Optional[Path]:
    """Return the complete wheel of ``pin`` for this machine in ``folder``, if any."""
    prefix = pin.replace('-', '_').replace('==', '-')
    for path in sorted(folder.glob(f'{prefix}-cp{PYTHON[0]}{PYTHON[1]}-*.whl')):
        fits = path.stem.endswith((platform.machine(), 'universal2'))
        if fits and zipfile.is_zipfile(str(path)):  # no truncated one passes
            return path
    return None


def check_python() -> None:
    """Refuse a Python that the pins do not fit, or that cannot make environments."""
    found = f'{sys.executable} is Python {platform.python_version()}'
    if sys.version_info[:2] != PYTHON:
        raise SetupError(f'{found}, but this needs Python {PY}. {ANOTHER_PYTHON}')
    for module in ('venv', 'ensurepip'):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f'{found}, and has no module "{module}". Install it (Debian or Ubuntu: '
                f'apt-get install python{PY}-venv) and run again. {ANOTHER_PYTHON}'
            )


def check_compiler() -> None:
    """Refuse to start a build that cannot end well."""
    tools = [os.environ.get('CC') or 'gcc', os.environ.get('CXX') or 'g++']
    missing = [tool for tool in tools if shutil.which(shlex.split(tool)[0]) is None]
    if missing:
        raise SetupError(
            f'compiling mmcv needs {" and ".join(missing)}, not found on PATH. Install '
            'a C++ compiler (Debian or Ubuntu: apt-get install build-essential; '
            'Fedora: dnf install gcc-c++) or name yours in CC and CXX; then run again.'
        )
    header = Path(sysconfig.get_paths()['include']) / 'Python.h'
    if not header.exists():
        raise SetupError(
            f"compiling mmcv needs Python's headers, but there is no {header}. Install "
            f'them (Debian or Ubuntu: apt-get install python{PY}-dev; Fedora: dnf '
            f'install python{PY}-devel) and run again. {ANOTHER_PYTHON}'
        )


def check_disk(folder: Path, gib: float) -> None:
    """Refuse to fill the disk."""
    free = shutil.disk_usage(str(folder)).free / 2**30
    if free < gib:
        raise SetupError(
            f'{folder} has {free:.1f} GiB free, but the set-up needs {gib:.0f} GiB '
            'there. Free some (XDG_CACHE_HOME moves the cache) and run again.'
        )


def build_jobs() -> int:
    """Return one compiler per core, or fewer where their 1.5 GiB each do not fit."""
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / 1.5)))


def stop(process: 'subprocess.Popen[Any]') -> None:
    """End a step and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(timeout=5)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Wait for other set-ups to end, then be the only one.

    The steps inherit the descriptor, so that one which outlives its killed set-up
    keeps the lock until it ends, and does not write into what the next one makes.
    """
    import fcntl  # not on Windows, which has to get as far as a message too

    with path.open('a') as handle:
        for waited in range(10**9):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if waited == 0:
                    say('waiting for another set-up, or a step that a killed one left')
                    say(f'  behind, to end: it holds {path}')
                elif waited % REPORT_EVERY == 0:
                    say(f'  ... {duration(waited)}')
                time.sleep(1)
        yield handle.fileno()


class Setup:
    """The steps for one stack, with one log."""

    def __init__(self, root: Path, cache: Path, stack: str, lock: int) -> None:
        self.root = root
        self.cache = cache
        self.stack = stack
        self.lock = lock
        self.venv = root / VENVS[stack]
        self.python = str(self.venv / 'bin' / 'python')
        self.log = cache / f'setup-{stack}.log'
        # An outer PYTHONPATH or pip target would put packages beside the environment.
        unwanted = ('PYTHONPATH', 'PYTHONHOME', 'PIP_TARGET', 'PIP_PREFIX')
        self.env = {k: v for k, v in os.environ.items() if k not in unwanted}
        self.env.update(PIP_USER='0', PIP_DISABLE_PIP_VERSION_CHECK='1')

    def run(self, title: str, hint: str, *command: str, **env: str) -> None:
        """Run one step, with a sign of life now and then, and a hint if it fails."""
        say(title)
        start = time.monotonic()
        with self.log.open('ab') as out:
            out.write(f'\n$ {" ".join(command)}\n'.encode())
            out.flush()
            begin = out.tell()
            process = subprocess.Popen(
                command,
                cwd=str(self.root),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(self.env, **env),
                start_new_session=True,  # lets stop() reach the compilers as well
                pass_fds=(self.lock,),
            )
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=REPORT_EVERY)
                except subprocess.TimeoutExpired:
                    counts = re.findall(rb'\[(\d+)/(\d+)\]', self.log_from(begin))
                    files = '{}, {} of {} files compiled' if counts else '{}'
                    numbers = [n.decode() for n in counts[-1]] if counts else []
                    seconds = time.monotonic() - start
                    say('  ... ' + files.format(duration(seconds), *numbers))
        except BaseException:
            stop(process)
            raise
        if process.returncode != 0:
            last = self.log_from(begin).decode(errors='replace').splitlines()[-25:]
            raise SetupError(
                '\n'.join(['the log ends with', *last, ''])
                + f'This step failed (exit status {process.returncode}): {title}\n'
                f'The full log is {self.log}\n{hint}',
                status=1,
            )

    def log_from(self, begin: int) -> bytes:
        """Read what the running step has logged."""
        with self.log.open('rb') as log:
            log.seek(begin)
            return log.read()

    def pip_install(self, title: str, *arguments: str) -> None:
        """Install something into the environment."""
        hint = 'If it is the network or the disk, put that right; then run again.'
        command = (self.python, '-m', 'pip', 'install', '--no-build-isolation')
        self.run(title, hint, *command, *arguments)

    def make_venv(self) -> None:
        """Make an empty environment, in place of an unfinished or outdated one."""
        config = self.venv / 'pyvenv.cfg'  # without it there is no environment
        if config.exists() and PROMPT not in config.read_text():
            raise SetupError(
                f'{self.venv} is an environment that this program did not make. '
                'Move or delete it, and run again.'
            )
        command = (sys.executable, '-m', 'venv', '--clear', '--prompt', PROMPT)
        hint = f'Delete {self.venv} and run again.'
        self.run(f'making {self.venv}', hint, *command, str(self.venv))

    def mmcv_wheel(self) -> Path:
        """Return mmcv's wheel from the cache, building it if it is not there."""
        pin = mmcv_pin(self.root, self.stack)
        probe = subprocess.check_output([self.python, '-c', PROBE_TORCH], env=self.env)
        torch_version, cuda = probe.decode().split()[-2:]
        folder = self.cache / 'wheels' / wheel_tag(torch_version, cuda == '1')
        cached = find_wheel(folder, pin)
        if cached is None:
            # Beside its destination, so that moving it there is atomic.
            work = folder / f'.build-{pin}'
            # There may be one already, finished by what a killed set-up left running.
            built = find_wheel(work / 'out', pin) or self.build(pin, work, cuda == '1')
            cached = folder / built.name
            os.replace(str(built), str(cached))
            shutil.rmtree(str(work), ignore_errors=True)
        say(f'{pin}: the compiled wheel is {cached}')
        return cached

    def build(self, pin: str, work: Path, cuda: bool) -> Path:
        """Compile mmcv and return the wheel, in ``work/out``."""
        check_compiler()
        shutil.rmtree(str(work), ignore_errors=True)
        (work / 'tmp').mkdir(parents=True)
        say(
            f'{pin} is published as source only, so its ops are compiled here. It takes'
        )
        say('  about 10 minutes on 2 cores, and only this once: the wheel is kept.')
        say(f'  The full log is {self.log}')
        jobs = os.environ.get('MAX_JOBS') or str(build_jobs())
        # To mmcv a visible GPU asks for CUDA ops, which do not build without nvcc.
        hide = {} if cuda else {'CUDA_VISIBLE_DEVICES': '', 'FORCE_CUDA': '0'}
        self.run(
            f'compiling {pin}, {jobs} files at a time',
            'If a compiler was "Killed", memory ran out: set MAX_JOBS=1 and run again.',
            *(self.python, '-m', 'pip', '-v', 'wheel', '--no-build-isolation'),
            *('--no-deps', '-w', str(work / 'out'), pin),
            MMCV_WITH_OPS='1',
            MAX_JOBS=jobs,
            TMPDIR=str(work / 'tmp'),
            # torch looks for ninja on PATH, where the environment's is not by itself.
            PATH=f'{self.venv / "bin"}{os.pathsep}{self.env.get("PATH", os.defpath)}',
            **hide,
        )
        built = find_wheel(work / 'out', pin)
        if built is None:
            raise SetupError(
                f'building {pin} left no wheel for Python {PY} on {platform.machine()} '
                f'in {work / "out"}; see {self.log}',
                status=1,
            )
        return built

    def install(self) -> None:
        """Make or update the environment, then stamp it."""
        # Taken before the first step: pins edited meanwhile must not count as done.
        wanted = stamp(self.root, self.stack)
        found = found_stamp(self.venv)
        with contextlib.suppress(FileNotFoundError):
            (self.venv / STAMP).unlink()
        self.log.write_bytes(b'')
        if found[:1] != wanted[:1]:
            self.make_venv()
            build_pins = str(pins(self.root, 'build'))
            self.pip_install('installing torch and the build tools', '-r', build_pins)
        wheel = self.mmcv_wheel()
        # Without dependencies: mmcv's would bring in opencv-python beside the pinned
        # opencv-python-headless, and it needs libraries that a server may lack.
        self.pip_install(
            f'installing the {self.stack} stack and the test tools',
            *('--no-deps', str(wheel), '-r', str(pins(self.root, self.stack))),
            *('-r', str(pins(self.root, 'dev'))),
        )
        self.pip_install('installing rambo_det (editable)', '--no-deps', '-e', '.')
        self.run(
            'checking that the stack imports',
            f'If mmcv is at fault, delete {wheel} and run again to build it anew.',
            *(self.python, '-c', CHECK_IMPORTS),
        )
        (self.venv / STAMP).write_text('\n'.join(wanted))


def set_up(root: Path, cache: Path, stack: str) -> None:
    """Make the stack's environment unless it is ready."""
    venv = root / VENVS[stack]
    if found_stamp(venv) == stamp(root, stack):
        return
    check_python()
    wheels = (cache / 'wheels').glob(wheel_tag('*'))
    if not any(find_wheel(folder, mmcv_pin(root, stack)) for folder in wheels):
        check_compiler()  # now, rather than after the download of torch
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f'{error}. Set XDG_CACHE_HOME to a writable folder.') from None
    check_disk(root, 3)
    check_disk(cache, 1)
    with locked(cache / 'setup.lock') as lock:
        if found_stamp(venv) != stamp(root, stack):  # not made while waiting
            Setup(root, cache, stack, lock).install()


def interrupt(*_: Any) -> None:
    """Treat a polite kill, or a closed terminal, like Ctrl-C."""
    raise KeyboardInterrupt


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(description='Set up the environment of a stack.')
    parser.add_argument('--stack', choices=sorted(VENVS), default='mmdet')
    stack = parser.parse_args(arguments).stack
    try:
        if os.name != 'posix':
            raise SetupError(f'this needs Linux or macOS, not {platform.system()}.')
        signal.signal(signal.SIGTERM, interrupt)
        signal.signal(signal.SIGHUP, interrupt)
        set_up(ROOT, cache_root(), stack)
    except SetupError as error:
        print(f'[setup] {error}', file=sys.stderr, flush=True)
        return error.status
    except KeyboardInterrupt:
        say('interrupted; run again to go on')
        return 130
    say(f'{VENVS[stack]} is ready ({stack} stack)')
    return 0


if __name__ == '__main__':
    sys.exit(main())
