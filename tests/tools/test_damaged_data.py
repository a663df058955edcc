"""What check_voc calls well, or has repaired, is what mmdet can train with."""

import os
import shutil

import cv2
import numpy as np
import pytest

pytest.importorskip('mmdet', reason='compares with what mmdet loads')
from tests.helpers.damaged_data import CLASSES, LISTS, assert_trains, generate
from tools.dataset_tools.check_voc import main
from tools.dataset_tools.make_demo_voc import digest
from tools.dataset_tools.voc_lists import read_lines

COUNT = int(os.environ.get('RAMBO_DAMAGED', 40))
BLOCK = 10


def pixels(folder):
    """Return the pixels of all images, as stored, in no order."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    files = (np.frombuffer(path.read_bytes(), np.uint8) for path in folder)
    read = (cv2.imdecode(file, flags) for file in files if len(file))
    return {picture.tobytes() for picture in read if picture is not None}


def names(root):
    texts = (root / f'ImageSets/Main/{stem}.txt' for stem in LISTS)
    return [len(read_lines(path)) for path in texts]


@pytest.mark.parametrize('block', range(0, COUNT, BLOCK))
def test_the_verdict_is_that_of_mmdet(block, tmp_path, capsys):
    for seed in range(block, block + BLOCK):
        root, fixed = tmp_path / f'{seed}', tmp_path / f'{seed}-fixed'
        folders = generate(root, seed)
        arguments = ['--classes', *CLASSES, '--jobs', '1', '--show', '0']
        before = digest(root)
        code = main([str(root), *arguments, '--fix', str(fixed)])
        shown, copy = capsys.readouterr().out.split('The copy, checked:')
        assert digest(root) == before
        try:
            if shown.rstrip().endswith('all well') or '\nall well\n' in shown:
                assert_trains(root, **folders)
            if code == 0:
                assert copy.rstrip().endswith('all well')
                assert_trains(fixed)
            assert min(names(fixed)) > 0
            stored = pixels(p for p in root.rglob('*') if p.is_file())
            assert pixels(fixed.glob('JPEGImages/*')) <= stored
        except Exception as error:
            raise AssertionError(f'seed {seed}:\n{shown}\nCOPY{copy}') from error
        shutil.rmtree(root)
        shutil.rmtree(fixed)
