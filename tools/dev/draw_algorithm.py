"""Compute the worked example of docs/algorithm.md and draw its picture.

    python tools/dev/draw_algorithm.py

Prints the page's tables as Markdown and writes docs/images/algorithm.png. Losses and
gradients are those of ``rambo_det.functional``. The steps in between are redone here in
plain Python, as the page tells them.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_right
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Mapping, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from rambo_det.functional import Ranking, ap_loss, detection_ap_loss
from tools import ROOT
from tools.common.markdown_table import markdown_table

if TYPE_CHECKING:
    # The tables need no matplotlib; draw() imports it.
    from matplotlib.axes import Axes

PICTURE = ROOT / 'docs' / 'images' / 'algorithm.png'
# Positives have capital letters. B ties with c; e is below every positive.
NAMES = ('a', 'b', 'A', 'c', 'B', 'd', 'C', 'e')
SCORES = (3.25, 2.0, 1.5, 0.5, 0.5, 0.25, 0.0, -0.75)
TARGETS = tuple(int(name.isupper()) for name in NAMES)
LAMBD = 5.0
# A second image beside the first, for the solver that ranks many sequences at once.
SECOND = {'D': 1.75, 'g': 0.9, 'f': 0.25, 'E': -0.25}
IMAGES = (dict(zip(NAMES, SCORES)), SECOND)
LAMBDS = (0.1, 5.0, 50.0)
REACH = 1.0  # how far positives move where each moves on its own
BLUE, ORANGE, GREY, INK = '#1f65ab', '#d4603a', '#9a9a9a', '#2b2b2b'


@dataclass(frozen=True)
class Example:
    """One sequence, perturbed. Lists have one value per entry unless said otherwise.

    Attributes:
        lambd: λ.
        loss: ``1 - AP``.
        ranks: Rank before the perturbation, 1 is the highest.
        positive_ranks: Rank among the positives; 0 for negatives.
        pulls: ``g = n rk+ / (P rk^2)``; 0 for negatives.
        moved: Scores after the perturbation.
        new_ranks: Rank after the perturbation.
        gradient: What autograd returns.
    """

    lambd: float
    loss: float
    ranks: list[int]
    positive_ranks: list[int]
    pulls: list[float]
    moved: list[float]
    new_ranks: list[int]
    gradient: list[float]


@dataclass(frozen=True)
class Sorted:
    """An entry in the order of the sort solver, where positives move on their own.

    Attributes:
        index: Which entry it is.
        rank: ``rk``.
        among: The number of positives down to here; ``rk+`` at a positive.
        now: ``rk - k`` of a positive that passes k negatives; 0 for negatives.
        part: What each of them is blamed with, ``rk+ / ((rk - k) rk)``; else 0.
        below: Sum of the parts below it.
        still_below: The same after the positives have moved.
    """

    index: int
    rank: int
    among: int
    now: int
    part: float
    below: float
    still_below: float


@dataclass(frozen=True)
class Places:
    """Where negatives stand among the positives of all images.

    Attributes:
        order: Names of the positives, the lowest first.
        gaps: Number of positives at or below each negative that is kept, by name.
    """

    order: list[str]
    gaps: dict[str, int]

    def sums(self, values: Mapping[str, float], image: int) -> list[float]:
        """Sum the values of the positives of an image below each gap, (P + 1,)."""
        own = [values[name] * (name in IMAGES[image]) for name in self.order]
        return [sum(own[:gap]) for gap in range(len(own) + 1)]


@dataclass(frozen=True)
class Step:
    """A gap of the table solver, with the positive where it begins.

    Lists have a value for each image.

    Attributes:
        gap: The number of positives at or below it.
        positive: The highest of these; '' for gap 0.
        negatives: Names of the negatives in it.
        above: Number of negatives in this gap and those above.
        among: ``rk+`` of the positive in its image; 0 for gap 0.
        rank: Its ``rk``.
        pooled: Its ``rk`` where the images are ranked together.
        parts: Sum of ``1 / rk`` over the positives of the image at or below the gap.
    """

    gap: int
    positive: str
    negatives: list[list[str]]
    above: list[int]
    among: int
    rank: int
    pooled: int
    parts: list[float]


def _order(scores: Sequence[float], targets: Sequence[int] = TARGETS) -> list[int]:
    """Entries by score, then negatives first, then index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], targets[i], i))


