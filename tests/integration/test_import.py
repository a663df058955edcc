"""The package imports with and without mmdet; tools find mmdet's scripts."""

import os
import subprocess
import sys

import pytest

from tests import ROOT

# Hides packages from the import system, as if they were not installed.
HIDE = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    names = {names!r}
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in self.names:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n in Hide.names else real(n, p)
"""


def run(code, *hidden):
    program = HIDE.format(names=set(hidden)) + code
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', program],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_functional_is_complete_without_mmdet():
    code = """
import torch, rambo_det
from rambo_det.functional import ap_loss
print(rambo_det.__all__, ap_loss(torch.ones(1, 2), torch.eye(2)[:1], lambd=1.0))
assert not {'mmdet', 'mmcv', 'mmengine'} & set(sys.modules)
"""
    result = run(code, 'mmdet', 'mmcv', 'mmengine')
    assert result.returncode == 0, result.stderr
    assert "['__version__', 'functional'] tensor([0.5000])" in result.stdout


def test_an_import_error_inside_mmdet_propagates():
    pytest.importorskip('mmdet', reason='hides a dependency of mmdet')
    result = run('import rambo_det', 'mmcv')
    assert result.returncode != 0
    assert "No module named 'mmcv'" in result.stderr


def test_functional_imports_torch_alone():
    code = """
import torch
before = set(sys.modules)
import rambo_det.functional
new = {name.split('.')[0] for name in set(sys.modules) - before}
new -= set(sys.stdlib_module_names)
assert new == {'rambo_det'}, new
"""
    result = run(code, 'mmdet', 'mmcv', 'mmengine')
    assert result.returncode == 0, result.stderr


SCRIPTS = [
    str(path.relative_to(ROOT))
    for path in sorted(ROOT.glob('tools/**/*.py'))
    if "__name__ == '__main__'" in path.read_text(encoding='utf-8')
]


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS)
def test_every_tool_runs_from_anywhere(script, tmp_path):
    """Without an installed package, too; mmdet's own scripts answer for ours."""
    pytest.importorskip('mmdet', reason='most tools need mmdet')
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', ROOT / script, '--help'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    mmdets = script in ('tools/train.py', 'tools/test.py')
    assert ('--work-dir WORK_DIR' in result.stdout) >= mmdets


@pytest.mark.parametrize('name', ['train', 'test'])
def test_our_scripts_hide_no_module_of_the_standard_library(name):
    """Python puts their folder on the path, where a ``test.py`` is."""
    pytest.importorskip('mmdet', reason='runs the scripts of mmdet')
    code = f"""
import runpy
sys.path.insert(0, {str(ROOT / 'tools')!r})
sys.argv = ['script', '--help']
try:
    runpy.run_path({str(ROOT / 'tools' / f'{name}.py')!r}, run_name='__main__')
except SystemExit:
    import test.support
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_tools_say_when_mmdet_is_missing():
    code = f"""
sys.path.insert(0, {str(ROOT)!r})
from tools.common.mmdet_script import run_mmdet_script
run_mmdet_script('train')
"""
    result = run(code, 'mmdet')
    assert result.returncode == 1
    assert 'not installed' in result.stderr and 'make setup' in result.stderr
