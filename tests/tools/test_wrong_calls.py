"""A wrong call of any tool ends in one line on the error stream and exit status 2."""

import os
import re
import runpy
import sys

import pytest

pytest.importorskip('mmdet', reason='most tools import it')
import argparse

from mmengine.config import Config
from mmengine.runner import Runner

from tests import ROOT
from tools.common.wrong_calls import read_config, writable_file

# What tools that run mmdet's scripts replace, in processes of their own.
REPLACED = [
    (argparse.ArgumentParser, 'error'),
    (Config, 'fromfile'),
    (Runner, 'from_cfg'),
]
TOOLS = {
    path.relative_to(ROOT / 'tools').with_suffix('').as_posix(): path
    for path in sorted((ROOT / 'tools').rglob('*.py'))
    if "\nif __name__ == '__main__'" in path.read_text(encoding='utf-8')
}
CONFIG = str(ROOT / 'configs/demo/faster-rcnn_tiny_fpn_rambo_demo.py')
# The arguments, and what the line says. `gone` does not exist, `empty` is an empty
# file, `text` one with other content, `folder` a folder, `text/in` cannot be written.
GONE, FOLDER = 'gone, which does not exist', 'folder, which is a folder'
EMPTY, TEXT = 'empty, which is an empty one', 'text: expected'
NO_OUT, NO_MARKS = 'cannot write .*text/in', 'expected one line'
NO_PAIR = '--cfg-options: must be KEY=VALUE, got a'
NO_CONFIG = 'is no config that can be read'
RUN = [
    ('gone', NO_CONFIG),
    ('folder', NO_CONFIG),
    ('empty', NO_CONFIG),
    (f'{CONFIG} --work-dir text/in', NO_OUT),
    (f'{CONFIG} --no-such', 'arguments'),
    (f'{CONFIG} --cfg-options a', NO_PAIR),
    (f'{CONFIG} --cfg-options b=1 a=[(1,]', NO_PAIR),
]
TEST = [
    *[(f'{args} checkpoint', said) for args, said in RUN],
    (f'{CONFIG} gone --work-dir new', 'expected a checkpoint, got gone'),
    (f'{CONFIG} text --out found.json', 'must end in .pkl'),
]
CALLS = {
    'analysis_tools/benchmark_loss': [
        ('--cases nothing', 'invalid choice'),
        ('--repeats 0', 'must be 1 or more, got 0'),
        ('--device nowhere', 'nowhere'),
        ('--out text/in', NO_OUT),
    ],
    'analysis_tools/benchmark_report': [
        ('gone', GONE),
        ('folder', FOLDER),
        ('empty', EMPTY),
        ('text', TEXT),
        ('pipe', 'pipe, which is no regular file'),
        ('deep.json', 'RecursionError'),
        ('other.json', 'expected the JSON of benchmark_loss'),
    ],
    'analysis_tools/calibrate': [
        (f'{CONFIG} gone --ann-file a --out new', GONE),
        (f'{CONFIG} folder --ann-file a --out new', FOLDER),
        ('text text --ann-file a --out new', NO_CONFIG),
        (f'{CONFIG} text --ann-file a --out new', 'text.* is damaged'),
        (f'{CONFIG} text --ann-file a --out text/in', NO_OUT),
        (f'{CONFIG} text --ann-file a --out new --cfg-options a', NO_PAIR),
        (f'{CONFIG} text --ann-file a --out text', 'is CHECKPOINT; name another file'),
    ],
    'analysis_tools/error_kinds': [
        ('', 'expected pairs CONFIG PREDICTIONS'),
        ('gone gone', NO_CONFIG),
        (f'{CONFIG} gone', 'there is no|gone: expected'),
        ('--table other.json', 'expected the results'),
        ('--table folder', FOLDER),
        (f'{CONFIG} text --out folder', 'expected a file to write'),
    ],
    'analysis_tools/plot_results': [
        (f'{CONFIG} gone --out new', GONE),
        ('text text --out new', NO_CONFIG),
        (f'{CONFIG} text --out text/in', NO_OUT),
        (f'{CONFIG} text --out new --images 0', 'must be 1 or more'),
    ],
    'dataset_tools/check_voc': [
        ('', 'expected either DATA or --config'),
        ('gone', 'expected a folder with a data set'),
        ('folder', 'expected the folders Annotations and JPEGImages'),
        ('empty', 'expected a JSON file of COCO'),
        ('text', 'expected a JSON file of COCO'),
        ('other.json', "with a list 'images'"),
        ('pipe', 'expected a folder with a data set'),
        ('folder --json pipe', 'expected a file to write'),
        ('--config gone', GONE),
        ('--config text', NO_CONFIG),
        ('--config none.py', 'names no data of VOC or COCO'),
        ('--config none.py --classes a', 'leave the others out'),
        ('folder --json folder', 'expected a file to write'),
        ('folder --copies text/in', NO_OUT),
        ('folder --fix folder/in', 'is inside folder'),
        ('folder --fix text', 'exists and is not empty'),
        ('folder --link', 'belong to --fix'),
        ('folder --classes a a', 'names a class twice: a a'),
        ('folder --show -1', 'must be 0 or more, got -1'),
        ('folder --images gone', '--images: expected a folder'),
    ],
    'dataset_tools/to_voc': [
        ('gone --out new', 'SOURCE must be a folder or a file'),
        ('empty --out new', 'expected 3 or more images'),
        ('folder --out text', 'exists and is not empty'),
        ('folder --out text/in', 'text'),
        ('folder --out new --split 1 2 0', 'must be three numbers above 0'),
        ('folder --out new --source-of [', 'is no regular expression'),
    ],
    'dataset_tools/make_demo_voc': [
        ('', 'required: --out'),
        ('--out text', 'text'),
        ('--out text/in', NO_OUT),
        ('--out new --train -1', 'expected|must'),
    ],
    'dataset_tools/omniglot': [
        ('gone text --out new', GONE),
        ('text text --out new', 'not a zip file'),
        ('text text --out text/in', NO_OUT),
    ],
    'model_converters/to_stock': [
        (f'{CONFIG} gone new.pth', GONE),
        ('text text new.pth', NO_CONFIG),
        (f'{CONFIG} text new.pth', 'text.* is damaged'),
        (f'{CONFIG} text new', 'OUT must end in .pth, got new'),
        (f'{CONFIG} text text/in.pth', NO_OUT),
    ],
    'model_converters/drop_background': [
        ('gone new', GONE),
        ('empty new', EMPTY),
        ('text new', 'text: expected a checkpoint of mmengine'),
        ('text folder', 'expected a file to write'),
        ('text new --num-classes 0', 'must be 1 or more'),
    ],
    'dev/check_stock_heads': [('--update gone', GONE), ('--update text', NO_MARKS)],
    'dev/demo': [('--config gone', GONE), ('--data text/in', NO_OUT)],
    'dev/draw_algorithm': [('--out folder', 'expected a file to write')],
    'dev/draw_readme': [('--out text/in', NO_OUT), ('--update text', NO_MARKS)],
    'dev/setup_env': [('--stack other', 'invalid choice')],
    'dev/write_metafile': [('more', 'unrecognized arguments: more')],
    'experiments/calibrations': [
        ('', 'expected either WORK_DIR and --ann-file'),
        ('folder --ann-file a', 'expected the work dir of a training'),
        ('folder --ann-file a --cfg-options a', NO_PAIR),
        ('--table-only --out text', 'text'),
        ('--table-only --update text', NO_MARKS),
    ],
    'experiments/check_detectors': [
        ('--only nothing', 'no shipped config has such a name'),
        ('--out text', 'text: expected results'),
        ('--steps 0 --table-only', 'must be 1 or more'),
        ('--table-only --update text', NO_MARKS),
    ],
    'experiments/converged': [
        ('', 'expected either CONFIG to train'),
        ('gone', GONE),
        ('--add text', 'text'),
        ('--table-only --update text', NO_MARKS),
        ('--table-only --out folder', 'expected a file to write'),
    ],
    'experiments/retrieval': [
        ('gone', GONE),
        ('--table-only --out text', 'text'),
        ('--table-only --update text', NO_MARKS),
    ],
    'train': RUN,
    'test': TEST,
    'experiments/train': RUN[:1],
    'experiments/test': TEST[:1],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the calls name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    for name, text in {
        'empty': '',
        'text': 'no = [\n',
        'other.json': '{"a": {"b": 1}}',
        'none.py': 'model = None\n',
        'deep.json': '[' * 10**5,
    }.items():
        (tmp_path / name).write_text(text)
    os.mkfifo(tmp_path / 'pipe')
    return tmp_path


@pytest.mark.parametrize('tool', sorted(TOOLS))
def test_a_wrong_call_is_one_line(tool, folder, monkeypatch, capsys):
    before = sorted(folder.rglob('*'))
    for arguments, said in [*CALLS[tool], ('--no-such-option', '')]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', [TOOLS[tool].name, *arguments.split()])
            patch.setattr(sys, 'path', [str(TOOLS[tool].parent), *sys.path])
            for owner, name in REPLACED:
                patch.setattr(owner, name, owner.__dict__[name])
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(str(TOOLS[tool]), run_name='__main__')
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if not line.startswith(('images: ', 'images:'))
        ]
        assert stopped.value.code == 2, (arguments, stopped.value.code, lines)
        assert len(lines) == 1 and re.search(said, lines[0]), (arguments, said, lines)
    assert sorted(folder.rglob('*')) == before  # nothing was written


def test_every_tool_has_wrong_calls():
    assert {*CALLS} == {*TOOLS}


def test_right_calls_are_none(folder):
    (folder / 'mine.py').write_text(
        "_base_ = 'rambo_det::demo/faster-rcnn_tiny_fpn_rambo_demo.py'\n"
    )
    assert read_config(folder / 'mine.py').model
    assert writable_file('new/folder/file').name == 'file'
    assert not (folder / 'new').exists()
