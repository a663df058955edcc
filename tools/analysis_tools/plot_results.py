"""Draw what a detector found, and its precision-recall curves.

    python tools/test.py CONFIG CHECKPOINT --out preds.pkl
    python tools/analysis_tools/plot_results.py CONFIG preds.pkl --out DIR
    python tools/analysis_tools/plot_results.py CONFIG preds.pkl --out DIR \\
        --compare CONFIG2 preds2.pkl

Writes ``detections.png``, the test images with their ground truth beside the
detections, and ``pr_curves.png``, and prints for each class AP and the score of the
best F1, with precision and recall from it up. Matching and AP are mmdet's own, as in
``VOCMetric``: difficult objects count neither way. Works for every dataset of boxes
that mmdet can load, VOC or COCO.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import mmcv
import numpy as np
from matplotlib import patheffects
from mmdet.evaluation.functional.bbox_overlaps import bbox_overlaps

from tools.analysis_tools.detections import HIT, MISS, Run, best_f1, load_run
from tools.common.markdown_table import markdown_table
from tools.common.wrong_calls import Parser, at_least, readable_file, writable_folder

_RUN_COLOURS = dict(blue='tab:blue', orange='tab:orange')
# Green, red, grey for what a difficult object swallows, and what was not found.
_KINDS = {HIT: (0.2, 0.75, 0.3), MISS: (0.9, 0.2, 0.15), 0: (0.6, 0.6, 0.6)}
_MISSED = (1.0, 0.65, 0.0)


def score_text(score: float) -> str:
    """Writes a score with two decimals, or more where it would read 1.00."""
    digits = next((n for n in range(2, 7) if round(score, n) < 1), 2)
    return f'{score:.{digits}f}'


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
            if len(curve.scores):
                at, precision, found = curve.best
                axis.plot(found, precision, 'o', color=colour, ms=4)
                axis.annotate(score_text(at), (found, precision), fontsize=7)
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
    axis: plt.Axes, box: np.ndarray, colour: tuple, text: str, dashed: bool = False
) -> None:
    """Draws a box with a dark rim, which shows on any background."""
    # A box ends with its last pixel, whose centre imshow puts at the integer.
    (x0, y0), (x1, y1) = box[:2] - 0.5, box[2:4] + 0.5
    rim = patheffects.withStroke(linewidth=3, foreground='black')
    line = dict(edgecolor=colour, linewidth=1.6, path_effects=[rim])
    line['linestyle'] = (0, (3, 2)) if dashed else '-'
    axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **line))
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    # Text that would leave the image goes into the box, or ends where the box does.
    above = y0 - top > 0.08 * (bottom - top)
    late = x0 - left > 0.6 * (right - left)
    axis.text(
        min(x1, right) if late else max(x0, left),
        y0 - 1 if above else max(y0, top) + 1,
        text,
        fontsize=6.5,
        color='black' if np.dot(colour, (0.3, 0.59, 0.11)) > 0.5 else 'white',
        ha='right' if late else 'left',
        va='bottom' if above else 'top',
        bbox=dict(facecolor=colour, edgecolor='none', pad=0.8),
        clip_on=True,
    )


def missed(run: Run, index: int, label: int, limit: float) -> np.ndarray:
    """Returns the objects (n, 4) of an image that no detection from a score up hits."""
    boxes = run.truth[index]['bboxes'][run.truth[index]['labels'] == label]
    rows, flags = run.detections[index][label], run.flags[index][label]
    hits = rows[(flags == HIT) & (rows[:, 4] >= limit), :4]
    if not len(hits) or not len(boxes):
        return boxes
    overlaps = bbox_overlaps(hits, boxes, use_legacy_coordinate=True)
    return np.delete(boxes, overlaps.argmax(axis=1), axis=0)


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
    first, panels = runs[0], 1 + len(runs)
    paths = list(first.images.values())
    count = min(count, len(paths))
    chosen = np.linspace(0, len(paths) - 1, count).round().astype(int)
    images = [mmcv.imread(paths[index], channel_order='rgb') for index in chosen]
    aspect = np.mean([image.shape[0] / image.shape[1] for image in images])
    blocks = 2 if count > 1 else 1
    rows, columns = -(-count // blocks), blocks * panels
    size = 2.7 * columns, (2.7 * aspect + 0.25) * rows + 0.4
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout='constrained'
    )
    for axis in axes.flat:
        axis.axis('off')
    names = ['detections'] if len(runs) == 1 else [run.name for run in runs]
    groups = axes.reshape(-1, panels)
    for group, index, image in zip(groups, chosen, images):
        for axis, title in zip(group, ['ground truth', *names]):
            axis.imshow(image, interpolation='nearest')
            axis.set_title(textwrap.fill(title, 32), fontsize=8)
        truth = first.truth[index]
        for label, name in enumerate(first.classes):
            colour = _class_colour(label, len(first.classes))
            for suffix, dashed in (('', False), ('_ignore', True)):
                own = truth[f'labels{suffix}'] == label
                for box in truth[f'bboxes{suffix}'][own]:
                    _draw_box(group[0], box, colour, name, dashed)
            for axis, run in zip(group[1:], runs):
                limit = run.curves[label].best[0] if score_thr is None else score_thr
                for box in missed(run, index, label, limit):
                    _draw_box(axis, box, _MISSED, f'missed {name}', dashed=True)
                found = zip(run.detections[index][label], run.flags[index][label])
                # The best detection is drawn last, on top.
                for row, flag in sorted(found, key=lambda pair: pair[0][4]):
                    if row[4] >= limit:
                        text = f'{name} {score_text(row[4])}'
                        _draw_box(axis, row, _KINDS[int(flag)], text)
    figure.suptitle(_heading(runs, score_thr, columns), fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _heading(runs: Sequence[Run], score_thr: float | None, columns: int) -> str:
    """Says from which score on detections are shown, and what the colours mean."""
    shown = f'{score_thr}'
    if score_thr is None:
        best = [c.best[0] for run in runs for c in run.curves if len(c.scores)]
        ends = ' to '.join(map(score_text, (min(best or [0]), max(best or [0]))))
        shown = f"each class's best-F1 score ({ends})"
    names = ' | '.join(run.name for run in runs)
    text = (
        f'{names}: detections from {shown} up; green: hit, red: false alarm, grey: on '
        'a difficult object, orange: missed'
    )
    return textwrap.fill(text, 38 * columns)


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
    """Lays out AP per class and run, and where F1 is best."""
    rows = [['', 'objects']]
    for run in runs:
        rows[0] += [run.name, 'best F1 at', 'precision', 'recall']
    for label, name in enumerate(runs[0].classes):
        rows.append([name, runs[0].curves[label].objects])
        for run in runs:
            at, *rest = run.curves[label].best
            cells = [f'{x:.3f}' for x in (run.curves[label].ap, *rest)]
            rows[-1] += [cells[0], score_text(at), *cells[1:]]
    rows.append(['mean', ''])
    for run in runs:
        rows[-1] += [f'{run.mean_ap:.3f}', score_text(best_f1(run)[1]), '', '']
    return markdown_table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('config', type=readable_file)
    parser.add_argument(
        'predictions', type=readable_file, help='file written by tools/test.py --out'
    )
    parser.add_argument(
        '--out', type=writable_folder, required=True, help='folder for the pictures'
    )
    parser.add_argument(
        '--compare',
        nargs=2,
        type=readable_file,
        metavar=('CONFIG', 'PREDICTIONS'),
        help='a second run on the same test data',
    )
    parser.add_argument(
        '--images', type=at_least(1), default=6, help='how many to draw'
    )
    parser.add_argument('--iou', type=float, default=0.5)
    parser.add_argument(
        '--score-thr', type=float, help="lowest score to draw (default: best F1's)"
    )
    args = parser.parse_args(argv)
    if not 0 < args.iou < 1:
        parser.error(f'--iou must lie between 0 and 1, got {args.iou}')
    with parser.refusing():
        runs = [load_run(args.config, args.predictions, iou=args.iou)]
        if args.compare:
            runs.append(load_run(*args.compare, iou=args.iou))
        paths = plot_all(runs, args.out, args.images, args.score_thr)
    print(f'AP at IoU {args.iou:g} (VOC, {runs[0].eval_mode}):')
    print(table(runs))
    print('Last line: one threshold for all classes. Choose it on a validation list.')
    for path in paths:
        print(path)


if __name__ == '__main__':
    main()
