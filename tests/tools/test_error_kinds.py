"""Kinds of errors, on detections whose kinds are known."""

import numpy as np
import pytest

pytest.importorskip('mmdet', reason='the tools need mmdet')
from tools.analysis_tools import error_kinds
from tools.analysis_tools.detections import Run

CLASSES = ('cat', 'dog')


def box(x, width=9.0, score=None):
    row = [x, 0.0, x + width, 9.0]
    return row if score is None else [*row, score]


def rows(*boxes):
    return np.array(boxes, dtype=np.float32).reshape(-1, 5)


def truth(cats=(), dogs=(), ignored=()):
    boxes = np.array([*cats, *dogs], dtype=np.float32).reshape(-1, 4)
    return dict(
        bboxes=boxes,
        labels=np.array([0] * len(cats) + [1] * len(dogs), dtype=int),
        bboxes_ignore=np.array(ignored, dtype=np.float32).reshape(-1, 4),
        labels_ignore=np.zeros(len(ignored), dtype=int),
    )


@pytest.fixture
def run():
    """All detections are cats; the second image has a difficult cat and a missed one.

    A box of ten pixels, moved by 2, overlaps by 8/12; by 6, by 4/16; by 9, by 1/19.
    """
    found = [
        rows(
            box(0, score=0.9),  # right
            box(2, score=0.8),  # duplicate
            box(6, score=0.7),  # place
            box(100, score=0.95),  # class: that is a dog
            box(106, score=0.6),  # other
            box(50, score=0.5),  # background
            box(109, score=0.4),  # background, too far from the dog
        ),
        rows(box(0, score=0.99)),  # on the difficult one
    ]
    return Run(
        name='run',
        classes=CLASSES,
        images={0: '0.jpg', 1: '1.jpg'},
        truth=[truth([box(0)], [box(100)]), truth([box(70)], ignored=[box(0)])],
        detections=[[cats, rows()] for cats in found],
    )


def test_every_detection_gets_its_kind(run):
    names = [
        [error_kinds.KINDS[kind] if kind >= 0 else None for kind in cats]
        for cats, _ in error_kinds.kinds_of(run)
    ]
    right = [None, 'duplicate', 'place', 'class', 'other', *['background'] * 2]
    assert names == [right, [None]]


def test_ap_without_each_kind(run):
    # Two cats, of which one is found, behind the dog; no dog is found.
    assert error_kinds.analyse(run) == pytest.approx(
        dict(
            ap50=100 * (1 / 2) / 2 / 2,
            duplicate=12.5,
            **{'class': 100 * 1 / 2 / 2},
            place=12.5,
            background=12.5,
            other=12.5,
            all=25.0,
            # The cat and the dog of the first image.
            **{'any class': 100 * 2 / 3},
        ),
        abs=0.01,
    )


def test_images_without_objects_or_detections(run):
    empty = [[rows(), rows()], [rows(box(0, score=0.5)), rows()]]
    found = error_kinds.analyse(
        Run('empty', CLASSES, {0: '', 1: ''}, [truth([box(0)]), truth()], empty)
    )
    assert found['ap50'] == found['all'] == found['any class'] == 0


def test_table_shows_what_was_found(run):
    lines = error_kinds.table({'run': error_kinds.analyse(run)}).splitlines()
    assert lines[0].startswith(
        '| AP50 | as it is | without duplicate | without class |'
    )
    assert lines[2] == '| run | 12.5 | 12.5 | 25.0 | 12.5 | 12.5 | 12.5 | 25.0 | 66.7 |'


def test_files_come_in_pairs(capsys):
    with pytest.raises(SystemExit):
        error_kinds.main(['config.py'])
    assert 'expected pairs CONFIG PREDICTIONS' in capsys.readouterr().err
    # A pair after a --name belongs to the pairs too, and here lacks its name.
    with pytest.raises(SystemExit):
        error_kinds.main(['a.py', 'a.npz', '--name', 'a', 'b.py', 'b.npz'])
    assert "got 4 files and the names ['a']" in capsys.readouterr().err
