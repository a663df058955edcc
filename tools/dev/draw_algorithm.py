"""Compute the worked example of docs/algorithm.md and draw its picture.

    python tools/dev/draw_algorithm.py

Prints the page's tables as Markdown and writes docs/images/algorithm.png. Losses and
gradients are those of ``rambo_det.functional``. The steps in between are redone here in
plain Python, as the page tells them.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import Any, Mapping, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from rambo_det.functional import Ranking, ap_loss, detection_ap_loss
from tools import ROOT
from tools.common.markdown_table import markdown_table
from tools.common.wrong_calls import Parser, writable_file

PICTURE = ROOT / 'docs' / 'images' / 'algorithm.png'
Scores = Mapping[str, float]
# Positives have capital letters. B ties with c; e is below every positive.
FIRST: Scores = dict(a=3.25, b=2.0, A=1.5, c=0.5, B=0.5, d=0.25, C=0.0, e=-0.75)
# A second image beside the first, for the solver that ranks many sequences at once.
SECOND: Scores = dict(D=1.75, g=0.9, f=0.25, E=-0.25)
IMAGES = (FIRST, SECOND)
BOTH: Scores = {**FIRST, **SECOND}
LAMBD, LAMBDS = 5.0, (0.1, 5.0, 50.0)
REACH = 1.0  # how far positives move where each moves on its own
BLUE, ORANGE, GREY, INK = '#1f65ab', '#d4603a', '#9a9a9a', '#2b2b2b'


def solve(lambd: float, perturb: str, solver: str) -> dict[str, float]:
    """Return the gradient of the sum of the losses of both images, by name."""
    scores = torch.tensor([*BOTH.values()], dtype=torch.float64).unsqueeze(1)
    scores.requires_grad_()
    labels = torch.tensor([int(name.islower()) for name in BOTH])
    images = torch.tensor([int(name in SECOND) for name in BOTH])
    ranking = Ranking(lambd, per_class=True, groups=images, num_groups=2)
    result = detection_ap_loss(
        scores, labels, [ranking], perturb=perturb, solver=solver
    )
    result[0][0].sum().backward()
    return dict(zip(BOTH, scores.grad[:, 0].tolist()))


def order(scores: Scores) -> list[str]:
    """Names by score, the highest first; of equal ones first negatives, then index."""
    return sorted(scores, key=lambda name: (-scores[name], name.isupper()))


def ranks(scores: Scores, positives: bool = False) -> dict[str, int]:
    """Rank of each entry, or of positives among each other; 1 is the highest."""
    names = [name for name in order(scores) if name.isupper() or not positives]
    return {name: place for place, name in enumerate(names, 1)}


def pulls(scores: Scores) -> dict[str, float]:
    """Return ``g = n rk+ / (P rk^2)``; 0 for negatives."""
    rank, among = ranks(scores), ranks(scores, positives=True)
    return {
        name: len(scores) * among.get(name, 0) / (len(among) * rank[name] ** 2)
        for name in scores
    }


def moved(scores: Scores, lambd: float) -> dict[str, float]:
    """Return the scores, those of positives moved up by λ g."""
    return {name: scores[name] + lambd * g for name, g in pulls(scores).items()}


def moved_both(lambd: float) -> dict[str, float]:
    return {**moved(FIRST, lambd), **moved(SECOND, lambd)}


def gaps(scores: Scores) -> dict[str, int]:
    """Count the positives at or below each negative, as the table solver does.

    The scores may have moved. Negatives that were below all positives of their image
    are dropped.
    """
    heights = sorted(scores[name] for name in scores if name.isupper())
    floors = [min(y for n, y in image.items() if n.isupper()) for image in IMAGES]
    return {
        name: bisect_right(heights, score)
        for name, score in scores.items()
        if name.islower() and score >= floors[name in SECOND]
    }


def _signed(value: float) -> str:
    return f'{value:+.4g}' if value else '0'


def _bold(name: str) -> str:
    return f'**{name}**' if name.isupper() else name


def average_precision_text() -> str:
    """AP spelled out, and the loss that the package returns."""
    rank, among = ranks(FIRST), ranks(FIRST, positives=True)
    scores = torch.tensor([[*FIRST.values()]], dtype=torch.float64)
    targets = torch.tensor([[name.isupper() for name in FIRST]])
    loss = float(ap_loss(scores, targets, lambd=LAMBD))
    terms = ' + '.join(f'{among[name]}/{rank[name]}' for name in among)
    return f'AP = ({terms}) / {len(among)} = {1 - loss:.4f}, loss = {loss:.4f}'


def entry_table() -> str:
    """Every entry: score, ranks, g, perturbed score, new rank, gradient."""
    rank, among, pull = ranks(FIRST), ranks(FIRST, positives=True), pulls(FIRST)
    new, gradient = moved(FIRST, LAMBD), solve(LAMBD, 'together', 'sort')
    rows: list[Sequence[Any]] = [
        ('entry', 'score y', 'rk', 'rk+', 'g', 'y + λ g', 'new rk', 'gradient')
    ]
    for name, score in FIRST.items():
        cells = ['', 0, f'{new[name]:.2f}']
        if name.isupper():
            cells = [among[name], f'{pull[name]:.4f}', f'{new[name]:.4f}']
        row = [_bold(name), f'{score:.2f}', rank[name], *cells, ranks(new)[name]]
        rows.append([*row, _signed(gradient[name])])
    return markdown_table(rows)


def sort_table() -> str:
    """Every entry in its order: what the sort solver searches and sums, for two λ."""
    before, rank, among = order(FIRST), ranks(FIRST), ranks(FIRST, positives=True)
    head = ['rk', 'entry', 'so far', 'λ = ∞: part', 'below', 'gradient']
    head += [f'λ = {REACH:g}: reached', 'rk − k', 'part', 'last', 'sum']
    so_far = [sum(map(str.isupper, before[: rank[name]])) for name in before]
    rows = [[rank[n], _bold(n), count] for n, count in zip(before, so_far)]
    for lambd in (inf, REACH):
        # How many entries are not below a positive that has moved, and its rank then.
        reached = {n: sum(y >= FIRST[n] + lambd for y in FIRST.values()) for n in among}
        now = {
            name: among[name] + sum(map(str.islower, before[:count]))
            for name, count in reached.items()
        }
        part = {name: among[name] / (now[name] * rank[name]) for name in among}
        sums = [0.0, *accumulate(part.values())]
        gradient = solve(lambd, 'singly', 'sort')
        for place, (row, name) in enumerate(zip(rows, before)):
            last = sum(count <= place for count in reached.values())
            cells = ['', '', '', last, f'{sums[last] - sums[so_far[place]]:.4f}']
            if name in part:
                cells = [reached[name], now[name], f'{part[name]:.4f}', '', '']
            cells = cells if lambd < inf else [cells[2], cells[4]]
            row += [*cells, _signed(gradient[name])]
    return markdown_table([[*head, 'gradient'], *rows])


def parts_below(image: Scores) -> list[float]:
    """Return the sum of ``1 / rk`` of the positives of an image below each gap."""
    rank, heights = ranks(image), order({n: BOTH[n] for n in BOTH if n.isupper()})[::-1]
    parts = [1 / rank[name] if name in image else 0.0 for name in heights]
    return [sum(parts[:gap]) for gap in range(len(parts) + 1)]


def count_table() -> str:
    """Every gap: the negatives in it, ranks from their sums, and sums of parts."""
    head = ['gap', 'begins at', 'image 0', 'image 1', 'summed: 0', '1']
    head += ['rk+', 'rk', 'pooled rk', 'parts: 0', '1']
    rows: list[list[Any]] = [head]
    place, parts = gaps(BOTH), [parts_below(image) for image in IMAGES]
    positives = order({n: BOTH[n] for n in BOTH if n.isupper()})
    above = [0, 0]
    for passed, positive in enumerate([*positives, '']):
        gap = len(positives) - passed
        inside = [[n for n in image if place.get(n) == gap] for image in IMAGES]
        above = [count + len(names) for count, names in zip(above, inside)]
        cells: list[Any] = ['', '', '']
        if positive:
            own = positive in SECOND
            among = sum(name in IMAGES[own] for name in positives[: passed + 1])
            cells = [among, among + above[own], passed + 1 + sum(above)]
        begin = [gap, _bold(positive) if positive else '', *map(', '.join, inside)]
        rows.append([*begin, *above, *cells, *(f'{p[gap]:.4f}' for p in parts)])
    return markdown_table(rows)


def negative_table() -> str:
    """Every negative: what its gaps read in the sums, and its gradients."""
    head = ['negative', 'image', 'gap', 'parts', 'gradient, λ = ∞']
    head += ['new gap', 'below', 'then', f'gradient, λ = {LAMBD:g}']
    rows: list[list[Any]] = [head]
    new = moved_both(LAMBD)
    states = [(gaps(scores), order(scores)[::-1]) for scores in (BOTH, new)]
    alone = solve(inf, 'singly', 'table')
    together = solve(LAMBD, 'together', 'table')
    for name in filter(str.islower, BOTH):
        image = int(name in SECOND)
        cells: list[Any] = ['dropped', '', _signed(alone[name]), '', '', '']
        if name in states[0][0]:
            (gap, then), counts = (found[name] for found, _ in states), []
            for at, (_, names) in zip((gap, then), states):
                below = list(filter(str.isupper, names))[:at]
                counts.append(sum(n in IMAGES[image] for n in below))
            part = f'{parts_below(IMAGES[image])[gap]:.4f}'
            cells = [gap, part, _signed(alone[name]), then, *counts]
        rows.append([name, image, *cells, _signed(together[name])])
    return markdown_table(rows)


def turned_pairs(lambd: float) -> list[tuple[str, str]]:
    """Pairs (positive, negative) that the perturbation turns round."""
    before, after = ranks(FIRST), ranks(moved(FIRST, lambd))
    return [
        (p, n)
        for p in filter(str.isupper, FIRST)
        for n in filter(str.islower, FIRST)
        if before[n] < before[p] and after[p] < after[n]
    ]


def lambda_table() -> str:
    """What λ does: pairs in the wrong order that the perturbation turns round."""
    rank, among = ranks(FIRST), ranks(FIRST, positives=True)
    wrong = sum(rank[name] - among[name] for name in among)
    head = ['λ', *(f'{_bold(name)} rises by' for name in among), 'pairs turned']
    rows = [[*head, *(f'gradient of {_bold(name)}' for name in among)]]
    for lambd in LAMBDS:
        gradient = solve(lambd, 'together', 'sort')
        rises = [f'{lambd * pulls(FIRST)[name]:.3g}' for name in among]
        turned = f'{len(turned_pairs(lambd))} of {wrong}'
        rows.append(
            [f'{lambd:g}', *rises, turned, *(_signed(gradient[n]) for n in among)]
        )
    return markdown_table(rows)


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


def _colour(name: str) -> str:
    return BLUE if name.isupper() else ORANGE if name in gaps(FIRST) else GREY


def _text(axes: Any, x: float, y: float, text: Any, colour: str = INK, **more: Any):
    settings = dict(ha='center', va='center_baseline', weight='bold')
    axes.text(x, y, text, color=colour, **{**settings, **more})


def _dot(axes: Any, x: float, y: float, name: str) -> None:
    box = dict(boxstyle='circle,pad=0.2', color=_colour(name))
    _text(axes, x, y, name, 'white', bbox=box, zorder=5)


def _draw_perturbation(axes: Any) -> None:
    """Draw scores before and after: level lines are negatives, arrows positives."""
    after, left, right = moved(FIRST, LAMBD), -0.17, 1.17
    axes.axhspan(-1.1, 0, color='#f1f1f1', zorder=0)
    arrow = dict(arrowstyle='-|>', mutation_scale=20, color=BLUE, lw=2, shrinkB=8)
    for name in FIRST:
        ends = [(left, FIRST[name]), (right, after[name])]
        if name.isupper():
            ends = [(0, FIRST[name]), (1, after[name])]
            axes.annotate('', ends[1], ends[0], arrowprops=arrow, zorder=3)
        else:
            style = '-' if name in gaps(FIRST) else '--'
            axes.plot(*zip(*ends), color=_colour(name), ls=style, lw=1.4, zorder=1)
        for (x, y), scores, side in zip(ends, (FIRST, after), (-1, 1)):
            _dot(axes, x, y, name)
            # Positives' ranks have a column of their own: B stands on c's line.
            column = (left, right)[side > 0] + side * (0.08 + 0.07 * name.isupper())
            _text(axes, column, y, ranks(scores)[name], _colour(name))
    for p, n in turned_pairs(LAMBD):
        x = (FIRST[n] - FIRST[p]) / (after[p] - FIRST[p])
        # Where the pair ties, the ring goes around the dot that stands there.
        size, fill = (80, 'white') if x else (550, 'none')
        ring = dict(s=size, facecolors=fill, edgecolors=INK, linewidths=1.6)
        axes.scatter(x, FIRST[n], **ring, zorder=6)
    plain = dict(weight='normal')
    _text(axes, 0.5, 3.36, 'a stays above all: gradient 0', ORANGE, **plain)
    said = 'below the lowest positive, before and after: dropped'
    _text(axes, 0.5, -0.93, said, '#707070', **plain)
    for x, text in (
        (0, 'before'),
        (1, 'after'),
        (left - 0.115, 'rk'),
        (right + 0.115, 'rk'),
    ):
        _text(axes, x, 3.78, text)
    axes.set(xlim=(-0.38, 1.38), ylim=(-1.1, 3.95), xticks=[], ylabel='score')
    axes.set_title('Only positives move, up by λ g', loc='left', weight='bold', pad=12)
    axes.spines[['top', 'right', 'bottom']].set_visible(False)


def _draw_gradient(axes: Any) -> None:
    """Draw the gradient of each entry, a block for each pair that is turned round."""
    gradient = solve(LAMBD, 'together', 'sort')
    unit = 1 / (len(FIRST) * LAMBD)
    for row, name in enumerate(FIRST):
        side = -1 if name.isupper() else 1
        pairs = [pair for pair in turned_pairs(LAMBD) if name in pair]
        for place, pair in enumerate(pairs):
            block = dict(height=0.62, color=_colour(name), edgecolor='white', lw=2)
            axes.barh(row, side * unit, left=side * unit * place, **block)
            other = pair[pair[0] == name]
            _text(
                axes, side * unit * (place + 0.5), row, other, 'white', weight='normal'
            )
        end, shown = gradient[name] + side * 0.003, _signed(gradient[name])
        align = 'right' if side < 0 else 'left'
        _text(axes, end, row, shown.replace('-', '−'), _colour(name), ha=align)
        _dot(axes, -0.098, row, name)
    axes.axvline(0, color=INK, lw=1)
    for x, text, colour, align in (
        (-0.006, 'descent raises', BLUE, 'right'),
        (0.006, 'lowers', ORANGE, 'left'),
    ):
        _text(axes, x, -0.75, text, colour, ha=align, weight='normal')
    axes.set(xlim=(-0.105, 0.085), ylim=(len(FIRST) - 0.4, -1.0), xticks=[], yticks=[])
    axes.set_xlabel('one block = one pair turned round = 1 / (n λ)')
    axes.set_title('The gradient', loc='left', weight='bold', pad=12)
    axes.spines[:].set_visible(False)


def draw(path: Path, dpi: int = 160) -> None:
    """Draw the perturbation and the gradient that comes of it."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    ratios = dict(width_ratios=(1.6, 1), wspace=0.06)
    size = dict(figsize=(11.5, 6.2), gridspec_kw=ratios, layout='constrained')
    with plt.rc_context({'font.size': 11.5, 'text.color': INK, 'axes.labelcolor': INK}):
        figure, (left, right) = plt.subplots(1, 2, **size)
        _draw_perturbation(left)
        _draw_gradient(right)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the page's numbers and draw its picture."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--out', type=writable_file, default=PICTURE, help='the picture (PNG)'
    )
    args = parser.parse_args(argv)
    print('\n\n'.join(blocks()))
    draw(args.out)


if __name__ == '__main__':
    main()
