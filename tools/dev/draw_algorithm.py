"""Compute the worked example of docs/algorithm.md and draw its picture.

    python tools/dev/draw_algorithm.py

Prints the page's tables as Markdown and writes docs/images/algorithm.png. Loss and
gradient are those of ``rambo_det.functional.ap_loss``; the steps in between are redone
here in plain Python, as the page tells them.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_left
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from rambo_det.functional import ap_loss
from tools.common.markdown_table import markdown_table

if TYPE_CHECKING:
    # The tables need no matplotlib; draw() imports it.
    from matplotlib.axes import Axes

PICTURE = Path(__file__).resolve().parents[2] / 'docs' / 'images' / 'algorithm.png'
# Positives have capital letters. B ties with c; e is below every positive.
NAMES = ('a', 'b', 'A', 'c', 'B', 'd', 'C', 'e')
SCORES = (3.25, 2.0, 1.5, 0.5, 0.5, 0.25, 0.0, -0.75)
TARGETS = tuple(int(name.isupper()) for name in NAMES)
LAMBD = 5.0
# A second sequence beside the first, for the step that serves many at once.
SECOND = {'D': 1.75, 'E': -0.25}
LAMBDS = (0.1, 5.0, 50.0)
# How far positives move where each moves on its own.
REACHES = (0.5, 1.0, inf)
REACH = 1.0  # in the steps of the sort solver
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
    """Where negatives stand among positives.

    Attributes:
        order: Names of the positives, the highest first.
        above: Number of positives above each negative that is kept, by name.
        gaps: Number of kept negatives in each of the P + 1 gaps, from the top.
    """

    order: list[str]
    above: dict[str, int]
    gaps: list[int]


def _ranks(scores: Sequence[float]) -> list[int]:
    """Rank by score, then negatives first, then index."""
    order = _order(scores)
    return [order.index(i) + 1 for i in range(len(scores))]


def compute(lambd: float = LAMBD) -> Example:
    """Compute the example for one λ."""
    scores = torch.tensor([SCORES], dtype=torch.float64, requires_grad=True)
    loss = ap_loss(scores, torch.tensor([TARGETS]), lambd=lambd)
    loss.sum().backward()
    size, count = len(SCORES), sum(TARGETS)
    ranks = _ranks(SCORES)
    highest_first = sorted(rank for rank, t in zip(ranks, TARGETS) if t)
    positive_ranks = [
        highest_first.index(rank) + 1 if t else 0 for rank, t in zip(ranks, TARGETS)
    ]
    pulls = [size * p / (count * r**2) for r, p in zip(ranks, positive_ranks)]
    moved = [score + lambd * pull for score, pull in zip(SCORES, pulls)]
    return Example(
        lambd=lambd,
        loss=float(loss.detach()),
        ranks=ranks,
        positive_ranks=positive_ranks,
        pulls=pulls,
        moved=moved,
        new_ranks=_ranks(moved),
        gradient=scores.grad[0].tolist(),
    )


def _order(scores: Sequence[float]) -> list[int]:
    """Entries by score, then negatives first, then index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], TARGETS[i], i))


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


def locate(scores: Sequence[float]) -> Places:
    """Search the negatives in the sorted positives, as the engine does."""
    floor = min(score for score, t in zip(SCORES, TARGETS) if t)
    positives = sorted(
        (-score, name) for score, name, t in zip(scores, NAMES, TARGETS) if t
    )
    keys = [key for key, _ in positives]
    above = {
        name: bisect_left(keys, -score)
        for score, name, t in zip(scores, NAMES, TARGETS)
        if not t and score >= floor
    }
    gaps = [list(above.values()).count(k) for k in range(len(positives) + 1)]
    return Places([name for _, name in positives], above, gaps)


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


def sort_table(lambd: float) -> str:
    """Every entry in its order: the running sums and the gradient."""
    gradient = gradient_singly(lambd, 'sort')
    rows = []
    for entry in sort_steps(lambd):
        name, target = NAMES[entry.index], TARGETS[entry.index]
        part, below = f'{entry.part:.4f}', f'{entry.below:.4f}'
        row = [entry.rank, f'**{name}**' if target else name, entry.among]
        row += [entry.now, part, ''] if target else ['', '', below]
        if lambd < inf:
            row.append('' if target else f'{entry.still_below:.4f}')
        rows.append([*row, _signed(gradient[entry.index])])
    head = ['rk', 'entry', 'positives so far', 'rk − k', 'part', 'parts below']
    head += ['after the move'] * (lambd < inf)
    return markdown_table([[*head, 'gradient'], *rows])


