"""Draw what a detector found, and its precision-recall curves.

    python tools/test.py CONFIG CHECKPOINT --out preds.pkl
    python tools/analysis_tools/plot_results.py CONFIG preds.pkl --out DIR
    python tools/analysis_tools/plot_results.py CONFIG preds.pkl --out DIR \\
        --compare CONFIG2 preds2.pkl

Writes ``detections.png``, the test images with their ground truth beside the
detections, and ``pr_curves.png``, and prints AP per class. Matching and AP
are mmdet's own, as in ``VOCMetric``: difficult objects count neither way.
Works for every dataset of boxes that mmdet can load, VOC or COCO.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import mmcv
import mmengine
import numpy as np
from matplotlib import patheffects
from mmdet.evaluation import eval_map
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from rambo_det.own_data import follow_own_data

_RUN_COLOURS = dict(blue='tab:blue', orange='tab:orange')


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
    def best_score(self) -> float:
        """The score at which precision and recall balance best (F1)."""
        if not len(self.scores):
            return 0.0
        total = np.maximum(self.precision + self.recall, 1e-12)
        return float(self.scores[np.argmax(self.precision * self.recall / total)])


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
        _, results = eval_map(
            self.detections,
            self.truth,
            iou_thr=self.iou,
            dataset=self.classes,
            logger='silent',
            nproc=2,
            use_legacy_coordinate=True,  # as VOCMetric does
            eval_mode=self.eval_mode,
        )
        curves = []
        for index, result in enumerate(results):
            scores = np.concatenate([image[index][:, 4] for image in self.detections])
            curves.append(
                Curve(
                    recall=result['recall'],
                    precision=result['precision'],
                    scores=-np.sort(-scores),
                    ap=float(result['ap']),
                    objects=int(result['num_gts']),
                )
            )
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


def _by_flag(instances: list[dict]) -> dict[str, np.ndarray]:
    """Sorts a dataset's instances into counted and ignored ones."""
    truth = {}
    for suffix, flag in (('', 0), ('_ignore', 1)):
        chosen = [i for i in instances if i.get('ignore_flag', 0) == flag]
        boxes = np.array([i['bbox'] for i in chosen], dtype=np.float32)
        truth[f'bboxes{suffix}'] = boxes.reshape(-1, 4)
        truth[f'labels{suffix}'] = np.array([i['bbox_label'] for i in chosen], int)
    return truth


def _per_class(instances: dict, classes: int) -> list[np.ndarray]:
    """Sorts an image's predictions by class."""
    labels = np.asarray(instances['labels'])
    boxes = np.asarray(instances['bboxes'], dtype=np.float32).reshape(-1, 4)
    scores = np.asarray(instances['scores'], dtype=np.float32)
    rows = np.hstack([boxes, scores[:, None]])
    return [rows[labels == label] for label in range(classes)]


def _predictions(path: str | Path) -> dict[str, dict]:
    """Reads what was predicted for each image, by image id."""
    if Path(path).suffix != '.npz':
        found = mmengine.load(str(path))
        return {str(sample['img_id']): sample['pred_instances'] for sample in found}
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    order = np.argsort(arrays['images'], kind='stable')
    names = arrays['image_ids'].tolist()
    bounds = np.searchsorted(arrays['images'][order], np.arange(len(names) + 1))
    return {
        name: {
            key: arrays[column][order[start:stop]]
            for key, column in dict(
                bboxes='boxes', scores='scores', labels='labels'
            ).items()
        }
        for name, start, stop in zip(names, bounds[:-1], bounds[1:])
    }


def load_run(
    config: str | Path, predictions: str | Path, name: str = '', iou: float = 0.5
) -> Run:
    """Reads a run from a config and its predictions.

    Args:
        config: The config; its test dataset holds the truth.
        predictions: The predictions for that dataset: the file of ``tools/test.py
            --out``, or a ``detections.npz`` of tools/experiments/compare.py.
        name: What to call the run; by default the config's name.
        iou: The IoU from which a detection matches an object.

    Raises:
        ValueError: If the predictions are not those of the config's dataset.
    """
    cfg = follow_own_data(Config.fromfile(config))
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    classes = tuple(dataset.metainfo['classes'])
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    dumped = _predictions(predictions)
    names = [str(info['img_id']) for info in infos]

    missing = [name for name in names if name not in dumped]
    if missing or len(dumped) != len(infos):
        raise ValueError(
            f'{predictions} holds predictions for {len(dumped)} images, the test '
            f'dataset of {config} has {len(infos)}, of which {len(missing)} are not '
            'among them; dump them anew with tools/test.py CONFIG CHECKPOINT --out'
        )
    samples = [dumped[name] for name in names]
    highest = max(
        (int(s['labels'].max()) for s in samples if len(s['labels'])), default=0
    )
    if highest >= len(classes):
        raise ValueError(
            f'{predictions} holds class {highest}, but {config} has only the '
            f'{len(classes)} classes 0 to {len(classes) - 1}: {", ".join(classes)}'
        )
    evaluator = cfg.get('test_evaluator')
    voc = isinstance(evaluator, dict) and evaluator.get('type') == 'VOCMetric'
    return Run(
        name=name or Path(config).stem,
        classes=classes,
        images={info['img_id']: info['img_path'] for info in infos},
        truth=[_by_flag(info['instances']) for info in infos],
        detections=[_per_class(sample, len(classes)) for sample in samples],
        iou=iou,
        eval_mode=evaluator.get('eval_mode', '11points') if voc else 'area',
    )


