"""The numbers in docs/algorithm.md are what its tool prints, and agree with the oracle.

The tool takes loss and gradient from the package; the oracle knows only definitions.
"""

from __future__ import annotations

from math import inf

import pytest

from tests import ROOT
from tests.helpers import oracle
from tools.dev import draw_algorithm as tool

FIRST, BOTH = tool.FIRST, tool.BOTH
COUNT = sum(map(str.isupper, FIRST))


def by_name(function, *args, images=tool.IMAGES):
    """What a function of the oracle returns for each image, by name."""
    found = {}
    for image in images:
        targets = [int(name.isupper()) for name in image]
        found.update(zip(image, function(list(image.values()), targets, *args)))
    return found


def together(lambd):
    return by_name(lambda *args: oracle.ap_loss(*args, lambd)[1])


def singly(lambd):
    return by_name(lambda *args: oracle.ap_loss_singly(*args, lambd)[1])


def rows(table, *columns):
    """The cells of a table in some columns, without what makes names bold."""
    for line in table.replace('*', '').splitlines()[2:]:
        cells = [cell.strip() for cell in line[1:-1].split('|')]
        yield [cells[column] for column in columns]


def about(cell, digits=4):
    """What was rounded to a cell, to some places or digits; an empty one is 0."""
    value = float(cell or 0)
    return pytest.approx(value, rel=10.0 ** (1 - digits), abs=6 * 0.1 ** (digits + 1))


def test_page_shows_what_the_tool_prints(capsys, monkeypatch):
    monkeypatch.setattr(tool, 'draw', lambda path: None)
    tool.main([])
    printed = capsys.readouterr().out.strip().split('\n\n')
    page = (ROOT / 'docs' / 'algorithm.md').read_text(encoding='utf-8')
    paragraphs = page.split('\n\n')
    places = [paragraphs.index(block) for block in printed]
    assert places == sorted(places)
    assert len(places) == 6
    assert f'`n = {len(FIRST)}` and `P = {COUNT}`' in page
    assert f'λ = {tool.LAMBD:g}' in page
    assert f'= 1/{len(FIRST) * tool.LAMBD:g} to both' in page
    for name, score in tool.SECOND.items():
        shown = f'**{name}** ({score})' if name.isupper() else f'{name} ({score})'
        assert shown.replace('-', '−') in page.replace('\n', ' ')
    assert (ROOT / 'docs' / 'images' / 'algorithm.png').is_file()


@pytest.mark.parametrize(
    ('lambd', 'perturb', 'expected'),
    [
        *((lambd, 'together', together) for lambd in tool.LAMBDS),
        *((lambd, 'singly', singly) for lambd in (0.5, tool.REACH, inf)),
    ],
)
def test_gradients_agree_with_the_oracle(lambd, perturb, expected):
    for solver in ('sort', 'table'):
        found = tool.solve(lambd, perturb, solver)
        assert found == pytest.approx(expected(lambd), abs=1e-12)


def test_entries():
    rank, among = by_name(oracle.ranks), by_name(oracle.positive_ranks)
    moved = by_name(oracle.perturbed, tool.LAMBD)
    new = by_name(oracle.ranks, images=[{n: moved[n] for n in FIRST}])
    gradient = together(tool.LAMBD)
    for name, *cells in rows(tool.entry_table(), *range(8)):
        expected = FIRST[name], rank[name], among[name]
        expected += (moved[name] - FIRST[name]) / tool.LAMBD, moved[name], new[name]
        assert [*expected, gradient[name]] == [about(cell) for cell in cells]
    loss = oracle.ap_loss([*FIRST.values()], [n.isupper() for n in FIRST], 1.0)[0]
    assert f'= {1 - loss:.4f}, loss = {loss:.4f}' in tool.average_precision_text()


