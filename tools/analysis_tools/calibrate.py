"""Make the scores of a trained detector probabilities.

    python tools/analysis_tools/calibrate.py CONFIG CHECKPOINT \\
        --ann-file VOC2007/ImageSets/Main/val.txt --out CALIBRATED.pth

Runs the detector on a validation list, fits for each class how likely a detection of a
score is a hit (IoU >= 0.5, as the metric counts), and folds that map into the last
layer of the classifier: weights times a, bias times a plus b. The checkpoint that it
writes needs no code. Within a class the order of the scores stays, but where columns
have a softmax: there it is a temperature and a bias of each class.

Prints for each class a, b, AP before and after, and the threshold of the best F1 on the
validation list, with its precision and recall; and how far scores are from precision
(D-ECE) and from IoU (LaECE₀). The last line has the best threshold for all classes
together, which is the one to show boxes from.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import numpy as np
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config

from tools.analysis_tools.calibration import (
    bin_means,
    counted,
    d_ece,
    fit_sigmoid,
    fit_softmax,
    laece0,
)
from tools.analysis_tools.classifier import (
    at_any_score,
    build,
    detect,
    detect_columns,
    find_classifier,
    load_checkpoint,
    load_config,
    without_limits,
)
from tools.analysis_tools.detections import (
    IGNORED,
    Run,
    best_f1,
    scored,
    scores_by_box,
)
from tools.common.atomic_file import atomic_file
from tools.common.markdown_table import markdown_table
from tools.common.wrong_calls import (
    Parser,
    readable_file,
    writable_file,
    writable_folder,
)

LEAST, FEW = 10, 20
# While detections are collected, logits are divided by it: in float32 the sigmoids of
# all logits above 17 are 1.
SOFTENED = 4.0


@dataclass(frozen=True)
class Calibration:
    """What a calibration has found.

    Attributes:
        before: The detections on the validation list, of any score.
        after: Those of the calibrated detector.
        scale: a of each column.
        shift: b of each column.
        state: The parameters that it changed, by name.
    """

    before: Run
    after: Run
    scale: np.ndarray
    shift: np.ndarray
    state: dict[str, torch.Tensor]

    def record(self) -> dict[str, Any]:
        """Return what the checkpoint tells of it."""
        thresholds = [curve.best[0] for curve in self.after.curves]
        return dict(
            images=len(self.after.images),
            scale=self.scale.tolist(),
            shift=self.shift.tolist(),
            threshold=best_f1(self.after)[1],
            class_thresholds=dict(zip(self.after.classes, thresholds)),
        )


def _logit(scores: np.ndarray) -> np.ndarray:
    scores = np.clip(scores.astype(float), 1e-38, 1 - 2**-25)
    return np.log(scores) - np.log1p(-scores)


def _check_same_map(before: Run, soft: Run, head: str) -> None:
    """Raise if dividing the logits has done anything else to the scores."""
    old, new = scores_by_box(before), scores_by_box(soft)
    scores = np.array([*old.values()])
    others = np.array([new.get(key, np.nan) for key in old])
    sure = (scores > 1e-4) & (scores < 1 - 1e-4)
    off = abs(_logit(scores[sure]) - SOFTENED * _logit(others[sure]))
    wrong = ~(off < 0.02)
    if sure.any() and wrong.mean() > 0.01:
        raise ValueError(
            f'{head}: the score of a detection is not the sigmoid of its logit '
            f'({100 * wrong.mean():.0f} % differ): a centreness, an objectness or the '
            'like is multiplied in, which weights of the classifier cannot calibrate'
        )


def _fit(
    run: Run, columns: list[list[np.ndarray]], softmax: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Fit the map of each column to all detections that count."""
    flags = np.concatenate([f for image in run.flags for f in image])
    logits = np.concatenate([part for image in columns for part in image])
    labels = np.concatenate(
        [np.full(len(f), c) for image in run.flags for c, f in enumerate(image)]
    )
    keep = flags != IGNORED
    hits, misses = int((flags > 0).sum()), int((flags < 0).sum())
    if min(hits, misses) < LEAST:
        raise ValueError(
            f'{hits} detections are hits and {misses} are not, on {len(run.images)} '
            f'images with {sum(c.objects for c in run.curves)} objects; to fit a map, '
            f'at least {LEAST} of each are needed: give a longer list, or a detector '
            'that finds something'
        )
    parts = logits[keep], flags[keep] > 0, labels[keep].astype(int)
    return fit_softmax(*parts) if softmax else fit_sigmoid(*parts, len(run.classes))