def _check_comparable(runs: Sequence[Run]) -> None:
    """Refuses runs that were not evaluated on the same data."""
    for run in runs[1:]:
        if run.classes != runs[0].classes or list(run.images) != list(runs[0].images):
            raise ValueError(
                f'{run.name} was tested on {len(run.images)} images of '
                f'{len(run.classes)} classes and {runs[0].name} on others '
                f'({len(runs[0].images)} images, {len(runs[0].classes)} classes); '
                'only runs on the same test data can be compared'
            )


def plot_pr_curves(runs: Sequence[Run], path: str | Path) -> None:
    """Draws a panel per class with the curve and the AP of each run.

    The solid line is the highest precision at that recall or a greater one,
    under which AP is the area; the faint line is the precision itself.
    """
    _check_comparable(runs)
    classes = runs[0].classes
    columns = min(5 if len(classes) > 12 else 3, len(classes))
    rows = -(-len(classes) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.9 * columns + 0.4, 2.7 * rows + 0.5 + 0.25 * len(runs)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout='constrained',
    )
    for axis in axes.flat[len(classes) :]:
        axis.axis('off')
    for label, (axis, name) in enumerate(zip(axes.flat, classes)):
        for run, colour in zip(runs, _RUN_COLOURS.values()):
            curve = run.curves[label]
            recall = np.concatenate([[0.0], curve.recall])
            best = np.maximum.accumulate(curve.precision[::-1])[::-1]
            envelope = np.concatenate([best[:1], best])
            axis.plot(curve.recall, curve.precision, color=colour, alpha=0.3, lw=1)
            axis.step(
                recall,
                envelope,
                where='pre',
                color=colour,
                lw=1.8,
                label=f'{run.metric} {curve.ap:.3f}' if curve.objects else 'no objects',
            )
        axis.set_title(f'{name} (n = {runs[0].curves[label].objects})', fontsize=10)
        axis.set(xlim=(0, 1.02), ylim=(0, 1.04))
        axis.grid(alpha=0.3)
        axis.legend(loc='lower left', fontsize=9)
    figure.supxlabel('recall', fontsize=10)
    figure.supylabel('precision', fontsize=10)
    names = [f'{run.name}: mean {run.metric} {run.mean_ap:.3f}' for run in runs]
    if len(runs) > 1:
        names = [f'{name} ({colour})' for name, colour in zip(names, _RUN_COLOURS)]
    figure.suptitle('\n'.join(names), fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _class_colour(label: int, classes: int) -> tuple[float, ...]:
    """Picks a class's colour."""
    return plt.get_cmap('tab10' if classes <= 10 else 'tab20')(label)[:3]


def _draw_box(
    axis: plt.Axes,
    box: np.ndarray,
    colour: tuple[float, ...],
    text: str,
    dashed: bool = False,
) -> None:
    """Draws a box with a dark rim, which shows on any background."""
    # A box ends with its last pixel, whose centre imshow puts at the integer.
    x0, y0, x1, y1 = box[0] - 0.5, box[1] - 0.5, box[2] + 0.5, box[3] + 0.5
    axis.add_patch(
        plt.Rectangle(
            (x0, y0),
            x1 - x0,
            y1 - y0,
            fill=False,
            edgecolor=colour,
            linewidth=1.6,
            linestyle=(0, (3, 2)) if dashed else '-',
            path_effects=[patheffects.withStroke(linewidth=3, foreground='black')],
        )
    )
    left, right = axis.get_xlim()
    top = axis.get_ylim()[1]
    # Text that would leave the image at the top goes to the box's lower edge.
    above = y0 - top > 0.07 * (right - left)
    axis.text(
        np.clip(x0, left, left + 0.75 * (right - left)),
        y0 - 1 if above else y1 + 1,
        text,
        fontsize=6.5,
        color='black' if np.dot(colour, (0.3, 0.59, 0.11)) > 0.5 else 'white',
        ha='left',
        va='bottom' if above else 'top',
        bbox=dict(facecolor=colour, edgecolor='none', pad=0.8),
        clip_on=True,
    )


def plot_detections(
    runs: Sequence[Run],
    path: str | Path,
    count: int = 6,
    score_thr: float | None = None,
) -> None:
    """Draws test images with the truth beside each run's detections.

    The images are taken at equal distances from the list, not chosen.

    Args:
        runs: One run or two on the same data.
        path: The PNG to write.
        count: How many images.
        score_thr: Lowest score to draw; by default each class's own score of
            the best F1, since the scores of a ranking have no fixed scale.
    """
    _check_comparable(runs)
    first = runs[0]
    count = min(count, len(first.truth))
    blocks = 2 if count > 1 else 1
    rows = -(-count // blocks)
    panels = 1 + len(runs)
    paths = list(first.images.values())
    chosen = np.linspace(0, len(paths) - 1, count).round().astype(int)
    images = [mmcv.imread(paths[index], channel_order='rgb') for index in chosen]
    aspect = np.mean([image.shape[0] / image.shape[1] for image in images])
    figure, axes = plt.subplots(
        rows,
        blocks * panels,
        figsize=(2.7 * blocks * panels, (2.7 * aspect + 0.25) * rows + 0.4),
        squeeze=False,
        layout='constrained',
    )
    for axis in axes.flat:
        axis.axis('off')
    for place, (index, image) in enumerate(zip(chosen, images)):
        row, block = divmod(place, blocks)
        group = axes[row, block * panels : (block + 1) * panels]
        titles = ['ground truth', *(run.name for run in runs)]
        if len(runs) == 1:
            titles[1] = 'detections'
        for axis, title in zip(group, titles):
            axis.imshow(image, interpolation='nearest')
            axis.set_title(title, fontsize=8)
        truth = first.truth[index]
        for suffix, dashed in (('', False), ('_ignore', True)):
            for box, label in zip(truth[f'bboxes{suffix}'], truth[f'labels{suffix}']):
                colour = _class_colour(label, len(first.classes))
                _draw_box(group[0], box, colour, first.classes[label], dashed)
        for axis, run in zip(group[1:], runs):
            for label, found in enumerate(run.detections[index]):
                limit = score_thr
                if limit is None:
                    limit = run.curves[label].best_score
                colour = _class_colour(label, len(run.classes))
                # The best detection is drawn last, on top.
                for row_of in sorted(found[found[:, 4] >= limit], key=lambda r: r[4]):
                    text = f'{run.classes[label]} {row_of[4]:.2f}'
                    _draw_box(axis, row_of, colour, text)
    shown = "each class's best-F1 score" if score_thr is None else score_thr
    heading = f'detections from {shown} up; dashed: difficult, not counted'
    if len(runs) == 1:
        heading = f'{first.name}: {heading}'
    figure.suptitle(heading, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_all(
    runs: Sequence[Run],
    out: str | Path,
    count: int = 6,
    score_thr: float | None = None,
) -> list[Path]:
    """Writes both pictures into a folder and returns their paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / 'detections.png', out / 'pr_curves.png']
    plot_detections(runs, paths[0], count, score_thr)
    plot_pr_curves(runs, paths[1])
    return paths


def table(runs: Sequence[Run]) -> str:
    """Lays out AP per class and run in columns."""
    width = max(len(name) for name in (*runs[0].classes, 'objects', 'mean'))
    lines = [f'{"":{width}}  objects  ' + '  '.join(run.name for run in runs)]
    for label, name in enumerate(runs[0].classes):
        aps = [f'{run.curves[label].ap:<{len(run.name)}.3f}' for run in runs]
        objects = runs[0].curves[label].objects
        lines.append(f'{name:{width}}  {objects:7d}  ' + '  '.join(aps))
    means = [f'{run.mean_ap:<{len(run.name)}.3f}' for run in runs]
    lines.append(f'{"mean":{width}}  {"":7}  ' + '  '.join(means))
    return '\n'.join(line.rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('predictions', help='file written by tools/test.py --out')
    parser.add_argument('--out', required=True, help='folder for the pictures')
    parser.add_argument(
        '--compare',
        nargs=2,
        metavar=('CONFIG', 'PREDICTIONS'),
        help='a second run on the same test data',
    )
    parser.add_argument('--images', type=int, default=6, help='how many to draw')
    parser.add_argument('--iou', type=float, default=0.5)
    parser.add_argument(
        '--score-thr', type=float, help="lowest score to draw (default: best F1's)"
    )
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f'--images must be at least 1, got {args.images}')
    if not 0 < args.iou < 1:
        parser.error(f'--iou must lie between 0 and 1, got {args.iou}')
    try:
        runs = [load_run(args.config, args.predictions, iou=args.iou)]
        if args.compare:
            runs.append(load_run(*args.compare, iou=args.iou))
        paths = plot_all(runs, args.out, args.images, args.score_thr)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f'plot_results: {error}')
    print(f'AP at IoU {args.iou:g} (VOC, {runs[0].eval_mode}):')
    print(table(runs))
    for path in paths:
        print(path)


if __name__ == '__main__':
    main()
