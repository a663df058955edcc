"""AP of detections on resampled test images, for tools/experiments/compare.py.

Whether a detection is right depends on its own image alone. So detections are
matched once, and AP on a resample of the images is AP with a weight for each
image, the number of times it was drawn. That gives what ``VOCMetric`` would
give on a data set with as many copies of each image.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Sequence

import numpy as np

from tools.common.atomic_file import atomic_file

if TYPE_CHECKING:
    from tools.analysis_tools.plot_results import Run

HIT, MISS, IGNORED = 1, -1, 0
RECALLS = np.linspace(0, 1, 101)
# What a chunk of resamples of one class may hold at a time.
_CHUNK_VALUES = 4_000_000


@dataclass(frozen=True)
class Matches:
    """The detections of one run, matched to the truth at IoU 0.5.

    They are sorted by class, and within a class from the highest score down,
    ties as mmdet's ``eval_map`` has them.

    Attributes:
        labels: Class of each detection.
        images: Index of each detection's image.
        flags: HIT, MISS or IGNORED, for what lies on a difficult object.
        objects: Number of objects that count, by image and class.
        scores: Score of each detection; not stored.
    """

    labels: np.ndarray
    images: np.ndarray
    flags: np.ndarray
    objects: np.ndarray
    scores: np.ndarray | None = None

    def save(self, path: str | Path) -> None:
        """Write a compressed ``.npz``, at once or not at all.

        What comes after the last hit of a class changes neither AP nor the precision
        at any recall, so it is left out.
        """
        kept = np.zeros(len(self.flags), dtype=bool)
        for part in self.by_class():
            hits = np.flatnonzero(self.flags[part] == HIT)
            kept[part][: hits[-1] + 1 if len(hits) else 0] = True
        arrays = dict(
            labels=self.labels[kept], images=self.images[kept], flags=self.flags[kept]
        )
        # To an open file, since numpy would append .npz to a draft's name.
        with atomic_file(path) as draft, draft.open('wb') as file:
            np.savez_compressed(file, objects=self.objects, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Matches:
        """Read what ``save`` wrote."""
        with np.load(path) as stored:
            return cls(**{name: stored[name] for name in stored.files})

    def by_class(self) -> Iterator[slice]:
        """Yield each class' part of the detections."""
        bounds = np.searchsorted(self.labels, np.arange(self.objects.shape[1] + 1))
        for start, stop in zip(bounds[:-1], bounds[1:]):
            yield slice(start, stop)


def match(run: Run) -> Matches:
    """Match a run's detections as ``VOCMetric`` does."""
    from mmdet.evaluation.functional.mean_ap import tpfp_default

    classes = len(run.classes)
    parts = {'labels': [], 'images': [], 'flags': [], 'scores': []}
    objects = np.zeros((len(run.truth), classes), dtype=np.uint16)
    for image, truth in enumerate(run.truth):
        objects[image] = np.bincount(truth['labels'], minlength=classes)
    for label in range(classes):
        scores, images, flags = [], [], []
        for image, truth in enumerate(run.truth):
            found = run.detections[image][label]
            if not len(found):
                continue
            hit, miss = tpfp_default(
                found,
                truth['bboxes'][truth['labels'] == label],
                truth['bboxes_ignore'][truth['labels_ignore'] == label],
                run.iou,
                use_legacy_coordinate=True,
            )
            scores.append(found[:, 4])
            images.append(np.full(len(found), image))
            flags.append(HIT * hit[0] + MISS * miss[0])
        if scores:
            joined = np.concatenate(scores)
            # Not a stable sort: the order of ties has to be that of eval_map.
            order = np.argsort(-joined)
            parts['images'].append(np.concatenate(images)[order])
            parts['flags'].append(np.concatenate(flags)[order])
            parts['labels'].append(np.full(len(joined), label))
            parts['scores'].append(joined[order])
    types = dict(labels=np.uint16, images=np.uint32, flags=np.int8, scores=np.float32)
    arrays = {
        name: np.concatenate(parts[name] or [[]]).astype(kind)
        for name, kind in types.items()
    }
    return Matches(objects=objects, **arrays)