def test_sums_of_sorting_give_ranks_and_gradients():
    rank, among = by_name(oracle.ranks), by_name(oracle.positive_ranks)
    top, near = singly(inf), singly(tool.REACH)
    for number, name, so_far, part, below, first, now, near_part, *sums in rows(
        tool.sort_table(), *range(10)
    ):
        assert int(number) == rank[name]
        if name.isupper():
            assert int(so_far) == among[name]
            assert -float(part) * (rank[name] - among[name]) / COUNT == about(first)
            change = -float(near_part) * (rank[name] - int(now)) / COUNT
        else:
            assert float(below) / COUNT == about(first)
            change = (float(sums[0]) - float(sums[1])) / COUNT
        assert top[name] == about(first)
        assert near[name] == pytest.approx(change, abs=1e-4)


@pytest.mark.parametrize('moved', [False, True])
def test_gaps_agree_with_the_oracle(moved):
    scores = tool.moved_both(tool.LAMBD) if moved else BOTH
    names, values = list(scores), list(scores.values())
    targets = [int(name.isupper()) for name in names]
    expected = {
        name: sum(
            oracle.precedes(j, i, values, targets)
            for i in range(len(names))
            if targets[i]
        )
        for j, name in enumerate(names)
        if not targets[j]
    }
    assert expected.pop('e') == 0  # dropped
    assert tool.gaps(scores) == expected


@pytest.mark.parametrize(('score', 'gap'), [(-0.25, 1), (-0.26, None), (-0.1, 1)])
def test_negatives_below_the_positives_of_their_image_are_dropped(score, gap):
    assert tool.SECOND['E'] == -0.25
    assert tool.gaps({**BOTH, 'f': score}).get('f') == gap


def test_the_table_gives_all_ranks():
    rank, among = by_name(oracle.ranks), by_name(oracle.positive_ranks)
    pooled = by_name(oracle.ranks, images=[BOTH])
    *steps, last = rows(tool.count_table(), 0, 1, 2, 3, 6, 7, 8)
    assert sorted(step[1] for step in steps) == sorted(filter(str.isupper, BOTH))
    for _, name, *_, found, place, all_places in steps:
        expected = among[name], rank[name], pooled[name]
        assert (int(found), int(place), int(all_places)) == expected
    assert last == ['0', '', '', '', '', '', '']


def test_sums_at_the_gaps_are_the_gradients():
    alone, joint = singly(inf), together(tool.LAMBD)
    found = list(rows(tool.negative_table(), 0, 1, 2, 3, 4, 6, 7, 8))
    assert [row[0] for row in found] == list(filter(str.islower, BOTH))
    for name, number, gap, parts, single, below, then, both in found:
        image = tool.IMAGES[int(number)]
        assert name in image
        assert (alone[name], joint[name]) == (about(single), about(both))
        if gap == 'dropped':
            assert float(single) == float(both) == 0
            continue
        count = sum(map(str.isupper, image))
        assert float(parts) / count == pytest.approx(alone[name], abs=1e-4)
        passed = (int(below) - int(then)) / (len(image) * tool.LAMBD)
        assert passed == pytest.approx(joint[name], abs=1e-12)


def test_what_lambda_does():
    columns = list(rows(tool.lambda_table(), *range(8)))
    assert [float(row[0]) for row in columns] == list(tool.LAMBDS)
    for lambd, *cells in columns:
        turned = together(float(lambd))
        moved = by_name(oracle.perturbed, float(lambd))
        for name, rise, gradient in zip('ABC', cells, cells[4:]):
            assert moved[name] - FIRST[name] == about(rise, 3)
            assert turned[name] == about(gradient)
        # Each pair has 1 / (n λ) of the gradient.
        pairs = -sum(turned[name] for name in 'ABC') * len(FIRST) * float(lambd)
        assert cells[3] == f'{pairs:.0f} of 9'


def test_picture(tmp_path):
    pytest.importorskip('matplotlib')
    path = tmp_path / 'new' / 'picture.png'
    tool.draw(path, dpi=30)
    assert path.read_bytes().startswith(b'\x89PNG')