def calibrate(
    cfg: Config, state: dict[str, torch.Tensor], iou: float = 0.5
) -> Calibration:
    """Calibrate a detector on the test data of a config.

    Args:
        cfg: The config, with the validation list as its test data.
        state: The parameters of the detector.
        iou: The IoU from which a detection is a hit.

    Raises:
        ValueError: If it cannot be calibrated, which says why.
    """
    cfg = at_any_score(cfg)
    model = build(cfg, state)
    classifier = find_classifier(model)
    before = detect(cfg, model, 'before', iou)
    free_cfg = without_limits(cfg, classifier)
    free = build(free_cfg, state)
    last = find_classifier(free)
    if last.softmax:
        run, columns = detect_columns(free_cfg, free, last, 'collecting', iou)
    else:
        ones = np.ones(last.columns)
        last.fold(ones / SOFTENED, 0 * ones)
        run = detect(free_cfg, free, 'collecting', iou)
        _check_same_map(before, run, type(last.head).__name__)
        columns = [
            [SOFTENED * _logit(rows[:, 4]) for rows in image]
            for image in run.detections
        ]
    scale, shift = _fit(run, columns, last.softmax)
    classifier.fold(scale, shift)
    after = detect(cfg, model, 'after', iou)
    changed = {
        f'{name}.{part}': getattr(layer, part).detach().cpu().clone()
        for name, layer in classifier.layers.items()
        for part in ('weight', 'bias')
    }
    return Calibration(before, after, scale, shift, changed)


def table(found: Calibration) -> str:
    """Lay out each class, then all of them."""
    head = ['objects', 'a', 'b', 'AP50 before', 'after', 'threshold', 'precision']
    rows = [['', *head, 'recall', '']]
    for label, (name, old, new) in enumerate(
        zip(found.after.classes, found.before.curves, found.after.curves)
    ):
        note = '' if new.objects >= FEW else 'few objects: close to the common map'
        note = note if new.objects else 'no object: the common map'
        cells = [f'{found.scale[label]:.3f}', f'{found.shift[label]:+.2f}']
        cells += [f'{100 * curve.ap:.2f}' for curve in (old, new)]
        best = [f'{x:.3f}' for x in new.best]
        cells = [*cells, *best] if new.objects else [*cells[:2], *['-'] * 5]
        rows.append([name, new.objects, *cells, note])
    means = [f'{100 * run.mean_ap:.2f}' for run in (found.before, found.after)]
    rows.append(['mean', '', '', '', *means, '', '', '', ''])
    return markdown_table(rows)


def measures(run: Run, threshold: float | None = None) -> dict[str, float]:
    """Return in percent what the scores of a run are worth.

    Args:
        run: Detections of any score.
        threshold: From which score on detections are shown; that of the best F1 of
            these very detections by default.

    Returns:
        AP50, of those that score 0.05 or more too, which is mmdet's threshold; D-ECE
        and LaECE₀ of all detections and, behind ``shown``, of those that are shown;
        F1 of these, the best F1, the score at which it is (no percentage), F1 at 0.5.
    """
    best, at, half = best_f1(run)
    threshold = at if threshold is None else threshold
    shown = scored(run, threshold)
    found = dict(
        ap=run.mean_ap,
        ap_at_005=scored(run, 0.05).mean_ap,
        d_ece=d_ece(run),
        laece0=laece0(run),
        d_ece_shown=d_ece(shown),
        laece0_shown=laece0(shown),
        f1=best_f1(shown, 0.0)[2],
        best_f1=best,
        f1_at_half=half,
    )
    return dict({k: 100 * v for k, v in found.items()}, best_at=at)


def summary(found: Calibration) -> str:
    """Say in lines how good the scores are, and from which one to show boxes."""
    rows = [['On these images', 'before', 'after']]
    both = [measures(run) for run in (found.before, found.after)]
    for key, name in MEASURES.items():
        form = '.4f' if key == 'best_at' else '.2f'
        rows.append([name, *(f'{m[key]:{form}}' for m in both)])
    return f'{markdown_table(rows)}\n\nshow boxes from {both[1]["best_at"]:.3f} up'


