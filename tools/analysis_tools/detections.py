"""The detections of a detector on a test set, the truth, and what they measure."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.evaluation.functional.mean_ap import (
    average_precision,
    get_cls_results,
    tpfp_default,
)
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from rambo_det.own_data import follow_own_data
from rambo_det.safe_pickle import load_predictions
from tools.common.wrong_calls import read_config, reading

HIT, MISS, IGNORED = 1, -1, 0
_COLUMNS = dict(bboxes='boxes', scores='scores', labels='labels')


@dataclass(frozen=True)
class Curve:
    """Precision and recall of one class, from the highest score down.

    Attributes:
        recall: Recall after each detection.
        precision: Precision after each detection.
        scores: The detections' scores.
        ap: Average precision.
        objects: Number of objects that are not difficult.
    """

    recall: np.ndarray
    precision: np.ndarray
    scores: np.ndarray
    ap: float
    objects: int

    @property
    def best(self) -> tuple[float, float, float]:
        """The score at which F1 is best, and precision and recall from it up.

        Between equal scores there is no threshold.
        """
        if not len(self.scores):
            return 0.0, 0.0, 0.0
        total = np.maximum(self.precision + self.recall, 1e-12)
        ends = np.append(self.scores[1:] < self.scores[:-1], True)
        at = np.argmax(np.where(ends, self.precision * self.recall / total, -1))
        return tuple(float(x[at]) for x in (self.scores, self.precision, self.recall))


@dataclass(frozen=True)
class Run:
    """The detections of one detector on a test set, and the truth.

    Attributes:
        name: What to call it in the pictures.
        classes: The class names.
        images: The path of each image, by image id.
        truth: For each image mmdet's annotation dict of arrays: ``bboxes``,
            ``labels``, ``bboxes_ignore``, ``labels_ignore``.
        detections: For each image and class an array (n, 5): box and score.
        iou: The IoU from which a detection matches an object.
        eval_mode: ``'area'`` or ``'11points'``.
    """

    name: str
    classes: tuple[str, ...]
    images: dict[object, str]
    truth: list[dict[str, np.ndarray]]
    detections: list[list[np.ndarray]]
    iou: float = 0.5
    eval_mode: str = 'area'

    @cached_property
    def curves(self) -> list[Curve]:
        """The curve of each class."""
        curves, tiny = [], np.finfo(np.float32).eps
        for label in range(len(self.classes)):
            scores = np.concatenate([image[label][:, 4] for image in self.detections])
            flags = np.concatenate([image[label] for image in self.flags])
            order = np.argsort(-scores)  # ties have the order of mmdet's eval_map
            hits, misses = (np.cumsum(flags[order] == kind) for kind in (HIT, MISS))
            objects = sum(int((t['labels'] == label).sum()) for t in self.truth)
            recall = hits / max(objects, tiny)
            precision = hits / np.maximum(hits + misses, tiny)
            ap = float(average_precision(recall, precision, self.eval_mode))
            curves.append(Curve(recall, precision, scores[order], ap, objects))
        return curves

    @property
    def mean_ap(self) -> float:
        """The mean over the classes that occur."""
        aps = [curve.ap for curve in self.curves if curve.objects]
        return float(np.mean(aps)) if aps else 0.0

    @property
    def metric(self) -> str:
        """The name of the number, like AP50."""
        return f'AP{round(100 * self.iou)}'

    @cached_property
    def flags(self) -> list[list[np.ndarray]]:
        """For each image and class what ``VOCMetric`` takes each detection for.

        HIT, MISS or IGNORED, for what lies on a difficult object.
        """

        by_class = [
            [
                (HIT * hit[0] + MISS * miss[0]).astype(int)
                for hit, miss in (
                    tpfp_default(*parts, self.iou, use_legacy_coordinate=True)
                    for parts in zip(
                        *get_cls_results(self.detections, self.truth, label)
                    )
                )
            ]
            for label in range(len(self.classes))
        ]
        return [list(image) for image in zip(*by_class)]


def scored(run: Run, threshold: float) -> Run:
    """Return a run without the detections of a lower score."""
    detections = [
        [rows[rows[:, 4] >= threshold] for rows in image] for image in run.detections
    ]
    return replace(run, detections=detections)


def scores_by_box(run: Run) -> dict[tuple, float]:
    """Return the score of each detection by the index of its image, class and box."""
    return {
        (image, label, *row[:4]): row[4]
        for image, parts in enumerate(run.detections)
        for label, rows in enumerate(parts)
        for row in rows.tolist()
    }


def best_f1(run: Run, half: float = 0.5) -> tuple[float, float, float]:
    """Return the best F1, the score from which on it is reached, and F1 from half on.

    Detections of all classes and images are pooled: of those that score at least t,
    precision is the share of hits among hits and misses, and recall the share of the
    objects that are hit. F1 is their harmonic mean. One threshold t holds for all
    classes, as where a detector is used. What lies on a difficult object counts
    neither way.
    """
    scores = np.concatenate([r[:, 4] for image in run.detections for r in image])
    flags = np.concatenate([found for image in run.flags for found in image])
    order = np.argsort(-scores, kind='stable')
    order = order[flags[order] != IGNORED]
    if not len(order):
        return 0.0, 0.0, 0.0
    scores, hits = scores[order], np.cumsum(flags[order] == HIT)
    objects = sum(len(truth['bboxes']) for truth in run.truth)
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + objects)
    # Between equal scores there is no threshold.
    ends = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))
    best = ends[np.argmax(f1[ends])]
    kept = int((scores >= half).sum())
    return float(f1[best]), float(scores[best]), float(f1[kept - 1]) if kept else 0.0


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
                box = dict(bbox=[x1, y1, x2 - x1, y2 - y1], iscrowd=ignored)
                box.update(image_id=image, category_id=label, id=len(truth) + 1)
                truth.append(dict(box, area=(x2 - x1) * (y2 - y1)))
        for label, rows in enumerate(run.detections[image - 1]):
            for x1, y1, x2, y2, score in rows.tolist():
                found.append([image, x1, y1, x2 - x1, y2 - y1, score, label])
    counted = {t['category_id'] for t in truth if not t['iscrowd']}
    if not found or not counted:
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


def _by_flag(instances: list[dict]) -> dict[str, np.ndarray]:
    """Sort a dataset's instances into counted and ignored ones."""
    truth = {}
    for suffix, flag in (('', 0), ('_ignore', 1)):
        chosen = [i for i in instances if i.get('ignore_flag', 0) == flag]
        boxes = np.array([i['bbox'] for i in chosen], dtype=np.float32)
        truth[f'bboxes{suffix}'] = boxes.reshape(-1, 4)
        truth[f'labels{suffix}'] = np.array([i['bbox_label'] for i in chosen], int)
    return truth


