"""What a threshold leaves of a run's detections."""

import numpy as np
import pytest

pytest.importorskip('mmdet', reason='the tool needs mmdet')

from tools.analysis_tools import measure_thresholds as tool
from tools.analysis_tools.plot_results import Run


def run_with(scores):
    """One image with as many objects as scores, each found at its score."""
    corners = np.arange(len(scores))[:, None] * np.array([20.0, 0.0])
    boxes = np.hstack([corners, corners + 10]).astype(np.float32)
    truth = dict(
        bboxes=boxes,
        labels=np.zeros(len(scores), int),
        bboxes_ignore=np.zeros((0, 4), np.float32),
        labels_ignore=np.zeros(0, int),
    )
    rows = np.hstack([boxes, np.array(scores)[:, None]]).astype(np.float32)
    return Run('run', ('cat',), {0: '0.jpg'}, [truth], [[rows]])


def test_every_threshold_keeps_the_detections_from_it_on():
    found = tool.of_run(run_with([0.9, 0.05, 0.02, 0.0002]))
    assert {name: row['detections'] for name, row in found.items()} == {
        '0.0001': 4,
        '0.001': 3,
        '0.01': 3,
        '0.05': 2,
        '0.1': 1,
        '0.3': 1,
        '0.5': 1,
        '0.7': 1,
        '0.9': 1,
        '0.97': 0,
    }
    for row in found.values():  # all are right: AP is recall
        assert row['ap50'] == pytest.approx(25 * row['detections'])


def test_table_has_a_column_for_each_run():
    runs = dict(a=tool.of_run(run_with([0.4])), b=tool.of_run(run_with([0.4, 0.2])))
    lines = tool.table(dict(runs=runs)).splitlines()
    assert lines[0].split(' | ')[1:3] == ['a: AP50', 'b: AP50']
    assert lines[-5] == '| 0.3 | 100.0 | 50.0 | 1 | 1 |'
    assert lines[-4] == '| 0.5 | 0.0 | 0.0 | 0 | 0 |'
    assert lines[-1] == '| 0.97 | 0.0 | 0.0 | 0 | 0 |'
