"""Draw the two pictures of README.md, and write what it says of the result.

    python tools/dev/draw_readme.py

The first picture shows what the defaults of ``RaMBOLoss`` compute for a batch of five
boxes, without the margin. The second shows AP50 over the epochs, of the runs on the
test split in docs/results/converged.json: those of most seeds that cross-entropy
(``ce``) and RaMBO have in common, and among these those of the larger detector. The
text goes between the marks in README.md. Its numbers are those of docs/results.md.
"""

from __future__ import annotations

import re
import sys
import textwrap
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Dict, List, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from rambo_det.functional import ap_loss
from tools import ROOT
from tools.common.markdown_table import update_page
from tools.common.wrong_calls import Parser, readable_file, writable_folder
from tools.experiments import converged

README = ROOT / 'README.md'
RESULTS = converged.OUT
PICTURES = ROOT / 'docs' / 'images'
MARKS = ('<!-- result -->', '<!-- end result -->')
BLUE, ORANGE, GREY, INK = '#1f65ab', '#d4603a', '#6b6b6b', '#2b2b2b'
# Of cross-entropy, of ours, and of the others.
COLOURS = (ORANGE, BLUE, '#3d8b6e', '#8a6fb0', '#b0893d', '#b04a7a', '#5a7f99', GREY)
NAMES = dict(ce='cross-entropy', rambo='RaMBOLoss')

# Logits of five boxes for two classes, and their labels; 2 is the background. The digit
# in the name of a box is its image.
CLASSES = ('cat', 'dog')
BOXES = ('1a', '1b', '1c', '2a', '2b')
LOGITS = ((2.1, 0.1), (0.4, 0.9), (1.2, 1.4), (0.7, -0.3), (1.6, 0.2))
LABELS = (0, 1, 2, 0, 2)


@dataclass(frozen=True)
class Ranked:
    """Entries that are ranked together, the highest score first.

    Attributes:
        names: The box and the class of each entry.
        positive: Whether it is a positive.
        gradient: Of ``1 - AP`` with respect to its score.
        loss: ``1 - AP``.
    """

    names: list[str]
    positive: list[bool]
    gradient: list[float]
    loss: float

    def precisions(self) -> list[str]:
        """Return the precision at each positive, as a fraction; '' at negatives."""
        return [
            f'{sum(self.positive[:rank])}/{rank}' if positive else ''
            for rank, positive in enumerate(self.positive, 1)
        ]


def rank(classes: Sequence[int]) -> Ranked:
    """Rank the scores of some classes, as the defaults do, without the margin."""
    entries = [(box, label) for box in range(len(BOXES)) for label in classes]
    scores = torch.tensor([[LOGITS[box][label] for box, label in entries]])
    targets = torch.tensor([[LABELS[box] == label for box, label in entries]])
    loss = ap_loss(scores.requires_grad_(), targets, lambd=inf, perturb='singly')
    loss.sum().backward()
    order = scores[0].argsort(descending=True).tolist()
    return Ranked(
        names=[f'{BOXES[entries[i][0]]} {CLASSES[entries[i][1]]}' for i in order],
        positive=[bool(targets[0, i]) for i in order],
        gradient=[float(scores.grad[0, i]) for i in order],
        loss=float(loss.detach()),
    )