def _ranks(scores: Sequence[float], targets: Sequence[int]) -> list[int]:
    order = _order(scores, targets)
    return [order.index(i) + 1 for i in range(len(scores))]


def compute(lambd: float = LAMBD, image: int = 0) -> Example:
    """Compute the example for one λ, or the image beside it."""
    values = list(IMAGES[image].values())
    targets = [int(name.isupper()) for name in IMAGES[image]]
    scores = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    loss = ap_loss(scores, torch.tensor([targets]), lambd=lambd)
    loss.sum().backward()
    size, count = len(values), sum(targets)
    ranks = _ranks(values, targets)
    highest_first = sorted(rank for rank, t in zip(ranks, targets) if t)
    positive_ranks = [
        highest_first.index(rank) + 1 if t else 0 for rank, t in zip(ranks, targets)
    ]
    pulls = [size * p / (count * r**2) for r, p in zip(ranks, positive_ranks)]
    moved = [score + lambd * pull for score, pull in zip(values, pulls)]
    return Example(
        lambd=lambd,
        loss=float(loss.detach()),
        ranks=ranks,
        positive_ranks=positive_ranks,
        pulls=pulls,
        moved=moved,
        new_ranks=_ranks(moved, targets),
        gradient=scores.grad[0].tolist(),
    )


def sort_steps(lambd: float) -> list[Sorted]:
    """The entries in their order, with the running sums of the sort solver."""
    order = _order(SCORES)
    if lambd == inf:
        after = sorted(order, key=lambda i: not TARGETS[i])
    else:
        after = _order([s + lambd * t for s, t in zip(SCORES, TARGETS)])
    among, now, part = {}, {}, {}
    for rank, i in enumerate(order, 1):
        among[i] = sum(TARGETS[j] for j in order[:rank])
        above = sum(not TARGETS[j] for j in after[: after.index(i)])
        now[i] = among[i] + above if TARGETS[i] else 0
        part[i] = among[i] / (now[i] * rank) if TARGETS[i] else 0.0
    return [
        Sorted(
            index=i,
            rank=rank,
            among=among[i],
            now=now[i],
            part=part[i],
            below=sum(part[j] for j in order[rank:]),
            still_below=sum(part[j] for j in after[after.index(i) :]),
        )
        for rank, i in enumerate(order, 1)
    ]


def locate(scores: Mapping[str, float]) -> Places:
    """Count the positives at or below negatives, as the table solver does.

    The scores are those of one image or of both. They may have moved; which negatives
    are kept is decided before.
    """
    floors = [min(y for n, y in image.items() if n.isupper()) for image in IMAGES]
    names = sorted((n for n in scores if n.isupper()), key=lambda n: -scores[n])
    order = names[::-1]
    heights = [scores[name] for name in order]
    gaps = {
        name: bisect_right(heights, score)
        for name, score in scores.items()
        if name.islower() and score >= floors[name in SECOND]
    }
    return Places(order, gaps)


def both_images(lambd: float | None = None) -> dict[str, float]:
    """Scores of both images; with λ, their positives are moved up by λ g."""
    scores: dict[str, float] = {}
    for number, image in enumerate(IMAGES):
        values = image.values() if lambd is None else compute(lambd, number).moved
        scores.update(zip(image, values))
    return scores


def both_gradients(lambd: float, perturb: str) -> dict[str, float]:
    """The gradient of the sum of the losses of both images, from the table solver."""
    scores = torch.tensor(list(both_images().values()), dtype=torch.float64)
    scores = scores.unsqueeze(1).requires_grad_()
    labels = torch.tensor([int(name.islower()) for name in both_images()])
    images = torch.tensor([int(name in SECOND) for name in both_images()])
    ranking = Ranking(lambd, per_class=True, groups=images, num_groups=2)
    result = detection_ap_loss(
        scores, labels, [ranking], perturb=perturb, solver='table'
    )
    result[0][0].sum().backward()
    return dict(zip(both_images(), scores.grad[:, 0].tolist()))


