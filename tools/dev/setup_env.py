#!/usr/bin/env python3
"""Make the virtual environment of one stack from the pins in ``requirements/``.

``--stack mmdet`` makes ``.venv``, ``--stack onedl`` makes ``.venv-onedl``. mmcv's
compiled ops are published as source only: the first set-up compiles them and keeps the
wheel in ``${XDG_CACHE_HOME:-~/.cache}/rambo_det`` for every later environment. A
finished environment carries a stamp, and running again returns at once; an unfinished
one, or one whose pins have changed, is made anew. It is safe to interrupt this program
anywhere.

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
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

VERSION = 2  # raise it to have every environment made anew
PYTHON = (3, 11)
PY = '.'.join(map(str, PYTHON))
ROOT = Path(__file__).resolve().parents[2]
VENVS = {'mmdet': '.venv', 'onedl': '.venv-onedl'}
STAMP = 'rambo_det.stamp'
PROMPT = 'rambo_det'  # tells an environment made here from someone else's
REPORT_EVERY = 15.0  # seconds between two signs of life
ANOTHER_PYTHON = f'Pass another one: make demo PYTHON=/path/to/python{PY}'
QUICK = '-g0 -O2 -w'  # flags for the compiler, after those that Python was built with

# What, besides its own version, a compiled wheel depends on. A GPU counts with nvcc.
TAG = f"""
import platform, torch
from torch.utils.cpp_extension import CUDA_HOME
cuda = torch.cuda.is_available() and CUDA_HOME is not None
tag = 'cp{PY}', 'torch' + torch.__version__, platform.machine(), 'cuda' * cuda
print('-'.join(tag).rstrip('-'))
"""
# Each of mmcv's files includes torch/types.h, and most of the time that it takes to
# compile goes there. A compiler uses the precompiled header if its flags are those of
# the file, as GCC judges it: if not, it reads the header itself.
PRECOMPILE = """
import subprocess, sys, setuptools
from distutils.ccompiler import new_compiler
from distutils.sysconfig import customize_compiler
from torch.utils.cpp_extension import get_cxx_compiler, include_paths
compiler, header = new_compiler(), sys.argv[1]
customize_compiler(compiler)
flags = compiler.compiler_so[1:] + ['-I' + path for path in include_paths()]
flags += ['-std=c++17', '-x', 'c++-header', header, '-o', header + '.gch']
sys.exit(subprocess.call([get_cxx_compiler(), *flags]))
"""
# What a first run imports gets its bytecode here: pip would compile all files, which
# takes it longer than to unpack them.
CHECK_IMPORTS = """
from mmcv.ops import nms, roi_align
import mmdet.datasets, mmdet.evaluation, mmdet.models, matplotlib.pyplot, pytest
"""


class SetupError(Exception):
    """A set-up that cannot go on, and the exit status that says why."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def say(text: str) -> None:
    """Print one line at once, also into a pipe."""
    print('[setup] ' + text, flush=True)


def duration(start: float) -> str:
    """Write the time since ``start``, as in ``3 min 05 s``."""
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


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


def stamp(root: Path, stack: str) -> str:
    """Return what a finished environment carries: its scripts hold the path, too."""
    hashed = hashlib.sha256(f'{VERSION} {PY} {root} {stack}'.encode())
    for name in ('build', 'runtime', stack, 'dev'):
        hashed.update(pins(root, name).read_bytes() + b'\0')
    return hashed.hexdigest()


def is_ready(root: Path, stack: str) -> bool:
    """Tell whether the environment is finished and in order."""
    path, python = (root / VENVS[stack] / name for name in (STAMP, 'bin/python'))
    # exists() follows the link to the Python that the environment was made from.
    return python.exists() and path.exists() and path.read_text() == stamp(root, stack)