def _draw_list(axes: Any, x: float, title: str, ranked: Ranked) -> None:
    """Draw a list from the top, with arrows that show where descent moves entries."""
    top = dict(ha='center', va='center', color=INK)
    axes.text(x + 0.6, 1.75, title, weight='bold', fontsize=13, **top)
    fractions = [text for text in ranked.precisions() if text]
    mean = fractions[0]
    if len(fractions) > 1:
        mean = f'({" + ".join(fractions)}) / {len(fractions)}'
    axes.text(x + 0.6, 1.05, f'AP = {mean} = {1 - ranked.loss:.3g}', **top)
    rows = zip(ranked.names, ranked.positive, ranked.gradient, ranked.precisions())
    for row, (name, positive, gradient, precision) in enumerate(rows):
        colour = BLUE if positive else ORANGE
        box = dict(boxstyle='round,pad=0.35', facecolor=colour, edgecolor='none')
        axes.text(x - 0.5, -row, row + 1, ha='right', va='center', color=GREY)
        axes.text(
            *(x, -row, name),
            **dict(color='white', weight='bold', ha='center', va='center', bbox=box),
        )
        if gradient:
            up = 1 if positive else -1
            ends = [(x + 0.62, -row - 0.4), (x + 0.82, -row + 0.4)][not positive]
            tip = (ends[0], ends[1] + 2.4 * up * abs(gradient))
            style = dict(arrowstyle='-|>', color=colour, lw=2.4, shrinkA=0, shrinkB=0)
            axes.annotate('', tip, ends, arrowprops=style)
        if precision:
            text = f'precision {precision}'
            axes.text(x + 1.0, -row, text, color=BLUE, va='center')


def draw_loss(path: Path, dpi: int = 150) -> None:
    """Draw what the defaults rank, and the gradient of each list."""
    figure, axes = _figure(10, 5.2)
    ranked = [rank([0]), rank([1]), rank([0, 1])]
    for x, title, found in zip(
        (1.0, 3.9, 7.0), ('class cat', 'class dog', 'pooled: all classes'), ranked
    ):
        _draw_list(axes, x, title, found)
    lines = (
        (BLUE, 'Blue: an object of this class. It is raised by its precision error,'),
        (BLUE, '1 − precision, divided by the number of blue entries.'),
        (ORANGE, 'Orange: none. All orange entries above a blue one are lowered,'),
        (ORANGE, 'each by an equal part of its error. The other scores stay.'),
        (INK, '1a, 1b and 1c are boxes of image 1, 2a and 2b those of image 2.'),
    )
    for line, (colour, text) in enumerate(lines):
        axes.text(0.2, -5.6 - 0.62 * line, text, color=colour, va='center')
    axes.text(
        *(0.2, -9.1, 'loss = ¼ · [ mean over classes of (1 − AP) + (1 − pooled AP) ]'),
        **dict(color=INK, va='center', weight='bold'),
    )
    axes.set(xlim=(0, 9), ylim=(-9.6, 2.2))
    axes.axis('off')
    _save(figure, path, dpi)


Runs = Dict[str, List[Dict[str, Any]]]


def read_runs(path: Path = RESULTS) -> tuple[Runs, str]:
    """Read the runs to show, of each loss with the same seeds, and which is ours.

    Returns:
        The rows of each loss, and the name of ours: 'rambo', else the default before
        it, 'rambo-before', else ''.
    """
    tested = (row for row in converged.read_rows(path) if row['split'] == 'test')
    groups = converged.by_detector(tested)
    choices = []
    for (_, detector), group in groups.items():
        for rating, ours in enumerate(('', 'rambo-before', 'rambo')):
            seeds = set(group.get('ce', {})) & set(group.get(ours or 'ce', {}))
            order = rating, len(seeds), not detector.endswith('-tiny')
            choices += [(order, group, ours, seeds)] if seeds else []
    if not choices:
        raise ValueError(f'{path} has no run of cross-entropy on the test split')
    _, group, ours, seeds = max(choices, key=lambda choice: choice[0])
    first = [loss for loss in ('ce', ours) if loss]
    others = sorted(k for k in group if k not in first and seeds <= set(group[k]))
    return {k: [group[k][s] for s in sorted(seeds)] for k in first + others}, ours