def table_steps() -> list[Step]:
    """The table of gaps and images and what follows from it, the highest gap first."""
    places = locate(both_images())
    size = len(places.order) + 1
    inside = [
        [[n for n in image if places.gaps.get(n) == gap] for image in IMAGES]
        for gap in range(size)
    ]
    above = [[sum(map(len, row)) for row in zip(*inside[gap:])] for gap in range(size)]
    among, rank = [0], [0]
    for gap, positive in enumerate(places.order, 1):
        own = positive in SECOND
        among.append(sum(name in IMAGES[own] for name in places.order[gap - 1 :]))
        rank.append(among[gap] + above[gap][own])
    part = {name: 1 / rk for name, rk in zip(places.order, rank[1:])}
    parts = list(zip(*(places.sums(part, image) for image in range(len(IMAGES)))))
    return [
        Step(
            gap=gap,
            positive=places.order[gap - 1] if gap else '',
            negatives=inside[gap],
            above=above[gap],
            among=among[gap],
            rank=rank[gap],
            pooled=size - gap + sum(above[gap]) if gap else 0,
            parts=list(parts[gap]),
        )
        for gap in reversed(range(size))
    ]


def entry_table() -> str:
    """Every entry: score, ranks, g, perturbed score, new rank, gradient."""
    example = compute()
    rows = []
    for i, name in enumerate(NAMES):
        positive = TARGETS[i]
        rows.append(
            (
                f'**{name}**' if positive else name,
                f'{SCORES[i]:.2f}',
                example.ranks[i],
                example.positive_ranks[i] if positive else '',
                f'{example.pulls[i]:.4f}' if positive else 0,
                f'{example.moved[i]:.4f}' if positive else f'{example.moved[i]:.2f}',
                example.new_ranks[i],
                _signed(example.gradient[i]),
            )
        )
    head = ('entry', 'score y', 'rk', 'rk+', 'g', 'y + λ g', 'new rk', 'gradient')
    return markdown_table([head, *rows])


def sort_table() -> str:
    """Every entry in its order: running sums and gradients for two λ."""
    rows = []
    for top, near in zip(sort_steps(inf), sort_steps(REACH)):
        name, target = NAMES[top.index], TARGETS[top.index]
        row: list[object] = [top.rank, f'**{name}**' if target else name, top.among]
        for lambd, entry in ((inf, top), (REACH, near)):
            part, sums = f'{entry.part:.4f}', [f'{entry.below:.4f}']
            if lambd < inf:
                row.append(entry.now if target else '')
                sums.append(f'{entry.still_below:.4f}')
            row += [part, *([''] * len(sums))] if target else ['', *sums]
            row.append(_signed(gradient_singly(lambd, 'sort')[entry.index]))
        rows.append(row)
    head = ['rk', 'entry', 'so far', 'λ = ∞: part', 'below', 'gradient']
    head += [f'λ = {REACH:g}: rk − k', 'part', 'below', 'then', 'gradient']
    return markdown_table([head, *rows])


def count_table() -> str:
    """Every gap: the negatives in it, ranks from their sums, and sums of parts."""
    rows = []
    for step in table_steps():
        row: list[object] = [step.gap, f'**{step.positive}**' if step.gap else '']
        row += [', '.join(names) for names in step.negatives]
        row += step.above
        row += [step.among, step.rank, step.pooled] if step.gap else ['', '', '']
        rows.append([*row, *(f'{value:.4f}' for value in step.parts)])
    head = ['gap', 'begins at', 'image 0', 'image 1', 'summed: 0', '1']
    head += ['rk+', 'rk', 'pooled rk', 'parts: 0', '1']
    return markdown_table([head, *rows])


def negative_table() -> str:
    """Every negative: what its gaps read in the sums, and its gradients."""
    before, after = locate(both_images()), locate(both_images(LAMBD))
    parts = {step.gap: step.parts for step in table_steps()}
    alone = both_gradients(inf, 'singly')
    together = both_gradients(LAMBD, 'together')
    ones = dict.fromkeys(before.order, 1)
    rows = []
    for image, entries in enumerate(IMAGES):
        for name in filter(str.islower, entries):
            cells: list[object] = ['dropped', '', _signed(alone[name]), '', '', '']
            if name in before.gaps:
                gap, new = before.gaps[name], after.gaps[name]
                cells = [gap, f'{parts[gap][image]:.4f}', _signed(alone[name]), new]
                cells += [
                    p.sums(ones, image)[g] for p, g in ((before, gap), (after, new))
                ]
            rows.append([name, image, *cells, _signed(together[name])])
    head = ['negative', 'image', 'gap', 'parts', 'gradient, λ = ∞']
    head += ['new gap', 'below', 'then', f'gradient, λ = {LAMBD:g}']
    return markdown_table([head, *rows])