def find_wheel(folder: Path, pin: str) -> Optional[Path]:
    """Return the wheel of ``pin`` in ``folder``, if there is one."""
    name = pin.replace('-', '_').replace('==', '-')
    return next(folder.glob(f'{name}-*.whl'), None)


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
    header = Path(sysconfig.get_paths()['include']) / 'Python.h'
    if not header.exists():
        missing.append(f"Python's headers, as {header}")
    if missing:
        raise SetupError(
            f'compiling mmcv needs {" and ".join(missing)}, not found. Install a C++ '
            "compiler and Python's headers (Debian or Ubuntu: apt-get install "
            f'build-essential python{PY}-dev; Fedora: dnf install gcc-c++ '
            f'python{PY}-devel) and run again. CC and CXX can name another compiler. '
            + ANOTHER_PYTHON
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
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say('waiting for another set-up, or a step that a killed one left behind,')
            say(f'  to end: it holds {path}')
            fcntl.flock(handle, fcntl.LOCK_EX)
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
        unwanted = 'PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PYTHONDONTWRITEBYTECODE'
        self.env = {k: v for k, v in os.environ.items() if k not in unwanted.split()}
        self.env.update(PIP_USER='0', PIP_DISABLE_PIP_VERSION_CHECK='1')
        # torch looks for ninja on PATH, where the environment's is not by itself.
        path = self.env.get('PATH', os.defpath)
        self.env['PATH'] = f'{self.venv / "bin"}{os.pathsep}{path}'

    def run(self, title: str, hint: str, *command: str, **env: str) -> None:
        """Run one step, with a sign of life now and then, and a hint if it fails."""
        say(title)
        start = time.monotonic()
        with self.log.open('ab') as log:
            log.write(f'\n$ {shlex.join(command)}\n'.encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                command,
                cwd=str(self.root),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.env, **env),
                start_new_session=True,  # lets stop() reach the compilers as well
                pass_fds=(self.lock,),
            )
            try:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=REPORT_EVERY)
                        break
                    done = re.findall(r'\[(\d+)/(\d+)\]', self.logged(begin))
                    files = (
                        ', {} of {} files compiled'.format(*done[-1]) if done else ''
                    )
                    say(f'  ... {duration(start)}{files}')
            except BaseException:
                stop(process)
                raise
            say(f'  took {duration(start)}')
            log.write(f'took {duration(start)}\n'.encode())
        if process.returncode != 0:
            last = self.logged(begin).splitlines()[-25:]
            raise SetupError(
                '\n'.join(['the log ends with', *last, ''])
                + f'This step failed (exit status {process.returncode}): {title}\n'
                f'The full log is {self.log}\n{hint}',
                status=1,
            )

    def logged(self, begin: int) -> str:
        """Read what the running step has logged."""
        return self.log.read_bytes()[begin:].decode(errors='replace')

    def pip(self, title: str, hint: str, *arguments: str, **env: str) -> None:
        """Run pip in the environment, whose build tools are the pinned ones."""
        command = (self.python, '-m', 'pip', *arguments, '--no-build-isolation')
        self.run(title, hint, *command, **env)

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
        tag = subprocess.check_output([self.python, '-c', TAG], env=self.env).split()[
            -1
        ]
        folder = self.cache / 'wheels' / tag.decode()
        wheel = find_wheel(folder, pin)
        if wheel is None:
            check_compiler()
            # Beside its destination, so that moving it there is atomic.
            work = folder / f'.build-{pin}'
            shutil.rmtree(str(work), ignore_errors=True)
            (work / 'tmp').mkdir(parents=True)
            self.build(pin, work, tag.endswith(b'-cuda'))
            built = next(work.glob('*.whl'))
            wheel = built.replace(folder / built.name)
            shutil.rmtree(str(work))
        say(f'{pin}: the compiled wheel is {wheel}')
        return wheel

    def build(self, pin: str, work: Path, cuda: bool) -> None:
        """Compile mmcv into a wheel in ``work``, slowly if it does not go quickly."""
        say(f'{pin} is published as source only: its ops are compiled here, only this')
        say(f'  once, as the wheel is kept. The full log is {self.log}')
        header = work / 'torch.h'
        header.write_text('#include <torch/types.h>\n')
        own = self.env.get('CFLAGS', '')
        env = dict(
            MMCV_WITH_OPS='1',
            MAX_JOBS=os.environ.get('MAX_JOBS') or str(build_jobs()),
            TMPDIR=str(work / 'tmp'),
            PIP_NO_CACHE_DIR='1',  # may hold a wheel that belongs to another torch
            CFLAGS=f'{own} {QUICK}',
        )
        if not cuda:  # a visible GPU asks for CUDA ops, which do not build without nvcc
            env.update(CUDA_VISIBLE_DEVICES='', FORCE_CUDA='0')
        compile_mmcv = (
            f'compiling {pin}, {env["MAX_JOBS"]} files at a time',
            'If a compiler was "Killed", memory ran out: set MAX_JOBS=1 and run again.',
            *('-v', 'wheel', '--no-deps', '-w', str(work), pin),
        )
        try:
            command = (self.python, '-c', PRECOMPILE, str(header))
            self.run("precompiling torch's headers", '', *command, **env)
            env['CFLAGS'] += f' -include {shlex.quote(str(header))}'
            self.pip(*compile_mmcv, **env)
        except SetupError:
            say('  failed (see the log); once more with the flags that mmcv comes with')
            self.pip(*compile_mmcv, **dict(env, CFLAGS=own))

    def install(self) -> None:
        """Make the environment, then stamp it."""
        # Taken before the first step: pins edited meanwhile must not count as done.
        wanted = stamp(self.root, self.stack)
        with contextlib.suppress(FileNotFoundError):
            (self.venv / STAMP).unlink()  # what --clear deletes is not finished
        self.log.write_bytes(b'')
        hint = 'If it is the network or the disk, put that right; then run again.'
        build, stack, dev = (
            ('-r', str(pins(self.root, name))) for name in ('build', self.stack, 'dev')
        )
        install = (hint, 'install', '--no-compile')
        self.make_venv()
        self.pip('installing torch and the build tools', *install, *build)
        wheel = self.mmcv_wheel()
        # Without dependencies: mmcv's would bring in opencv-python beside the pinned
        # opencv-python-headless, and it needs libraries that a server may lack.
        title = f'installing the {self.stack} stack, the test tools and rambo_det'
        packages = ('--no-deps', str(wheel), *stack, *dev, '-e', '.')
        self.pip(title, *install, *packages)
        self.run(
            'checking that the stack imports',
            f'If mmcv is at fault, delete {wheel} and run again to build it anew.',
            *(self.python, '-c', CHECK_IMPORTS),
        )
        (self.venv / STAMP).write_text(wanted)


def set_up(root: Path, cache: Path, stack: str) -> None:
    """Make the stack's environment unless it is ready."""
    if is_ready(root, stack):
        return
    start = time.monotonic()
    check_python()
    wheels = (cache / 'wheels').glob('*')
    if not any(find_wheel(folder, mmcv_pin(root, stack)) for folder in wheels):
        check_compiler()  # now, rather than after the download of torch
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f'{error}. Set XDG_CACHE_HOME to a writable folder.') from None
    check_disk(root, 3)
    check_disk(cache, 1)
    with locked(cache / 'setup.lock') as lock:
        if not is_ready(root, stack):  # not made while waiting
            Setup(root, cache, stack, lock).install()
    say(f'the set-up took {duration(start)}')


def interrupt(*_: Any) -> None:
    """Treat a polite kill, or a closed terminal, like Ctrl-C."""
    raise KeyboardInterrupt


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(description='Set up the environment of a stack.')
    parser.add_argument('--stack', choices=sorted(VENVS), default='mmdet')
    # An error is one line.
    parser.print_usage = lambda file=None: None  # type: ignore[method-assign]
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
