"""The set-up program: what it names, refuses, recovers from and does not do twice.

Nothing here installs or downloads: steps are replaced by small Python commands, or must
not run at all.
"""

import ast
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests import ROOT

SCRIPT = ROOT / 'tools' / 'dev' / 'setup_env.py'
PIN = 'onedl-mmcv==2.3.6'
WHEEL = f'onedl_mmcv-2.3.6-cp311-cp311-linux_{platform.machine()}.whl'

needs_python_311 = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason='the set-up refuses other Pythons'
)


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
def root(tmp_path):
    """A checkout with pins of its own."""
    folder = tmp_path / 'checkout'
    (folder / 'requirements').mkdir(parents=True)
    for name in ('build', 'runtime', 'dev'):
        (folder / 'requirements' / f'{name}.txt').write_text(f'{name}==1\n')
    for stack, mmcv in (('mmdet', 'mmcv==2.1.0'), ('onedl', PIN)):
        text = f'# {mmcv} is compiled\n-r runtime.txt\n{mmcv}\nx==1\n'
        (folder / 'requirements' / f'{stack}.txt').write_text(text)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, which is also what the environment variable names."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    folder = tmp_path / 'xdg' / 'rambo_det'
    folder.mkdir(parents=True)
    return folder


def write_wheel(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w') as wheel:
        wheel.writestr('mmcv/_ext.so', 'x' * 1000)


def finish(env, root, stack):
    """Fake a finished environment."""
    venv = root / env.VENVS[stack]
    (venv / 'bin').mkdir(parents=True)
    (venv / 'bin' / 'python').symlink_to(sys.executable)
    (venv / env.STAMP).write_text('\n'.join(env.stamp(root, stack)))
    return venv


def make_setup(env, root, cache):
    with open(os.devnull) as lock:
        setup = env.Setup(root, cache, 'onedl', os.dup(lock.fileno()))
    setup.python = sys.executable
    return setup


def refuse(*_, **__):
    raise AssertionError('the set-up ran something')


# Names


def test_cache_is_outside_the_checkout_and_follows_xdg(env, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert env.cache_root() == tmp_path / 'rambo_det'
    monkeypatch.setenv('XDG_CACHE_HOME', '')
    assert env.cache_root() == Path.home() / '.cache' / 'rambo_det'


def test_wheel_tag_tells_torch_builds_apart(env):
    assert env.wheel_tag('2.13.0+cpu') == 'cp311-torch2.13.0+cpu'
    assert env.wheel_tag('2.13.0+cu130', cuda=True) == 'cp311-torch2.13.0+cu130-cuda'


def test_mmcv_pin_is_the_requirement_and_not_the_comment(env, root):
    assert env.mmcv_pin(root, 'mmdet') == 'mmcv==2.1.0'
    assert env.mmcv_pin(root, 'onedl') == PIN


@pytest.mark.parametrize('stack', ['mmdet', 'onedl'])
def test_the_pins_are_exact_and_name_no_torchvision(env, stack):
    assert env.mmcv_pin(env.ROOT, stack)
    for name in ('build', 'runtime', stack, 'dev'):
        for line in env.pins(env.ROOT, name).read_text().splitlines():
            if not line.startswith(('#', '-r ')):
                assert line.count('==') == 1, line
                assert not line.startswith(('torchvision', 'opencv-python=')), line


def test_duration(env):
    assert env.duration(14.9) == '14 s'
    assert env.duration(605) == '10 min 05 s'


# The stamp


@pytest.mark.parametrize(
    ('name', 'base_changes', 'rest_changes'),
    [
        ('build', True, False),
        ('runtime', False, True),
        ('mmdet', False, True),
        ('dev', False, True),
        ('onedl', False, False),
    ],
)
def test_stamp_follows_the_pins_of_its_stack(
    env, root, name, base_changes, rest_changes
):
    base, rest = env.stamp(root, 'mmdet')
    assert [base, rest] == env.stamp(root, 'mmdet')
    with env.pins(root, name).open('a') as pins:
        pins.write('another==1\n')
    changed = env.stamp(root, 'mmdet')
    assert (changed[0] != base) == base_changes
    assert (changed[1] != rest) == rest_changes


def test_stamp_follows_version_place_and_python(env, root, monkeypatch):
    stamps = {tuple(env.stamp(root, stack)) for stack in env.VENVS}
    monkeypatch.setattr(env, 'VERSION', env.VERSION + 1)
    stamps.add(tuple(env.stamp(root, 'mmdet')))
    monkeypatch.setattr(env, 'PY', '3.12')
    stamps.add(tuple(env.stamp(root, 'mmdet')))
    moved = root.rename(root.with_name('moved'))
    stamps.add(tuple(env.stamp(moved, 'mmdet')))
    assert len(stamps) == 5


def test_an_environment_without_stamp_or_python_is_unfinished(env, root):
    venv = finish(env, root, 'mmdet')
    assert env.found_stamp(venv) == env.stamp(root, 'mmdet')
    (venv / 'bin' / 'python').unlink()
    (venv / 'bin' / 'python').symlink_to(root / 'uninstalled')
    assert env.found_stamp(venv) == []
    assert env.found_stamp(root / 'nowhere') == []


def test_second_run_does_nothing(env, root, cache, monkeypatch, capsys):
    finish(env, root, 'onedl')
    monkeypatch.setattr(env, 'ROOT', root)
    for name in ('Popen', 'check_output'):
        monkeypatch.setattr(env.subprocess, name, refuse)
    # Nor does it matter any more which Python runs it, or what is on PATH.
    monkeypatch.setattr(env, 'check_python', refuse)
    monkeypatch.setenv('PATH', '')
    assert env.main(['--stack', 'onedl']) == 0
    assert capsys.readouterr().out == '[setup] .venv-onedl is ready (onedl stack)\n'
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(('edited', 'anew'), [('dev', False), ('build', True)])
def test_changed_pins_update_or_renew(env, root, cache, monkeypatch, edited, anew):
    venv = finish(env, root, 'onedl')
    env.pins(root, edited).write_text('other==2\n')
    steps = []

    def step(_, title, *__, **___):
        assert not (venv / env.STAMP).exists()  # interrupted here, it is unfinished
        steps.append(title)

    monkeypatch.setattr(env.Setup, 'run', step)
    monkeypatch.setattr(env.Setup, 'mmcv_wheel', lambda _: Path(WHEEL))
    env.Setup(root, cache, 'onedl', 0).install()
    assert (f'making {venv}' in steps) == anew
    assert steps[-1] == 'checking that the stack imports'
    assert env.found_stamp(venv) == env.stamp(root, 'onedl')


def test_someone_elses_environment_is_left_alone(env, root, cache):
    (root / '.venv-onedl').mkdir()
    (root / '.venv-onedl' / 'pyvenv.cfg').write_text('version = 3.11.7\n')
    with pytest.raises(env.SetupError, match='did not make') as caught:
        make_setup(env, root, cache).make_venv()
    assert caught.value.status == 2


# What is missing


def run_main(env, root, monkeypatch):
    monkeypatch.setattr(env, 'ROOT', root)
    monkeypatch.setattr(env.subprocess, 'Popen', refuse)
    return int(env.main(['--stack', 'mmdet']))


def test_wrong_python(env, root, cache, monkeypatch, capsys):
    monkeypatch.setattr(env.sys, 'version_info', (3, 12, 1, 'final', 0))
    monkeypatch.setattr(env.platform, 'python_version', lambda: '3.12.1')
    assert run_main(env, root, monkeypatch) == 2
    message = capsys.readouterr().err
    assert f'{sys.executable} is Python 3.12.1, but this needs Python 3.11' in message
    assert 'PYTHON=/path/to/python3.11' in message


@needs_python_311
def test_no_ensurepip(env, root, cache, monkeypatch, capsys):
    specs = {'venv': object(), 'ensurepip': None}
    monkeypatch.setattr(env.importlib.util, 'find_spec', specs.get)
    assert run_main(env, root, monkeypatch) == 2
    message = capsys.readouterr().err
    assert 'no module "ensurepip"' in message
    assert 'python3.11-venv' in message


@needs_python_311
def test_no_compiler(env, root, cache, monkeypatch, capsys):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setenv('CXX', 'my-c++ -m64')
    assert run_main(env, root, monkeypatch) == 2
    message = capsys.readouterr().err
    assert 'gcc and my-c++ -m64, not found on PATH' in message
    assert 'build-essential' in message
    # The other stack's wheel is no help, but with this stack's it gets on to a step.
    wheels = cache / 'wheels' / 'cp311-torch2.13.0+cpu'
    write_wheel(wheels / WHEEL)
    assert run_main(env, root, monkeypatch) == 2
    write_wheel(wheels / WHEEL.replace('onedl_mmcv-2.3.6', 'mmcv-2.1.0'))
    with pytest.raises(AssertionError, match='ran something'):
        run_main(env, root, monkeypatch)


@needs_python_311
def test_no_headers(env, monkeypatch, tmp_path):
    monkeypatch.setattr(env.shutil, 'which', lambda name: name)
    monkeypatch.setattr(env.sysconfig, 'get_paths', lambda: {'include': str(tmp_path)})
    with pytest.raises(env.SetupError, match=r'Python\.h.*python3\.11-dev'):
        env.check_compiler()


def test_full_disk(env, tmp_path):
    env.check_disk(tmp_path, 0)
    with pytest.raises(env.SetupError, match=r'GiB free, but .* 1000000 GiB'):
        env.check_disk(tmp_path, 10**6)


# The wheel


def test_only_a_complete_wheel_counts(env, tmp_path):
    wheel = tmp_path / WHEEL
    assert env.find_wheel(tmp_path, PIN) is None
    write_wheel(wheel)
    assert env.find_wheel(tmp_path, PIN) == wheel
    assert env.find_wheel(tmp_path, 'mmcv==2.3.6') is None
    assert env.find_wheel(tmp_path, 'onedl-mmcv==2.3.7') is None
    wheel.write_bytes(wheel.read_bytes()[:-10])
    assert env.find_wheel(tmp_path, PIN) is None


@pytest.fixture
def builder(env, root, cache, monkeypatch):
    """A set-up with a torch, a compiler, and no pip."""
    probe = b'a warning first\n2.13.0+cpu 0\n'
    monkeypatch.setattr(env.subprocess, 'check_output', lambda *_, **__: probe)
    monkeypatch.setattr(env, 'check_compiler', lambda: None)
    return make_setup(env, root, cache)


def test_a_built_wheel_moves_into_the_cache(env, builder, cache, monkeypatch):
    folder = cache / 'wheels' / 'cp311-torch2.13.0+cpu'

    def build(_, __, *command, **env):
        assert command[-1] == PIN
        assert env['MMCV_WITH_OPS'] == '1'
        assert env['CUDA_VISIBLE_DEVICES'] == ''
        assert list(folder.glob('*.whl')) == []
        write_wheel(Path(command[command.index('-w') + 1]) / WHEEL)

    monkeypatch.setattr(builder, 'run', build)
    assert builder.mmcv_wheel() == folder / WHEEL
    assert [path.name for path in folder.iterdir()] == [WHEEL]
    monkeypatch.setattr(builder, 'run', refuse)
    assert builder.mmcv_wheel() == folder / WHEEL


def test_an_interrupted_build_leaves_no_wheel_and_the_next_recovers(
    env, builder, cache, monkeypatch
):
    folder = cache / 'wheels' / 'cp311-torch2.13.0+cpu'
    work = folder / f'.build-{PIN}'

    def interrupted(*_, **__):
        (work / 'out').mkdir()
        (work / 'out' / WHEEL).write_bytes(b'PK half a wheel')
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, 'run', interrupted)
    with pytest.raises(KeyboardInterrupt):
        builder.mmcv_wheel()
    assert env.find_wheel(folder, PIN) is None
    assert list(folder.glob('*.whl')) == []

    monkeypatch.setattr(
        builder, 'run', lambda *_, **__: write_wheel(work / 'out' / WHEEL)
    )
    assert builder.mmcv_wheel() == folder / WHEEL
    assert not work.exists()


def test_a_build_that_outlived_its_setup_is_not_repeated(
    env, builder, cache, monkeypatch
):
    folder = cache / 'wheels' / 'cp311-torch2.13.0+cpu'
    write_wheel(folder / f'.build-{PIN}' / 'out' / WHEEL)
    monkeypatch.setattr(builder, 'run', refuse)
    assert builder.mmcv_wheel() == folder / WHEEL


def test_a_build_without_a_wheel_is_reported(env, builder, monkeypatch):
    monkeypatch.setattr(builder, 'run', lambda *_, **__: None)
    with pytest.raises(env.SetupError, match='left no wheel') as caught:
        builder.mmcv_wheel()
    assert caught.value.status == 1


# Steps


def test_a_step_shows_that_it_lives(env, root, cache, monkeypatch, capsys):
    monkeypatch.setattr(env, 'REPORT_EVERY', 0.3)
    code = 'import time; print("[7/77] c++ x.cpp", flush=True); time.sleep(0.8)'
    make_setup(env, root, cache).run('compiling', 'hint', sys.executable, '-c', code)
    out = capsys.readouterr().out
    assert out.startswith('[setup] compiling\n[setup]   ... 0 s')
    assert ', 7 of 77 files compiled\n' in out


def test_a_failed_step_shows_the_end_of_the_log_and_a_hint(env, root, cache):
    setup = make_setup(env, root, cache)
    setup.log.write_text('of an earlier step\n')
    code = 'for i in range(100): print("line", i)\nraise SystemExit(3)'
    with pytest.raises(env.SetupError) as caught:
        setup.run('installing x', 'Do this.', sys.executable, '-c', code)
    message = str(caught.value)
    assert caught.value.status == 1
    assert 'line 75\n' in message and 'line 74\n' not in message
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


def test_an_interrupted_step_ends_with_all_it_started(env, root, cache, monkeypatch):
    setup = make_setup(env, root, cache)
    pids = cache / 'pids'
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


def test_a_second_setup_waits_for_the_first_and_for_what_it_left(
    env, cache, monkeypatch, capsys
):
    path = cache / 'setup.lock'
    with env.locked(path) as lock:
        left = subprocess.Popen(['sleep', '60'], pass_fds=(lock,))
    naps = []

    def nap(seconds):
        naps.append(seconds)
        left.kill()
        left.wait()

    monkeypatch.setattr(env.time, 'sleep', nap)
    with env.locked(path):
        assert naps == [1]
    assert f'holds {path}' in capsys.readouterr().out


def test_it_parses_under_older_pythons():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