def average_precision_text() -> str:
    """AP spelled out, and the loss that the package returns."""
    example = compute()
    positives = [i for i, t in enumerate(TARGETS) if t]
    terms = [f'{example.positive_ranks[i]}/{example.ranks[i]}' for i in positives]
    return (
        f'AP = ({" + ".join(terms)}) / {len(terms)} = {1 - example.loss:.4f}, '
        f'loss = {example.loss:.4f}'
    )


def lambda_table() -> str:
    """What λ does: pairs in the wrong order that the perturbation turns round."""
    before = locate(IMAGES[0]).gaps
    wrong = sum(before.values())
    positives = [i for i, t in enumerate(TARGETS) if t]
    rows = []
    for lambd in LAMBDS:
        example = compute(lambd)
        after = locate(dict(zip(NAMES, example.moved))).gaps
        turned = sum(before[name] - after[name] for name in before)
        rises = [_plain(lambd * example.pulls[i]) for i in positives]
        gradient = [_signed(example.gradient[i]) for i in positives]
        rows.append((f'{lambd:g}', *rises, f'{turned} of {wrong}', *gradient))
    names = [f'**{NAMES[i]}**' for i in positives]
    head = ['λ', *(f'{name} rises by' for name in names), 'pairs turned']
    head += [f'gradient of {name}' for name in names]
    return markdown_table([head, *rows])