def result_text(runs: Runs, ours: str) -> str:
    """Return what the README says of the result, with its picture."""
    base = runs['ce'][0]
    epochs = max(converged.ap50_curve(base))
    size = 160 if base['detector'].endswith('-tiny') else 224
    setting = (
        f'Faster R-CNN with MobileNetV2-FPN, 2,000 training and {base["images"]} test '
        f'images of VOC 2007 at {size} pixels, {epochs} epochs, '
        f'{_seeds(runs)}'
    )
    if ours:
        our, ce = (
            {key: converged.mean_text(runs[k], key) for key in ('AP50', 'AP')}
            for k in (ours, 'ce')
        )
        difference = converged.difference_text(runs[ours], runs['ce'], 'AP50')
        bounds = [float(x) for x in re.findall(r'[+-][.\d]+', difference)[1:]]
        if not bounds or min(bounds) <= 0 <= max(bounds):
            verdict = 'Such a difference may be chance.'
        else:
            verdict = f'RaMBO is {"ahead" if min(bounds) > 0 else "behind"}.'
        interval = ' (95 % interval)' if bounds else ''
        text = (
            f'{setting}. Only the classification loss differs: both train on all '
            'proposals. Cross-entropy does better '
            '[on a sample](docs/results.md#trained-to-the-end), for which its weight '
            'and learning rate were chosen. AP50 is '
            f'{our["AP50"]} with `{NAMES.get(ours, ours)}` and {ce["AP50"]} with '
            f'cross-entropy. The difference is {difference}{interval}. '
            f'{verdict} COCO AP is {our["AP"]} and {ce["AP"]}.'
        )
    else:
        text = (
            '**No lead at the end of a training is shown yet.** In trainings of four '
            'epochs the default leads cross-entropy. In first runs of twelve epochs, '
            'where the curves are flat, with one seed each, the lead was gone at the '
            'end. Runs of all losses with several seeds are being made. The chart '
            f'shows what is finished: {", ".join(NAMES.get(k, k) for k in runs)}; '
            f'{setting}.'
        )
    picture = '![AP50 of the losses by epoch](docs/images/result.png)'
    wrapped = textwrap.fill(text, 88, break_long_words=False, break_on_hyphens=False)
    return f'{wrapped}\n\n{picture}'


def _seeds(runs: Runs) -> str:
    count = len(runs['ce'])
    return f'{count} seeds' if count > 1 else 'one seed'


def draw_result(runs: Runs, path: Path, dpi: int = 150) -> None:
    """Draw AP50 over the epochs, thin for each seed and thick for the mean."""
    figure, axes = _figure(10, 3.6)
    epochs = list(converged.ap50_curve(runs['ce'][0]))
    colours = iter(COLOURS)
    ends = {}
    for loss, rows in runs.items():
        curves = [converged.ap50_curve(row) for row in rows]
        mean = {e: np.mean([curve[e] for curve in curves]) for e in epochs}
        colour = next(colours)
        for curve in curves:
            axes.plot(curve.keys(), curve.values(), color=colour, lw=0.9, alpha=0.45)
        axes.plot(mean.keys(), mean.values(), color=colour, lw=2.6, marker='o')
        ends[loss] = mean[epochs[-1]], colour
    below, gap = -inf, 0.075 * np.ptp(axes.get_ylim())  # labels must not overlap
    for loss, (height, colour) in sorted(ends.items(), key=lambda item: item[1][0]):
        below = max(height, below + gap)
        label = f'{NAMES.get(loss, loss)}  {height:.1f}'
        place = (1.03 * epochs[-1], below)
        axes.text(*place, label, color=colour, va='center', weight='bold')
    title = f'AP50 on {runs["ce"][0]["images"]} test images, percent, {_seeds(runs)}'
    axes.set_title(title, loc='left', weight='bold', color=INK)
    axes.set(xlim=(None, 1.4 * epochs[-1]), xlabel='epoch', xticks=epochs)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', alpha=0.3)
    _save(figure, path, dpi)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure; it is white, also on a dark page."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    size = (width, height)
    return plt.subplots(figsize=size, layout='constrained', facecolor='white')


def _save(figure: Any, path: Path, dpi: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, metadata={'Software': None})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--out', type=writable_folder, default=PICTURES, help='of the pictures'
    )
    parser.add_argument(
        '--update', type=readable_file, default=README, metavar='PAGE.md'
    )
    args = parser.parse_args(argv)
    with parser.refusing():
        runs, ours = read_runs()
        update_page(args.update, *MARKS, result_text(runs, ours))
    draw_loss(args.out / 'loss.png')
    draw_result(runs, args.out / 'result.png')


if __name__ == '__main__':
    main()
