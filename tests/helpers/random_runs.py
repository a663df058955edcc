"""Detections and objects to measure by."""

import numpy as np

from tools.analysis_tools.detections import Run


def random_run(seed, images=12, classes=4, decimals=None):
    """A run with hits, misses, doubles and difficult objects; class 3 has none."""
    rng = np.random.default_rng(seed)
    truth, detections = [], []
    for _ in range(images):
        count = rng.integers(0, 6)
        corners = rng.uniform(0, 60, (count, 2))
        boxes = np.hstack([corners, corners + rng.uniform(10, 30, (count, 2))])
        labels = rng.integers(0, classes - 1, count)
        hard = rng.random(count) < 0.3
        truth.append(
            dict(
                bboxes=boxes[~hard].astype(np.float32),
                labels=labels[~hard],
                bboxes_ignore=boxes[hard].astype(np.float32),
                labels_ignore=labels[hard],
            )
        )
        near = np.repeat(boxes, 2, axis=0) + rng.normal(0, 3, (2 * count, 4))
        stray = rng.uniform(0, 40, (3, 4)) + np.array([0, 0, 40, 40])
        scores = rng.random((2 * count + 3, 1))
        scores = scores if decimals is None else scores.round(decimals)
        kinds = np.append(np.repeat(labels, 2), rng.integers(0, classes, 3))
        rows = np.hstack([np.vstack([near, stray]), scores]).astype(np.float32)
        detections.append([rows[kinds == label] for label in range(classes)])
    names = tuple('abcdefgh'[:classes])
    return Run('run', names, dict.fromkeys(range(images), ''), truth, detections)


def boxes_run(truth, found, difficult=()):
    """One image of one class; a found box is x1, y1, x2, y2 and score."""
    annotation = dict(
        bboxes=np.array(truth, np.float32).reshape(-1, 4),
        labels=np.zeros(len(truth), int),
        bboxes_ignore=np.array(difficult, np.float32).reshape(-1, 4),
        labels_ignore=np.zeros(len(difficult), int),
    )
    rows = np.array(found, np.float32).reshape(-1, 5)
    return Run('boxes', ('a',), {0: ''}, [annotation], [[rows]])