def class_ap(matches: Matches, weights: np.ndarray | None = None) -> np.ndarray:
    """Return AP50, the area under the whole curve, of each class.

    Args:
        matches: The matched detections.
        weights: How often each image counts, of shape (resamples, images); by
            default once.

    Returns:
        Of shape (resamples, classes); NaN where a class has no object.
    """
    images, classes = matches.objects.shape
    if weights is None:
        weights = np.ones((1, images))
    if weights.ndim != 2 or weights.shape[1] != images:
        raise ValueError(
            f'weights must have shape (resamples, {images}), a column for each test '
            f'image, got {weights.shape}'
        )
    weights = weights.astype(np.float64)
    result = np.full((len(weights), classes), np.nan)
    totals = weights @ matches.objects
    for label, part in enumerate(matches.by_class()):
        flags, places = matches.flags[part], matches.images[part]
        hits = np.flatnonzero(flags[flags != IGNORED] == HIT)
        # What comes after the last hit adds no recall.
        places = places[flags != IGNORED][: hits[-1] + 1 if len(hits) else 0]
        step = max(1, _CHUNK_VALUES // max(1, len(places)))
        for start in range(0, len(weights), step):
            rows = slice(start, start + step)
            drawn = weights[rows][:, places]
            # Misses only lower precision, so its maxima are where the hits are.
            seen = np.cumsum(drawn, axis=1)[:, hits]
            gained = drawn[:, hits]
            precision = np.cumsum(gained, axis=1) / np.maximum(seen, 1.0)
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            area = (gained * best).sum(axis=1)
            total = totals[rows, label]
            result[rows, label] = np.where(
                total > 0, area / np.maximum(total, 1), np.nan
            )
    return result


def mean_ap(per_class: np.ndarray) -> np.ndarray:
    """Return the mean over the classes that occur; 0 where none does."""
    occur = ~np.isnan(per_class)
    total = np.where(occur, per_class, 0.0).sum(axis=-1)
    return total / np.maximum(occur.sum(axis=-1), 1)


def best_f1(matches: Matches) -> tuple[float, float, float]:
    """Return the best F1, the score from which on it is reached, and F1 from 0.5 on.

    Detections of all classes and images are pooled: of those that score at least t,
    precision is the share of hits among hits and misses, and recall the share of the
    objects that are hit. F1 is their harmonic mean. One threshold t holds for all
    classes, as where a detector is used. What lies on a difficult object counts
    neither way.
    """
    counted = matches.flags != IGNORED
    order = np.argsort(-matches.scores[counted], kind='stable')
    scores = matches.scores[counted][order]
    hits = np.cumsum(matches.flags[counted][order] == HIT)
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + matches.objects.sum())
    # Between equal scores there is no threshold.
    ends = np.flatnonzero(np.append(scores[1:] < scores[:-1], True)[: len(scores)])
    if not len(ends):
        return 0.0, 0.0, 0.0
    best = ends[np.argmax(f1[ends])]
    kept = int((scores >= 0.5).sum())
    return float(f1[best]), float(scores[best]), float(f1[kept - 1]) if kept else 0.0


