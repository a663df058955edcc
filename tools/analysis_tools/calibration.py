"""How far scores are from probabilities, and the map that makes them such."""

from __future__ import annotations

from typing import Callable

import numpy as np
from mmdet.evaluation.functional.bbox_overlaps import bbox_overlaps
from scipy.optimize import minimize
from scipy.special import expit, log_softmax

from tools.analysis_tools.detections import HIT, IGNORED, Run

BINS = 25
# Standard deviations of the classes' slopes (of the logarithm) and offsets around
# those of all classes together. A class with some dozens of objects overrules them.
SLOPE_SPREAD, OFFSET_SPREAD = 0.5, 1.0


def bin_means(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return count, mean score and mean target of each bin that has a detection.

    Args:
        scores: Of shape (N,), in [0, 1].
        targets: What they should say, of shape (N,).

    Returns:
        Of shape (bins that are not empty, 3). A bin holds its upper bound and not its
        lower one, but for the first.
    """
    edges = np.linspace(0, 1, BINS + 1)
    index = np.clip(np.digitize(scores, edges, right=True) - 1, 0, BINS - 1)
    sums = [np.bincount(index, w, BINS) for w in (None, scores, targets)]
    count, score, target = (s[sums[0] > 0] for s in sums)
    return np.stack([count, score / count, target / count], axis=1)


def calibration_error(scores: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean over detections of how far their bin is off; NaN without any."""
    if not len(scores):
        return float('nan')
    count, score, target = bin_means(scores, targets).T
    return float((count * abs(score - target)).sum() / count.sum())


def counted(run: Run, label: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of the detections that count, and whether each is a hit.

    What lies on a difficult object does not count.

    Args:
        run: The run.
        label: A class; by default all classes.
    """
    labels = range(len(run.classes)) if label is None else [label]
    scores, flags = (
        np.concatenate([image[i] for image in parts for i in labels])
        for parts in (
            [[rows[:, 4] for rows in image] for image in run.detections],
            run.flags,
        )
    )
    keep = flags != IGNORED
    return scores[keep].astype(float), flags[keep] == HIT


def d_ece(run: Run) -> float:
    """Return the detection ECE: scores against precision, all classes together.

    As in Kuzucu et al., *On Calibration of Object Detectors*, ECCV 2024 (arXiv
    2405.20459), with 25 bins; hits are those of VOC at the run's IoU.
    """
    return calibration_error(*counted(run))


def laece0(run: Run) -> float:
    """Return LaECE₀ of the same paper: scores against IoU, the mean over classes.

    From the highest score down, each detection takes the object of its class with
    which it overlaps most and that is not taken; its IoU is the target, 0 without one.
    A detection that only overlaps with a difficult object does not count.
    """
    errors = []
    for label, curve in enumerate(run.curves):
        scores, targets = [], []
        for truth, image in zip(run.truth, run.detections):
            rows = image[label]
            parts = [truth[k][truth[f'labels{k[6:]}'] == label] for k in _BOXES]
            boxes, plain = np.vstack(parts), len(parts[0])
            free = np.ones(len(boxes))
            overlaps = bbox_overlaps(rows[:, :4], boxes).astype(float)
            for row in np.argsort(-rows[:, 4], kind='stable'):
                found = overlaps[row] * free
                best = int(found[:plain].argmax()) if plain else 0
                if plain and found[best] > 0:
                    free[best] = 0
                elif (found[plain:] > 0).any():
                    continue
                scores.append(rows[row, 4])
                targets.append(found[best] if plain else 0.0)
        if curve.objects:
            errors.append(calibration_error(np.array(scores), np.array(targets)))
    return float(np.nanmean(errors)) if np.isfinite(errors).any() else float('nan')


_BOXES = ('bboxes', 'bboxes_ignore')


def _minimise(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray
) -> np.ndarray:
    return minimize(loss, start, jac=True, method='L-BFGS-B').x


def fit_sigmoid(
    logits: np.ndarray, hits: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a and b of each class so that sigmoid(a·z + b) is the share of hits.

    Platt scaling with a > 0: the order within a class stays. First one map for all
    classes together is fitted, then that of each class around it, with a Gaussian
    prior, so that a class with few detections keeps nearly the common map.

    Args:
        logits: z of each detection, of shape (N,).
        hits: Whether it is a hit, of shape (N,).
        labels: Its class, of shape (N,).
        classes: The number of classes C.

    Returns:
        a and b, of shape (C,) each.
    """
    centre, spread = logits.mean(), max(logits.std(), 1e-6)
    units, hits = (logits - centre) / spread, hits.astype(float)

    def fit(chosen: np.ndarray, prior: np.ndarray | None) -> np.ndarray:
        u, y = units[chosen], hits[chosen]

        def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
            z = np.exp(x[0]) * u + x[1]
            value, error = np.logaddexp(0, z).sum() - (y * z).sum(), expit(z) - y
            slope = np.array([(error * u).sum() * np.exp(x[0]), error.sum()])
            if prior is None:
                return value, slope
            off = (x - prior) / (SLOPE_SPREAD, OFFSET_SPREAD)
            return value + off @ off / 2, slope + off / (SLOPE_SPREAD, OFFSET_SPREAD)

        return _minimise(loss, np.zeros(2) if prior is None else prior)

    common = fit(np.ones(len(units), dtype=bool), None)
    found = np.stack([fit(labels == label, common) for label in range(classes)])
    scale = np.exp(found[:, 0]) / spread
    return scale, found[:, 1] - scale * centre


def fit_softmax(
    logits: np.ndarray, hits: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a temperature and a bias of each class for columns with a softmax.

    The probability of a detection of class c is softmax(a·z + b)[c]; the background has
    the last column and the bias 0. The biases of the classes have a Gaussian prior
    around a common one.

    Args:
        logits: The columns of each detection, of shape (N, C + 1).
        hits: Whether it is a hit, of shape (N,).
        labels: Its class, of shape (N,).

    Returns:
        a and b, of shape (C + 1,) each; a is the same for all.
    """
    rows, classes = np.arange(len(logits)), logits.shape[1] - 1
    logits = logits.astype(float)
    columns = np.eye(classes + 1)[labels]

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        scale, common, own = np.exp(x[0]), x[1], x[2:]
        logs = log_softmax(scale * logits + np.append(common + own, 0.0), axis=1)
        log_p = logs[rows, labels]
        log_q = np.log(-np.expm1(np.minimum(log_p, -1e-12)))
        off = own / OFFSET_SPREAD
        # The derivative by log p, then by the columns.
        outer = np.where(hits, -1.0, np.exp(np.minimum(log_p - log_q, 30)))
        inner = outer[:, None] * (columns - np.exp(logs))
        biases = inner[:, :-1].sum(axis=0)
        slope = [(inner * logits).sum() * scale, biases.sum()]
        value = -np.where(hits, log_p, log_q).sum() + off @ off / 2
        return value, np.array([*slope, *(biases + off / OFFSET_SPREAD)])

    found = _minimise(loss, np.zeros(2 + classes))
    biases = np.append(found[1] + found[2:], 0.0)
    return np.full(classes + 1, np.exp(found[0])), biases
