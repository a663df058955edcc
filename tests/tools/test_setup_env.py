"""The set-up program: what it refuses, recovers from and does not do twice.

Nothing here installs or downloads: steps are replaced by small Python commands, or must
not run at all.
"""

import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import ROOT

SCRIPT = ROOT / 'tools' / 'dev' / 'setup_env.py'
PIN = 'onedl-mmcv==2.3.6'
WHEEL = 'onedl_mmcv-2.3.6-cp311-cp311-linux_x86_64.whl'


@pytest.fixture
def env():
    """The program as a module; what main() does to signals is undone."""
    spec = importlib.util.spec_from_file_location('setup_env', SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    yield module
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def root(tmp_path, env, monkeypatch):
    """A checkout with pins of its own, in which the program lies."""
    folder = tmp_path / 'checkout'
    (folder / 'requirements').mkdir(parents=True)
    for name in ('build', 'runtime', 'dev'):
        (folder / 'requirements' / f'{name}.txt').write_text(f'{name}==1\n')
    for stack, mmcv in (('mmdet', 'mmcv==2.1.0'), ('onedl', PIN)):
        text = f'# {mmcv} is compiled\n-r runtime.txt\n{mmcv}\nx==1\n'
        (folder / 'requirements' / f'{stack}.txt').write_text(text)
    monkeypatch.setattr(env, 'ROOT', folder)
    return folder


@pytest.fixture
def cache(tmp_path, env, monkeypatch):
    """An empty cache, which is also what the environment variable names."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    env.cache_root().mkdir(parents=True)
    return env.cache_root()


@pytest.fixture
def setup(env, root, cache):
    """A set-up whose Python is this one."""
    with (cache / 'lock').open('w') as lock:
        setup = env.Setup(root, cache, 'onedl', lock.fileno())
        setup.python = sys.executable
        yield setup


def finish(env, root, stack):
    """Fake a finished environment."""
    venv = root / env.VENVS[stack]
    (venv / 'bin').mkdir(parents=True)
    (venv / 'bin' / 'python').symlink_to(sys.executable)
    (venv / env.STAMP).write_text(env.stamp(root, stack))
    return venv


def refuse(*_, **__):
    raise AssertionError('the set-up ran something')


def deny(*_, **__):
    raise PermissionError('denied')


def test_it_parses_under_older_pythons():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


@pytest.mark.parametrize('stack', ['mmdet', 'onedl'])
def test_the_pins_are_exact_and_name_no_torchvision(env, stack):
    assert env.mmcv_pin(env.ROOT, stack)
    for name in ('build', 'runtime', stack, 'dev'):
        for line in env.pins(env.ROOT, name).read_text().splitlines():
            if not line.startswith(('#', '-r ')):
                assert line.count('==') == 1, line
                assert not line.startswith(('torchvision', 'opencv-python=')), line


# The stamp


@pytest.mark.parametrize(
    ('change', 'ready'),
    [
        (lambda env, root: None, True),
        (lambda env, root: env.pins(root, 'onedl').write_text('x==2'), True),
        (lambda env, root: env.pins(root, 'build').write_text('x==2'), False),
        (lambda env, root: env.pins(root, 'runtime').write_text('x==2'), False),
        (lambda env, root: env.pins(root, 'mmdet').write_text('x==2'), False),
        (lambda env, root: env.pins(root, 'dev').write_text('x==2'), False),
        (lambda env, root: setattr(env, 'VERSION', env.VERSION + 1), False),
        (lambda env, root: setattr(env, 'PY', '3.12'), False),
        (lambda env, root: (root / '.venv' / env.STAMP).unlink(), False),
        (lambda env, root: (root / '.venv' / 'bin' / 'python').unlink(), False),
    ],
)
def test_what_a_finished_environment_stands_for(env, root, change, ready):
    finish(env, root, 'mmdet')
    change(env, root)
    assert env.is_ready(root, 'mmdet') == ready
    moved = root.rename(root.with_name('moved'))
    assert not env.is_ready(moved, 'mmdet')


def test_second_run_does_nothing(env, root, cache, monkeypatch, capsys):
    finish(env, root, 'onedl')
    for name in ('Popen', 'check_output'):
        monkeypatch.setattr(env.subprocess, name, refuse)
    # Nor does it matter any more which Python runs it, or what is on PATH.
    monkeypatch.setattr(env, 'check_python', refuse)
    monkeypatch.setenv('PATH', '')
    assert env.main(['--stack', 'onedl']) == 0
    assert capsys.readouterr().out == '[setup] .venv-onedl is ready (onedl stack)\n'
    assert list(cache.iterdir()) == []


def test_the_stamp_is_there_only_when_all_is_done(env, root, setup, monkeypatch):
    venv = finish(env, root, 'onedl')
    env.pins(root, 'dev').write_text('other==2\n')
    steps = []

    def step(title, *_, **__):
        assert not (venv / env.STAMP).exists()  # interrupted here, it is unfinished
        env.pins(root, 'dev').write_text(f'edited=={len(steps)}\n')
        steps.append(title)

    monkeypatch.setattr(setup, 'run', step)
    monkeypatch.setattr(setup, 'mmcv_wheel', lambda: Path(WHEEL))
    setup.install()
    assert steps[0] == f'making {venv}' and steps[-1].startswith('checking')
    assert not env.is_ready(root, 'onedl')  # these pins came after the first step
    env.pins(root, 'dev').write_text('other==2\n')
    assert env.is_ready(root, 'onedl')


def test_someone_elses_environment_is_left_alone(env, root, setup, monkeypatch):
    (root / '.venv-onedl').mkdir()
    (root / '.venv-onedl' / 'pyvenv.cfg').write_text('version = 3.11.7\n')
    monkeypatch.setattr(setup, 'run', refuse)
    with pytest.raises(env.SetupError, match='did not make'):
        setup.install()


# What is missing


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('sys.version_info', (3, 12, 1), r'but this needs Python 3\.11.*PYTHON=/path'),
        ('importlib.util.find_spec', lambda _: None, r'no module "venv".*3\.11-venv'),
        ('shutil.which', lambda _: None, r'needs gcc and my-c\+\+ -m64.*build-essent'),
        ('sysconfig.get_paths', lambda: {'include': '/x'}, r'/x/Python\.h.*3\.11-dev'),
        ('shutil.disk_usage', lambda _: SimpleNamespace(free=2**30), '1.0 GiB.*3 GiB'),
        ('pathlib.Path.mkdir', deny, 'denied. Set XDG_CACHE_HOME'),
    ],
)
def test_what_is_missing_is_named(
    env, root, cache, monkeypatch, capsys, name, value, message
):
    monkeypatch.setattr('sys.version_info', (3, 11, 0))
    monkeypatch.setattr('subprocess.Popen', refuse)
    monkeypatch.setattr('shutil.which', lambda name: name)
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setenv('CXX', 'my-c++ -m64')
    monkeypatch.setattr(name, value)
    assert env.main(['--stack', 'mmdet']) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_compiled_wheel_needs_no_compiler(env, root, cache, monkeypatch):
    monkeypatch.setattr(env, 'check_python', lambda: None)
    monkeypatch.setattr(env, 'check_disk', refuse)  # which comes next
    monkeypatch.setenv('PATH', '')
    wheels = cache / 'wheels' / 'cp3.11-torch2.13.0+cpu-x86_64'
    wheels.mkdir(parents=True)
    (wheels / WHEEL).touch()  # of the other stack
    assert env.main(['--stack', 'mmdet']) == 2
    with pytest.raises(AssertionError, match='ran something'):
        env.main(['--stack', 'onedl'])


# The wheel


@pytest.fixture
def wheels(env, setup, monkeypatch):
    """The folder of the wheels of a torch that is not there."""
    tag = 'cp3.11-torch2.13.0+cpu-x86_64'
    output = f'a warning first\n{tag}\n'.encode()
    monkeypatch.setattr('subprocess.check_output', lambda *_, **__: output)
    monkeypatch.setattr(env, 'check_compiler', lambda: None)
    return setup.cache / 'wheels' / tag


def built(command, content='whole'):
    """Does what pip does at its end."""
    (Path(command[command.index('-w') + 1]) / WHEEL).write_text(content)


# Which of the three steps fail: precompiling, building with it, building without it.
@pytest.mark.parametrize('failing', [(), (0,), (1,), (0, 1), (1, 2)])
def test_a_build_that_fails_is_tried_once_more_as_mmcv_means_it(
    env, setup, wheels, monkeypatch, failing
):
    ran = []

    def step(title, hint, *command, **env_):
        quick = '-include' in env_['CFLAGS']
        ran.append(0 if 'precompiling' in title else 1 if quick else 2)
        assert env_['CFLAGS'].startswith('-mine') and list(wheels.glob('*.whl')) == []
        if ran[-1] in failing:
            raise env.SetupError(f'{title} failed', status=1)
        if ran[-1]:
            assert PIN in command and env_['MMCV_WITH_OPS'] == '1'
            assert env_['CUDA_VISIBLE_DEVICES'] == ''
            built(command)

    setup.env['CFLAGS'] = '-mine'
    monkeypatch.setattr(setup, 'run', step)
    if 2 in failing:
        with pytest.raises(env.SetupError, match='compiling .* failed'):
            setup.mmcv_wheel()
        return
    assert setup.mmcv_wheel() == wheels / WHEEL
    assert ran == {(): [0, 1], (1,): [0, 1, 2]}.get(failing, [0, 2])
    assert [path.name for path in wheels.iterdir()] == [WHEEL]
    monkeypatch.setattr(setup, 'run', refuse)  # it is there
    assert setup.mmcv_wheel() == wheels / WHEEL


def test_an_interrupted_build_leaves_no_wheel_and_the_next_recovers(
    env, setup, wheels, monkeypatch
):
    def interrupted(title, *command, **_):
        built(command, 'half') if 'compiling mm' in title else None
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, 'run', interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup.mmcv_wheel()
    assert env.find_wheel(wheels, PIN) is None
    monkeypatch.setattr(setup, 'run', lambda *c, **_: built(c) if '-w' in c else None)
    assert setup.mmcv_wheel().read_text() == 'whole'


def test_the_precompiled_header_is_used(env, setup, tmp_path):
    """By a build as mmcv's is, with the flags that torch and setuptools give."""
    pytest.importorskip('torch')
    if shutil.which('c++') is None:
        pytest.skip('needs a compiler')
    header = tmp_path / 'torch.h'
    header.write_text('inline int seven() { return 7; }\n')
    (tmp_path / 'x.cpp').write_text('int eight() { return seven() + 1; }\n')
    (tmp_path / 'setup.py').write_text(
        'from setuptools import setup\n'
        'from torch.utils.cpp_extension import BuildExtension, CppExtension\n'
        "x = CppExtension('x', ['x.cpp'], extra_compile_args=['-std=c++17'])\n"
        "setup(name='x', ext_modules=[x], cmdclass={'build_ext': BuildExtension})\n"
    )
    command = [sys.executable, '-c', env.PRECOMPILE, str(header)]
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    variables = dict(os.environ, CFLAGS=env.QUICK, PATH=path)
    subprocess.run(command, env=variables, check=True)
    variables['CFLAGS'] += f' -include {header} -H'
    command = [sys.executable, 'setup.py', 'build_ext']
    out = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
    )
    assert f'! {header}.gch' in out.stdout + out.stderr