def gradient_singly(lambd: float, solver: str | None = None) -> list[float]:
    """The gradient where each positive is moved on its own, by λ."""
    scores = torch.tensor([SCORES], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([TARGETS])
    loss = ap_loss(scores, targets, lambd=lambd, perturb='singly', solver=solver)
    loss.sum().backward()
    return scores.grad[0].tolist()


def blocks() -> list[str]:
    """All that the page takes from here, in its order."""
    return [
        average_precision_text(),
        entry_table(),
        sort_table(),
        count_table(),
        negative_table(),
        lambda_table(),
    ]


def _plain(value: float) -> str:
    return f'{value:.3g}'


def _signed(value: float) -> str:
    return f'{value:+.4g}' if value else '0'


def _turned_pairs(moved: Sequence[float]) -> list[tuple[int, int]]:
    """Pairs (positive, negative) that the perturbation turns round."""
    entries = range(len(NAMES))
    return [
        (i, j)
        for i in entries
        for j in entries
        if TARGETS[i] and not TARGETS[j] and SCORES[i] <= SCORES[j] < moved[i]
    ]


def _dot(axes: Axes, x: float, y: float, name: str, colour: str) -> None:
    axes.scatter(x, y, s=210, color=colour, zorder=4)
    axes.text(
        x,
        y,
        name,
        color='white',
        ha='center',
        va='center_baseline',
        weight='bold',
        zorder=5,
    )


def _draw_perturbation(axes: Axes, example: Example) -> None:
    """Draw scores before and after: level lines are negatives, arrows positives."""
    kept = locate(IMAGES[0]).gaps
    left, right = -0.17, 1.17
    floor = min(score for score, t in zip(SCORES, TARGETS) if t)
    axes.axhspan(-1.1, floor, color='#f1f1f1', zorder=0)
    for i, name in enumerate(NAMES):
        y, z = SCORES[i], example.moved[i]
        if TARGETS[i]:
            colour, ends = BLUE, ((0.0, y), (1.0, z))
            arrow = dict(
                arrowstyle='-|>,head_width=0.3,head_length=0.6',
                color=BLUE,
                lw=2,
                shrinkA=0,
                shrinkB=8,
            )
            axes.annotate('', ends[1], ends[0], arrowprops=arrow, zorder=3)
        else:
            colour = ORANGE if name in kept else GREY
            style = '-' if name in kept else (0, (4, 3))
            axes.plot([left, right], [y, y], color=colour, ls=style, lw=1.4, zorder=1)
            ends = ((left, y), (right, z))
        for (x, height), rank, side in zip(
            ends, (example.ranks[i], example.new_ranks[i]), (-1, 1)
        ):
            _dot(axes, x, height, name, colour)
            # Positives' ranks have a column of their own: B stands on c's line.
            column = (left if side < 0 else right) + side * (0.08 + 0.07 * TARGETS[i])
            axes.text(
                column,
                height,
                rank,
                color=colour,
                ha='center',
                va='center_baseline',
                weight='bold',
            )

    for i, j in _turned_pairs(example.moved):
        x = (SCORES[j] - SCORES[i]) / (example.moved[i] - SCORES[i])
        # Where the pair ties, the ring goes around the dot that stands there.
        tie = x == 0
        axes.scatter(
            x,
            SCORES[j],
            s=480 if tie else 80,
            facecolors='none' if tie else 'white',
            edgecolors=INK,
            linewidths=1.6,
            zorder=6,
        )

    middle = dict(ha='center', va='center')
    axes.text(0.5, 3.36, 'a stays above all: gradient 0', color=ORANGE, **middle)
    axes.text(
        0.5,
        -0.93,
        'below the lowest positive, before and after: dropped',
        color='#707070',
        **middle,
    )
    for x, text in ((0, 'before'), (1, 'after')):
        axes.text(x, 3.78, text, weight='bold', **middle)
    for x in (left - 0.115, right + 0.115):
        axes.text(x, 3.78, 'rk', weight='bold', **middle)
    axes.set(xlim=(-0.38, 1.38), ylim=(-1.1, 3.95), xticks=[], ylabel='score')
    axes.set_title('Only positives move, up by λ g', loc='left', weight='bold', pad=12)
    axes.spines[['top', 'right', 'bottom']].set_visible(False)


def _draw_gradient(axes: Axes, example: Example) -> None:
    """Draw the gradient of each entry, a block for each pair that is turned round."""
    partners: dict[int, list[int]] = {i: [] for i in range(len(NAMES))}
    for i, j in _turned_pairs(example.moved):
        partners[i].append(j)
        partners[j].append(i)
    kept = locate(IMAGES[0]).gaps
    for i, name in enumerate(NAMES):
        colour = BLUE if TARGETS[i] else ORANGE if name in kept else GREY
        sign = -1 if TARGETS[i] else 1
        unit = abs(example.gradient[i]) / max(len(partners[i]), 1)
        for place, partner in enumerate(partners[i]):
            axes.barh(
                i,
                sign * unit,
                left=sign * unit * place,
                height=0.62,
                color=colour,
                edgecolor='white',
                linewidth=2,
            )
            axes.text(
                sign * unit * (place + 0.5),
                i,
                NAMES[partner],
                color='white',
                ha='center',
                va='center_baseline',
            )
        end = example.gradient[i] + sign * 0.003
        axes.text(
            end,
            i,
            _signed(example.gradient[i]).replace('-', '−'),
            color=colour,
            ha='right' if TARGETS[i] else 'left',
            va='center_baseline',
            weight='bold',
        )
        _dot(axes, -0.098, i, name, colour)
    axes.axvline(0, color=INK, lw=1)
    for side, text, colour in ((-1, 'descent raises', BLUE), (1, 'lowers', ORANGE)):
        axes.text(
            side * 0.006,
            -0.75,
            text,
            color=colour,
            ha='right' if side < 0 else 'left',
            va='center',
        )
    axes.set(
        xlim=(-0.105, 0.085),
        ylim=(len(NAMES) - 0.4, -1.0),
        xticks=[],
        yticks=[],
        xlabel='one block = one pair turned round = 1 / (n λ)',
    )
    axes.set_title('The gradient', loc='left', weight='bold', pad=12)
    axes.spines[:].set_visible(False)


def draw(path: Path, dpi: int = 160) -> None:
    """Draw the perturbation and the gradient that comes of it."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    example = compute()
    style = {'font.size': 11.5, 'text.color': INK, 'axes.labelcolor': INK}
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(
            1,
            2,
            figsize=(11.5, 6.2),
            gridspec_kw=dict(width_ratios=(1.6, 1), wspace=0.06),
            constrained_layout=True,
        )
        _draw_perturbation(left, example)
        _draw_gradient(right, example)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the page's numbers and draw its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=PICTURE, help='the picture (PNG)')
    args = parser.parse_args(argv)
    print('\n\n'.join(blocks()))
    draw(args.out)


if __name__ == '__main__':
    main()