def _per_class(instances: dict, classes: int) -> list[np.ndarray]:
    """Sort an image's predictions by class."""
    labels = np.asarray(instances['labels'])
    boxes = np.asarray(instances['bboxes'], dtype=np.float32).reshape(-1, 4)
    scores = np.asarray(instances['scores'], dtype=np.float32)
    rows = np.hstack([boxes, scores[:, None]])
    return [rows[labels == label] for label in range(classes)]


def _predictions(path: str | Path) -> dict[str, dict]:
    """Read what was predicted for each image, by image id."""
    if Path(path).suffix != '.npz':
        found = load_predictions(path)
        return {str(sample['img_id']): sample['pred_instances'] for sample in found}
    with np.load(path) as stored:
        arrays = dict(stored)
    return {
        name: {k: arrays[v][arrays['images'] == place] for k, v in _COLUMNS.items()}
        for place, name in enumerate(arrays['image_ids'].tolist())
    }


def save_detections(run: Run, path: str | Path) -> None:
    """Write the detections as arrays, a row each, with their image and label."""
    parts = [
        (image, label)
        for image in range(len(run.images))
        for label in range(len(run.classes))
    ]
    rows = [run.detections[image][label] for image, label in parts]
    images, labels = np.repeat(parts, [len(part) for part in rows], axis=0).T
    boxes = np.concatenate(rows)
    np.savez_compressed(
        path,
        boxes=boxes[:, :4],
        scores=boxes[:, 4],
        labels=labels.astype(np.uint16),
        images=images.astype(np.uint32),
        image_ids=np.array([str(key) for key in run.images]),
    )


def load_run(
    config: str | Path, predictions: str | Path, name: str = '', iou: float = 0.5
) -> Run:
    """Read a run from a config and its predictions.

    Args:
        config: The config; its test dataset holds the truth.
        predictions: The predictions for that dataset: the file of ``tools/test.py
            --out``, or a ``detections.npz`` of tools/experiments/converged.py.
        name: What to call the run; by default the config's name.
        iou: The IoU from which a detection matches an object.

    Raises:
        ValueError: If the predictions are not those of the config's dataset.
    """
    cfg = follow_own_data(read_config(config))
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    with reading(Path(predictions), 'the file of tools/test.py --out'):
        found = _predictions(predictions)
    name = name or Path(config).stem
    return make_run(cfg, dataset, found, name, iou, (str(predictions), str(config)))


def make_run(
    cfg: Config,
    dataset: Any,
    predictions: dict[str, dict],
    name: str,
    iou: float = 0.5,
    files: tuple[str, str] = ('the detector', 'the config'),
) -> Run:
    """Make a run of a config, its test dataset and what was predicted for each image.

    Args:
        cfg: The config.
        dataset: The dataset, built of it.
        predictions: ``bboxes``, ``scores`` and ``labels`` by image id.
        name: What to call the run.
        iou: The IoU from which a detection matches an object.
        files: What to call the predictions and the config in an error.

    Raises:
        ValueError: If the predictions are not those of the dataset.
    """
    classes = tuple(dataset.metainfo['classes'])
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    names = [str(info['img_id']) for info in infos]

    missing = [name for name in names if name not in predictions]
    if missing or len(predictions) != len(infos):
        raise ValueError(
            f'{files[0]} holds predictions for {len(predictions)} images, the test '
            f'dataset of {files[1]} has {len(infos)}, of which {len(missing)} are not '
            'among them; dump them anew with tools/test.py CONFIG CHECKPOINT --out'
        )
    samples = [predictions[name] for name in names]
    highest = max(
        (int(s['labels'].max()) for s in samples if len(s['labels'])), default=0
    )
    if highest >= len(classes):
        raise ValueError(
            f'{files[0]} holds class {highest}, but {files[1]} has only the '
            f'{len(classes)} classes 0 to {len(classes) - 1}: {", ".join(classes)}'
        )
    evaluator = cfg.get('test_evaluator')
    voc = isinstance(evaluator, dict) and evaluator.get('type') == 'VOCMetric'
    return Run(
        name=name,
        classes=classes,
        images={info['img_id']: info['img_path'] for info in infos},
        truth=[_by_flag(info['instances']) for info in infos],
        detections=[_per_class(sample, len(classes)) for sample in samples],
        iou=iou,
        eval_mode=evaluator.get('eval_mode', '11points') if voc else 'area',
    )