MEASURES = dict(
    ap='AP50',
    ap_at_005='AP50 at score_thr 0.05',
    d_ece='D-ECE',
    laece0='LaECE₀',
    d_ece_shown='D-ECE of boxes shown',
    laece0_shown='LaECE₀ of boxes shown',
    best_f1='best F1',
    best_at='at score',
    f1_at_half='F1 at 0.5',
)


def plot_reliability(
    found: Calibration, path: str | Path, per_class: bool = False
) -> None:
    """Draw precision by score before and after, of all classes or of each.

    The area of a dot is the share of the detections in its bin, on a log scale.
    """
    labels = [None, *range(len(found.after.classes))] if per_class else [None]
    figure, axes = plt.subplots(
        len(labels),
        2,
        figsize=(6.4, 3.2 * len(labels)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout='constrained',
    )
    for row, label in zip(axes, labels):
        title = 'all classes' if label is None else found.after.classes[label]
        for axis, run, when in zip(row, (found.before, found.after), _WHEN):
            axis.plot([0, 1], [0, 1], color='grey', lw=0.8, ls='--')
            count, score, hits = bin_means(*counted(run, label)).T
            axis.plot(score, hits, lw=1)
            axis.scatter(score, hits, s=8 * np.log10(1 + count))
            axis.set_title(f'{title}, {when}', fontsize=9)
            axis.set(xlim=(0, 1), ylim=(0, 1))
    figure.supxlabel('mean score of a bin')
    figure.supylabel('share of hits')
    figure.savefig(path, dpi=110)
    plt.close(figure)


_WHEN = ('before', 'after')


def on_list(
    cfg: Config, ann_file: str, indices: int | None = None, test_list: bool = False
) -> Config:
    """Return a copy of a config that tests on another list.

    Args:
        cfg: The config.
        ann_file: The list, relative to the data root as in configs.
        indices: How many images of it, from its end if negative; all by default.
        test_list: Whether images that the config tests on are allowed.

    Raises:
        ValueError: If it cannot be read, or has images that the config tests on.
    """
    cfg = copy.deepcopy(cfg)
    data = cfg.test_dataloader.dataset
    if 'ann_file' not in data:
        raise ValueError(f'the test dataset has no ann_file to replace: {data.type}')

    def paths() -> set[str]:
        dataset = DATASETS.build(copy.deepcopy(data))
        found = (dataset.get_data_info(i)['img_path'] for i in range(len(dataset)))
        return {str(Path(path).resolve()) for path in found}

    tested = paths()
    data.ann_file, data.indices = ann_file, indices
    both = paths() & tested
    if both and not test_list:
        raise ValueError(
            f'--ann-file {ann_file}: the config tests on {len(both)} of its images, '
            'for example '
            f'{min(both)}; what is fitted on them says nothing about the test. Give a '
            'list of other images, or --allow-test-list if this is meant'
        )
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint', type=readable_file)
    parser.add_argument('--ann-file', required=True, help='relative to the data root')
    parser.add_argument('--indices', type=int, help='so many of it; from its end if <0')
    parser.add_argument(
        '--out', type=writable_file, required=True, help='the new checkpoint'
    )
    parser.add_argument('--iou', type=float, default=0.5)
    parser.add_argument('--allow-test-list', action='store_true')
    parser.add_argument(
        '--pictures', type=writable_folder, help='folder of a reliability diagram'
    )
    parser.add_argument('--per-class', action='store_true', help='a diagram of each')
    parser.add_cfg_options()
    args = parser.parse_args(argv)
    if args.out.resolve() == args.checkpoint.resolve():
        parser.error(f'--out {args.out} is CHECKPOINT; name another file')
    with parser.refusing():
        cfg = load_config(args.config, args.cfg_options)
        content = load_checkpoint(args.checkpoint, cfg)
        cfg = on_list(cfg, args.ann_file, args.indices, args.allow_test_list)
        found = calibrate(cfg, content['state_dict'], args.iou)
    state = {**content['state_dict'], **found.state}
    record = dict(found.record(), ann_file=args.ann_file)
    meta = dict(content.get('meta', {}), calibration=record)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(args.out) as draft:
        torch.save(dict(meta=meta, state_dict=state), draft)
    print(table(found))
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        path = args.pictures / 'reliability.png'
        plot_reliability(found, path, args.per_class)
        print(path)
    print(f'{args.out}: changed {", ".join(found.state)}')
    print(summary(found))


if __name__ == '__main__':
    main()