def mean_precision(matches: Matches) -> np.ndarray:
    """Return precision at the ``RECALLS``, mean over the classes that occur.

    Precision at a recall is the highest at that recall or a greater one; 0 where
    the detector does not get there.
    """
    curves = []
    for label, part in enumerate(matches.by_class()):
        objects = int(matches.objects[:, label].sum())
        if not objects:
            continue
        flags = matches.flags[part]
        counted = flags[flags != IGNORED] == HIT
        hits = np.cumsum(counted)
        precision = hits / np.arange(1, len(hits) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        # Whole objects are compared: recall 0.29 of 100 objects is 29 of them.
        needed = np.ceil(np.round(RECALLS * objects, 6))
        places = np.searchsorted(hits, np.maximum(needed, 1))
        curves.append(np.append(best, 0.0)[places])
    return np.mean(curves, axis=0) if curves else np.zeros(len(RECALLS))


def resampled_ap(
    runs: Sequence[Matches], resamples: int = 2000, seed: int = 0
) -> np.ndarray:
    """Return AP50 of each run on resamples of the test images.

    The images are drawn with replacement, the same ones for every run.

    Returns:
        Of shape (runs, resamples).

    Raises:
        ValueError: If the runs were not tested on the same images.
    """
    for run in runs[1:]:
        if not np.array_equal(run.objects, runs[0].objects):
            raise ValueError(
                'the runs were tested on different images: expected matches with '
                f'{len(runs[0].objects)} images and the same objects in them, got '
                f'{len(run.objects)}; evaluate all runs on the same test split'
            )
    rng = np.random.default_rng(seed)
    images = len(runs[0].objects)
    result = np.empty((len(runs), resamples))
    for start in range(0, resamples, 250):
        count = min(250, resamples - start)
        drawn = rng.multinomial(images, np.full(images, 1 / images), size=count)
        for row, run in zip(result, runs):
            row[start : start + count] = mean_ap(class_ap(run, drawn))
    return result


def paired_interval(
    differences: np.ndarray, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of a mean over resampled seeds and images.

    Args:
        differences: Difference of a run and the baseline's run of the same seed,
            of shape (seeds, resamples of the images).
        seed: Seed of the generator that draws the seeds.
        level: The share of resamples within the interval.
    """
    seeds, resamples = differences.shape
    drawn = np.random.default_rng(seed).integers(seeds, size=(seeds, resamples))
    means = np.take_along_axis(differences, drawn, axis=0).mean(axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def coco_ap(run: Run) -> float:
    """Return COCO's AP, the mean over the IoU thresholds 0.5, 0.55, … 0.95."""
    return float(mean_ap(coco_class_ap(run)).mean())


def coco_class_ap(run: Run) -> np.ndarray:
    """Return COCO's AP for each of the IoU thresholds 0.5, 0.55, … 0.95 and class.

    The evaluation is that of pycocotools, with 101 recall points and at most 100
    detections an image. A difficult object of VOC is an ignored one, as it is in
    ``VOCMetric``: finding it counts neither way, however often. COCO's own ignored
    regions, crowds, also forgive every detection inside them; here only IoU counts.
    A box is as wide as x2 - x1 says, without the pixel that ``VOCMetric`` adds.

    Returns:
        Of shape (10, classes); NaN where a class has no object.
    """
    from pycocotools import mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class Eval(COCOeval):
        def computeIoU(self, imgId, catId):  # noqa: N802, N803
            found, truth = self._dts[imgId, catId], self._gts[imgId, catId]
            if not (found and truth):
                return []
            order = np.argsort([-d['score'] for d in found], kind='mergesort')
            boxes = [found[i]['bbox'] for i in order[: self.params.maxDets[-1]]]
            return mask.iou(boxes, [t['bbox'] for t in truth], [0] * len(truth))

    truth, found = [], []
    for image, annotation in enumerate(run.truth, start=1):
        for suffix, ignored in (('', 0), ('_ignore', 1)):
            boxes, labels = annotation[f'bboxes{suffix}'], annotation[f'labels{suffix}']
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
                box = [x1, y1, x2 - x1, y2 - y1]
                truth.append(
                    dict(
                        id=len(truth) + 1,
                        image_id=image,
                        category_id=label,
                        bbox=box,
                        area=box[2] * box[3],
                        iscrowd=ignored,
                    )
                )
        for label, rows in enumerate(run.detections[image - 1]):
            for x1, y1, x2, y2, score in rows.tolist():
                found.append([image, x1, y1, x2 - x1, y2 - y1, score, label])
    if not found or all(t['iscrowd'] for t in truth):
        counted = {t['category_id'] for t in truth if not t['iscrowd']}
        row = [0.0 if i in counted else np.nan for i in range(len(run.classes))]
        return np.tile(row, (10, 1))
    coco = COCO()
    coco.dataset = dict(
        images=[dict(id=i + 1) for i in range(len(run.truth))],
        annotations=truth,
        categories=[dict(id=i, name=name) for i, name in enumerate(run.classes)],
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of every step
        coco.createIndex()
        evaluation = Eval(coco, coco.loadRes(np.array(found)), 'bbox')
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ['all']
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    # Of shape (IoUs, recalls, classes, areas, numbers of detections).
    precision = evaluation.eval['precision'][:, :, :, 0, 0].mean(axis=1)
    return np.where(precision > -1, precision, np.nan)