# Steps


def test_a_step_shows_that_it_lives_and_how_long_it_took(
    env, setup, monkeypatch, capsys
):
    monkeypatch.setattr(env, 'REPORT_EVERY', 0.3)
    code = 'import time; print("[7/77] c++ x.cpp", flush=True); time.sleep(0.8)'
    setup.run('compiling', 'hint', sys.executable, '-c', code)
    out = capsys.readouterr().out
    assert out.startswith('[setup] compiling\n[setup]   ... 0 s')
    assert ', 7 of 77 files compiled\n' in out
    assert re.search(r'  took \d s\n$', out)
    assert setup.log.read_text().endswith(' s\n')


def test_a_failed_step_shows_the_end_of_the_log_and_a_hint(env, setup):
    setup.log.write_text('of an earlier step\n')
    code = 'for i in range(100): print("line", i)\nraise SystemExit(3)'
    with pytest.raises(env.SetupError) as caught:
        setup.run('installing x', 'Do this.', sys.executable, '-c', code)
    message = str(caught.value)
    assert caught.value.status == 1
    assert 'line 99\n' in message and 'line 74\n' not in message
    assert 'failed (exit status 3): installing x' in message
    assert str(setup.log) in message and message.endswith('Do this.')


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody has waited for is dead as well.
    stat = Path(f'/proc/{pid}/stat')
    return not stat.exists() or stat.read_text().rpartition(')')[2].split()[0] != 'Z'