def search_table() -> str:
    """Every negative: the positives above it before and after."""
    example = compute()
    before, after = locate(SCORES).above, locate(example.moved).above
    rows = []
    for name, target, value in zip(NAMES, TARGETS, example.gradient):
        if target:
            continue
        if name in before:
            counts = (before[name], after[name], after[name] - before[name])
        else:
            counts = ('dropped', '', '')
        rows.append((name, *counts, _signed(value)))
    head = ('negative', 'positives above, before', 'after', 'passed by', 'gradient')
    return markdown_table([head, *rows])


def gap_table() -> str:
    """Every place among the positives: the negatives above it, and so the rank."""
    rows = []
    before, after = locate(SCORES), locate(compute().moved)
    for k in range(len(before.order)):
        row: list[object] = [k + 1]
        for places in (before, after):
            total = sum(places.gaps[: k + 1])
            row += [f'**{places.order[k]}**', places.gaps[k], total, k + 1 + total]
        rows.append(row)
    side = ('in the gap above', 'summed', 'rk')
    head = ('rk+', 'before', *side, 'after', *side)
    return markdown_table([head, *rows])


def combined_places() -> tuple[list[str], list[int]]:
    """Positives of both sequences, mixed; and sequence and place of each, combined."""
    first = {n: y for n, y, t in zip(NAMES, SCORES, TARGETS) if t}
    mixed = sorted({**first, **SECOND}.items(), key=lambda item: -item[1])
    stride = len(mixed) + 1
    places = [(name in SECOND) * stride + k for k, (name, _) in enumerate(mixed)]
    return [name for name, _ in mixed], sorted(places)


def sequence_text() -> str:
    """The order of the positives and the list for the second search."""
    mixed, places = combined_places()
    order = ', '.join(f'**{name}** {k}' for k, name in enumerate(mixed))
    return f'Places: {order}. Combined and sorted: {", ".join(map(str, places))}.'


def sequence_table() -> str:
    """Two negatives of equal score in two sequences: the two searches."""
    score = SCORES[NAMES.index('d')]
    first = [y for y, t in zip(SCORES, TARGETS) if t]
    keys = sorted(-y for y in (*first, *SECOND.values()))
    _, places = combined_places()
    rows = []
    for name, sequence in (('d', 0), ('f', 1)):
        place = bisect_left(keys, -score)
        combined = sequence * (len(keys) + 1) + place
        found = bisect_left(places, combined)
        start = len(first) * sequence
        rows.append(
            (
                name,
                sequence,
                f'{score:.2f}',
                place,
                combined,
                found,
                start,
                found - start,
            )
        )
    head = ['negative', 'sequence', 'score', 'first search', 'combined']
    head += ['second search', 'positives before', 'above']
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
    before = locate(SCORES).above
    count = sum(TARGETS)
    wrong = sum(count - above for above in before.values())
    positives = [i for i, t in enumerate(TARGETS) if t]
    rows = []
    for lambd in LAMBDS:
        example = compute(lambd)
        after = locate(example.moved).above
        turned = sum(after[name] - before[name] for name in before)
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


def single_table() -> str:
    """The gradient of each entry where positives move singly, for several λ."""
    names = [f'**{n}**' if t else n for n, t in zip(NAMES, TARGETS)]
    rows = [
        ('∞' if lambd == inf else f'{lambd:g}', *map(_signed, gradient_singly(lambd)))
        for lambd in REACHES
    ]
    return markdown_table([('λ', *names), *rows])


def blocks() -> list[str]:
    """All that the page takes from here, in its order."""
    return [
        average_precision_text(),
        entry_table(),
        sort_table(inf),
        sort_table(REACH),
        search_table(),
        gap_table(),
        sequence_text(),
        sequence_table(),
        lambda_table(),
        single_table(),
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
    kept = locate(SCORES).above
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
    kept = locate(SCORES).above
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
