"""The numbers in docs/algorithm.md are what its tool prints, and agree with the oracle.

The tool takes loss and gradient from the package; the oracle knows only definitions.
"""

from __future__ import annotations

from math import inf

import pytest

from tests import ROOT
from tests.helpers import oracle
from tools.dev import draw_algorithm as tool

SCORES, TARGETS = list(tool.SCORES), list(tool.TARGETS)
POSITIVES = [i for i, target in enumerate(TARGETS) if target]


def test_page_shows_what_the_tool_prints(capsys, monkeypatch):
    monkeypatch.setattr(tool, 'draw', lambda path: None)
    tool.main([])
    printed = capsys.readouterr().out.strip().split('\n\n')
    page = (ROOT / 'docs' / 'algorithm.md').read_text(encoding='utf-8')
    paragraphs = page.split('\n\n')
    places = [paragraphs.index(block) for block in printed]
    assert places == sorted(places)
    assert len(places) == 6
    assert f'`n = {len(SCORES)}` and `P = {len(POSITIVES)}`' in page
    assert f'λ = {tool.LAMBD:g}' in page
    assert f'= 1/{len(SCORES) * tool.LAMBD:g} to both' in page
    for name, score in tool.SECOND.items():
        shown = f'**{name}** ({score})' if name.isupper() else f'{name} ({score})'
        assert shown.replace('-', '−') in page.replace('\n', ' ')
    assert (ROOT / 'docs' / 'images' / 'algorithm.png').is_file()


@pytest.mark.parametrize('lambd', tool.LAMBDS)
def test_example_agrees_with_the_oracle(lambd):
    example = tool.compute(lambd)
    loss, gradient = oracle.ap_loss(SCORES, TARGETS, lambd)
    assert example.loss == pytest.approx(loss, abs=1e-12)
    assert example.gradient == pytest.approx(gradient, abs=1e-12)
    assert example.ranks == oracle.ranks(SCORES, TARGETS)
    assert example.positive_ranks == oracle.positive_ranks(SCORES, TARGETS)
    moved = oracle.perturbed(SCORES, TARGETS, lambd)
    assert example.moved == pytest.approx(moved, abs=1e-12)
    assert example.new_ranks == oracle.ranks(moved, TARGETS)


@pytest.mark.parametrize('lambd', [0.5, tool.REACH, inf])
def test_sorting_agrees_with_the_oracle(lambd):
    _, gradient = oracle.ap_loss_singly(SCORES, TARGETS, lambd)
    for solver in ('sort', 'table'):
        found = tool.gradient_singly(lambd, solver)
        assert found == pytest.approx(gradient, abs=1e-12)
    steps = tool.sort_steps(lambd)
    ranks, among = (
        function(SCORES, TARGETS) for function in (oracle.ranks, oracle.positive_ranks)
    )
    assert [step.rank for step in steps] == [ranks[step.index] for step in steps]
    for step in steps:
        if TARGETS[step.index]:
            assert step.among == among[step.index]
            value = -step.part * (step.rank - step.now)
        else:
            value = step.below - step.still_below
        expected = gradient[step.index] * len(POSITIVES)
        assert value == pytest.approx(expected, abs=1e-12)


# The table solver

BOTH = tool.both_images()
BOTH_TARGETS = [int(name.isupper()) for name in BOTH]


def by_name(function, *args):
    """What a function of the oracle returns for each image, by name."""
    found = {}
    for image in tool.IMAGES:
        targets = [int(name.isupper()) for name in image]
        found.update(zip(image, function(list(image.values()), targets, *args)))
    return found


@pytest.mark.parametrize('moved', [False, True])
def test_gaps_agree_with_the_oracle(moved):
    scores = by_name(oracle.perturbed, tool.LAMBD) if moved else BOTH
    places = tool.locate(scores)
    names, values = list(scores), list(scores.values())
    expected = {
        name: sum(
            oracle.precedes(j, i, values, BOTH_TARGETS)
            for i in range(len(names))
            if BOTH_TARGETS[i]
        )
        for j, name in enumerate(names)
        if not BOTH_TARGETS[j]
    }
    assert expected.pop('e') == 0  # dropped
    assert places.gaps == expected
    ranks = oracle.positive_ranks(values, BOTH_TARGETS)
    highest_first = sorted((rank, name) for rank, name in zip(ranks, names) if rank)
    assert places.order[::-1] == [name for _, name in highest_first]


@pytest.mark.parametrize(('score', 'gap'), [(-0.25, 1), (-0.26, None), (-0.1, 1)])
def test_negatives_below_the_positives_of_their_image_are_dropped(score, gap):
    assert tool.SECOND['E'] == -0.25
    assert tool.locate({**BOTH, 'f': score}).gaps.get('f') == gap


def test_the_table_gives_all_ranks():
    ranks, among = by_name(oracle.ranks), by_name(oracle.positive_ranks)
    pooled = dict(zip(BOTH, oracle.ranks(list(BOTH.values()), BOTH_TARGETS)))
    *steps, last = tool.table_steps()
    assert {step.positive for step in steps} == set(filter(str.isupper, BOTH))
    for step in steps:
        name = step.positive
        found = step.among, step.rank, step.pooled
        assert found == (among[name], ranks[name], pooled[name])
    assert (last.gap, last.negatives) == (0, [[], []])


@pytest.mark.parametrize(
    ('lambd', 'perturb', 'function'),
    [
        (inf, 'singly', oracle.ap_loss_singly),
        (tool.REACH, 'singly', oracle.ap_loss_singly),
        (tool.LAMBD, 'together', oracle.ap_loss),
    ],
)
def test_gradients_of_both_images_agree_with_the_oracle(lambd, perturb, function):
    expected = by_name(lambda *args: function(*args, lambd)[1])
    assert tool.both_gradients(lambd, perturb) == pytest.approx(expected, abs=1e-12)


def test_sums_at_the_gaps_are_the_gradients():
    alone = by_name(lambda *args: oracle.ap_loss_singly(*args, inf)[1])
    together = by_name(lambda *args: oracle.ap_loss(*args, tool.LAMBD)[1])
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in tool.negative_table().splitlines()[2:]
    ]
    assert [row[0] for row in rows] == list(filter(str.islower, BOTH))
    for name, image, gap, parts, single, _, below, then, joint in rows:
        assert float(single) == pytest.approx(alone[name], rel=1e-3)
        assert float(joint) == pytest.approx(together[name], rel=1e-3)
        if gap == 'dropped':
            assert float(single) == float(joint) == 0
            continue
        size = len(tool.IMAGES[int(image)])
        count = sum(map(str.isupper, tool.IMAGES[int(image)]))
        assert float(parts) / count == pytest.approx(alone[name], abs=1e-4)
        passed = (int(below) - int(then)) / (size * tool.LAMBD)
        assert passed == pytest.approx(together[name], abs=1e-12)


def test_picture(tmp_path):
    pytest.importorskip('matplotlib')
    path = tmp_path / 'new' / 'picture.png'
    tool.draw(path, dpi=30)
    assert path.read_bytes().startswith(b'\x89PNG')
