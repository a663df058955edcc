"""The numbers in docs/algorithm.md are what its tool prints, and agree with the oracle.

The tool takes loss and gradient from the package; the oracle knows only definitions.
"""

from __future__ import annotations

import pytest

from tests import ROOT
from tests.helpers import oracle
from tools.dev import draw_algorithm as tool

SCORES, TARGETS = list(tool.SCORES), list(tool.TARGETS)
NEGATIVES = [i for i, target in enumerate(TARGETS) if not target]
POSITIVES = [i for i, target in enumerate(TARGETS) if target]


def test_page_shows_what_the_tool_prints(capsys, monkeypatch):
    monkeypatch.setattr(tool, 'draw', lambda path: None)
    tool.main([])
    printed = capsys.readouterr().out.strip().split('\n\n')
    page = (ROOT / 'docs' / 'algorithm.md').read_text(encoding='utf-8')
    paragraphs = page.split('\n\n')
    places = [paragraphs.index(block) for block in printed]
    assert places == sorted(places)
    assert len(places) == 10
    assert f'`n = {len(SCORES)}` and `P = {len(POSITIVES)}`' in page
    assert f'λ = {tool.LAMBD:g}' in page
    assert f'= 1/{len(SCORES) * tool.LAMBD:g} to both' in page
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


@pytest.mark.parametrize('lambd', tool.REACHES)
def test_single_moves_agree_with_the_oracle(lambd):
    _, gradient = oracle.ap_loss_singly(SCORES, TARGETS, lambd)
    assert tool.gradient_singly(lambd) == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize('lambd', tool.REACHES)
def test_sorting_agrees_with_the_oracle(lambd):
    _, gradient = oracle.ap_loss_singly(SCORES, TARGETS, lambd)
    assert tool.gradient_singly(lambd, 'sort') == pytest.approx(gradient, abs=1e-12)
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


@pytest.mark.parametrize('moved', [False, True])
def test_searches_agree_with_the_oracle(moved):
    scores = oracle.perturbed(SCORES, TARGETS, tool.LAMBD) if moved else SCORES
    places = tool.locate(scores)
    expected = {
        tool.NAMES[j]: sum(oracle.precedes(i, j, scores, TARGETS) for i in POSITIVES)
        for j in NEGATIVES
    }
    dropped = set(expected) - set(places.above)
    assert dropped == {'e'}
    assert expected['e'] == len(POSITIVES)
    assert places.above == {k: v for k, v in expected.items() if k not in dropped}
    ranks = oracle.ranks(scores, TARGETS)
    for k, name in enumerate(places.order):
        assert ranks[tool.NAMES.index(name)] == k + 1 + sum(places.gaps[: k + 1])


def test_second_search_finds_the_place_in_the_own_sequence():
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in tool.sequence_table().splitlines()[2:]
    ]
    own = [[SCORES[i] for i in POSITIVES], list(tool.SECOND.values())]
    assert [int(row[1]) for row in rows] == [0, 1]
    for row in rows:
        score = float(row[2])
        assert int(row[-1]) == sum(y > score for y in own[int(row[1])])


def test_picture(tmp_path):
    pytest.importorskip('matplotlib')
    path = tmp_path / 'new' / 'picture.png'
    tool.draw(path, dpi=30)
    assert path.read_bytes().startswith(b'\x89PNG')
