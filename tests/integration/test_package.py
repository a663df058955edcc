"""What is shipped: an sdist of all files, a wheel that trains from anywhere."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests import ROOT
from tests.helpers.demo_configs import RAMBO

pytest.importorskip('mmdet', reason='configs are those of mmdet')
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS

import rambo_det
from tools.dev.write_metafile import METAFILE, metafile

NAME = RAMBO.relative_to(ROOT / 'configs').as_posix()
INHERITING = f"""
_base_ = 'rambo_det::{NAME}'
train_dataloader = dict(batch_size=4)
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(logger=dict(interval=1))
"""


def run(folder, *arguments, **environment):
    """Run Python in a folder; return what it prints."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, arguments)],
        cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_a_config_inherits_one_of_the_package():
    """Here from a checkout: the links in .mim lead to what a wheel has copies of."""
    assert (ROOT / 'rambo_det' / '.mim' / 'tools').samefile(ROOT / 'tools')
    cfg = Config.fromstring(INHERITING, '.py')
    theirs = Config.fromfile(RAMBO)
    head, wanted = (c.model.roi_head.bbox_head for c in (cfg, theirs))
    assert head.loss_cls.type == wanted.loss_cls.type == 'RaMBOLoss'
    assert head.num_classes == wanted.num_classes
    cfg.model.backbone._scope_ = 'rambo_det'  # as where a config replaces it
    model = MODELS.build(dict(cfg.model, _scope_='rambo_det'))
    assert type(model.roi_head.bbox_head.loss_cls) is rambo_det.RaMBOLoss


def test_every_config_is_in_the_metafile():
    """Parsed as mim does; each entry has a file and each file an entry."""
    assert METAFILE.read_text(encoding='utf-8') == metafile(), (
        'run tools/dev/write_metafile.py'
    )
    mim = ROOT / 'rambo_det' / '.mim'
    index = yaml.safe_load((mim / 'model-index.yml').read_text(encoding='utf-8'))
    parts = [
        yaml.safe_load((mim / p).read_text(encoding='utf-8')) for p in index['Import']
    ]
    models = [model for part in parts for model in part['Models']]
    collections = {c['Name'] for part in parts for c in part['Collections']}
    assert {model['In Collection'] for model in models} == collections
    assert len({model['Name'] for model in models}) == len(models)
    shipped = {p.relative_to(ROOT) for p in (ROOT / 'configs').glob('[!_]*/*.py')}
    assert {Path(model['Config']) for model in models} == shipped


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    """An sdist, packed of a copy: building writes beside what it packs."""
    source = tmp_path_factory.mktemp('sdist') / 'source'
    lines = (ROOT / '.gitignore').read_text(encoding='utf-8').splitlines()
    ignored = [line.strip('/') for line in lines if line and line[0] != '#']
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns('.git', *ignored)
    )
    files = {p.relative_to(source) for p in source.rglob('*') if p.is_file()}
    run(source, '-c', 'from setuptools import build_meta as b; b.build_sdist("..")')
    (path,) = source.parent.glob('*.tar.gz')
    return path, files


@pytest.fixture(scope='module')
def site(sdist, tmp_path_factory):
    """An empty folder, into which the wheel made of the sdist is installed."""
    folder = tmp_path_factory.mktemp('site')
    pip = ['-m', 'pip', '--disable-pip-version-check', 'install', '--no-index']
    offline = ['--no-build-isolation', '--no-deps', '--target', folder]
    run(folder, *pip, *offline, sdist[0])
    return folder


def test_the_sdist_has_every_file(sdist):
    path, files = sdist
    with tarfile.open(path) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert files - packed == set()


def test_the_wheel_has_the_configs_and_what_users_run(site):
    mim = site / 'rambo_det' / '.mim'
    for end in ('py', 'yml'):
        packed, ours = (
            {p.relative_to(root): p.read_bytes() for p in root.rglob(f'*.{end}')}
            for root in (mim / 'configs', ROOT / 'configs')
        )
        assert packed == ours != {}
    rooms = {path.stem for path in (mim / 'tools').iterdir()}
    assert rooms >= {'train', 'test', 'analysis_tools', 'dataset_tools', 'common'}
    assert not rooms & {'dev', 'experiments'}
    for path in (mim / 'tools').rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        asked = set(re.findall(r'^\s*(?:from|import) tools\.(\w+)', text, re.MULTILINE))
        assert asked <= rooms, path


@pytest.mark.slow
def test_the_wheel_trains_from_outside_of_the_checkout(site, tmp_path):
    here = dict(PYTHONPATH=str(site), RAMBO_DEMO_DATA=str(tmp_path / 'voc'))
    tool = ['-m', 'rambo_det']
    made = run(
        tmp_path, *tool, 'make_demo_voc', '--out=voc', '--train=8', '--test=2', **here
    )
    assert '8 + 2 images written' in made
    (tmp_path / 'own.py').write_text(INHERITING, encoding='utf-8')
    log = run(tmp_path, *tool, 'train', 'own.py', '--work-dir=work', **here)
    assert 'Epoch(train) [1][2/2]' in log and 'pascal_voc/AP50' in log
    # What mmengine says where a scope has no registries, or these no types.
    assert 'rambo_det is not installed' not in log and 'Failed to' not in log
    assert (tmp_path / 'work' / 'epoch_1.pth').is_file()


def test_a_wrong_name_shows_the_tools_and_where_the_configs_are(site, tmp_path):
    with pytest.raises(AssertionError) as caught:
        run(tmp_path, '-m', 'rambo_det', 'tran', PYTHONPATH=str(site))
    message = str(caught.value)
    assert re.search(r'tools: .*train.*drop_background', message)
    assert f'configs: {site / "rambo_det" / ".mim" / "configs"}' in message