def test_an_interrupted_step_ends_with_all_it_started(env, setup, monkeypatch):
    pids = setup.cache / 'pids'
    code = (
        'import os, subprocess, time\n'
        'child = subprocess.Popen(["sleep", "60"])\n'
        f'open({str(pids)!r} + ".new", "w").write(f"{{os.getpid()}} {{child.pid}}")\n'
        f'os.rename({str(pids)!r} + ".new", {str(pids)!r})\n'
        'time.sleep(60)\n'
    )
    monkeypatch.setattr(env, 'REPORT_EVERY', 0.1)

    def ctrl_c(text):
        if pids.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(env, 'say', ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        setup.run('sleeping', '', sys.executable, '-c', code)
    deadline = time.monotonic() + 5
    left = [int(pid) for pid in pids.read_text().split()]
    while any(map(alive, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(left) == 2 and not any(map(alive, left))


def test_a_second_setup_waits_for_the_first_and_for_what_it_left(env, cache, capsys):
    path = cache / 'setup.lock'
    with env.locked(path) as lock:
        left = subprocess.Popen(['sleep', '1'], pass_fds=(lock,))
    with env.locked(path):
        assert left.wait(timeout=5) == 0  # it has ended, or is about to
    assert f'holds {path}' in capsys.readouterr().out
