"""What the solvers do to be fast changes no result."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rambo_det.functional import (
    Past,
    Ranking,
    ap_loss,
    apply_margin,
    average_precision,
    chunks,
    detection_ap_loss,
    margin,
    table_solver,
    with_margin,
)
from tests.helpers import oracle

INFINITY = math.inf
MOVES = [('singly', INFINITY), ('singly', 0.7), ('together', 2.0)]
GRID_MOVES = [
    ('together', (3.0, 20.0)),
    ('singly', (0.5, 0.1)),
    ('singly', (0.5, INFINITY)),
    ('singly', (INFINITY, INFINITY)),
]


def draw(rows, columns, positives, seed=0, ties=False, ignored=0.0):
    """Scores (N, C) and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, columns, generator=generator)
    if ties:
        scores = (2 * scores).round() / 2
        scores[torch.rand(rows, columns, generator=generator) < 0.05] = INFINITY
        scores[torch.rand(rows, columns, generator=generator) < 0.05] = -INFINITY
    labels = torch.full((rows,), columns)
    chosen = torch.randperm(rows, generator=generator)[:positives]
    labels[chosen] = torch.randint(columns, (len(chosen),), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -1
    return scores, labels


def solve(scores, labels, rankings, **kwargs):
    """Losses and the gradient of their weighted sum."""
    scores = scores.clone().requires_grad_()
    results = detection_ap_loss(scores, labels, rankings, **kwargs)
    losses = torch.cat([own for own, _ in results])
    (losses * torch.linspace(-1, 2, len(losses)).to(losses)).sum().backward()
    return losses.detach(), scores.grad


@settings(max_examples=300, deadline=None)
@given(
    chunk=st.integers(1, 40),
    rows=st.integers(1, 30),
    columns=st.integers(1, 4),
    seed=st.integers(0, 999),
    ties=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3]),
    move=st.sampled_from(MOVES),
    spans=st.sampled_from(['batch', 'images', 'part', 'class-wise', 'pooled']),
)
def test_chunks_and_the_other_solver_change_nothing(
    chunk, rows, columns, seed, ties, ignored, move, spans
):
    perturb, lambd = move
    scores, labels = draw(rows, columns, rows // 2, seed, ties, ignored)
    images = torch.arange(rows) % 3
    class_wise, pooled = Ranking(lambd, True), Ranking(lambd, False)
    rankings = {
        'batch': [class_wise, pooled],
        'images': [Ranking(lambd, True, images, 3), pooled],
        'part': [
            class_wise,
            Ranking(lambd, False, images[rows // 2 :], 3, rows - rows // 2, rows // 2),
        ],
        'class-wise': [class_wise],
        'pooled': [Ranking(lambd, False, images, 3)],
    }[spans]
    expected = solve(scores, labels, rankings, perturb=perturb, solver='sort')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, 'CHUNK', chunk)
        found = solve(scores, labels, rankings, perturb=perturb, solver='table')
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('columns', [1, 20, 1203])
@pytest.mark.parametrize('positives', [1, 300])
@pytest.mark.parametrize(('perturb', 'lambd'), MOVES)
def test_several_chunks(columns, positives, perturb, lambd):
    rows = 3 * margin.CHUNK // columns
    scores, labels = draw(rows, columns, positives)
    rankings = [Ranking(lambd, True), Ranking(lambd, False)]
    kwargs = dict(perturb=perturb, margin=0.3)
    found = solve(scores, labels, rankings, solver='table', **kwargs)
    expected = solve(scores, labels, rankings, solver='sort', **kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(('perturb', 'lambds'), GRID_MOVES)
@pytest.mark.parametrize('digits', [1, 6])
def test_both_solvers_agree_on_many_entries(digits, perturb, lambds, dtype):
    """On a grid, moved scores tie often, and with float32 in the same places."""
    rows, columns = 20_000, 10
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(rows, columns, generator=generator).to(dtype)
    scores = scores.round(decimals=digits)
    scores[:50], scores[50:100] = INFINITY, -INFINITY
    labels = torch.randint(-1, 3 * columns, (rows,), generator=generator)
    labels.clamp_(max=columns - 1 if digits == 1 else columns)
    images = torch.randint(0, 3, (rows,), generator=generator)
    rankings = [
        Ranking(lambds[0], True),
        Ranking(lambds[1], False, images[5000:], 4, rows - 5000, 5000),
    ]
    table, sort = (
        solve(scores, labels, rankings, perturb=perturb, solver=solver)
        for solver in ('table', 'sort')
    )
    # What the table solver adds up in float32 differs in the last digits.
    near = dict(rtol=1e-9, atol=1e-12), dict(rtol=2e-5, atol=1e-8)
    torch.testing.assert_close(sort, table, **near[dtype == torch.float32])


def test_without_numpy(monkeypatch):
    scores, labels = draw(500, 4, 40, ties=True, ignored=0.1)
    rankings = [Ranking(INFINITY, True), Ranking(0.5, False)]
    expected = solve(scores, labels, rankings, perturb='singly')

    def refuse(self):
        raise RuntimeError('Numpy is not available')

    monkeypatch.setattr(torch.Tensor, 'numpy', refuse)
    found = solve(scores, labels, rankings, perturb='singly')
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize('solver', ['table', 'sort'])
@pytest.mark.parametrize(('perturb', 'lambd'), MOVES)
@pytest.mark.parametrize('rows', [0, 12])
def test_past_rows_are_rows_without_gradient(solver, perturb, lambd, rows):
    """Those of rankings of all rows; they have their own margin already."""
    steps = [
        draw(count, 3, 4, seed, ties=seed == 1, ignored=0.2 * (seed > 1))
        for seed, count in enumerate((rows, 9, 0, 14))
    ]
    (scores, labels), past = steps[0], steps[1:]
    rankings = [
        Ranking(lambd, True),
        Ranking(lambd, False, num_rows=rows),
        Ranking(lambd, False),
    ]
    kwargs = dict(perturb=perturb, solver=solver)
    shifted = with_margin(scores, labels, 0.4)
    everything = [torch.cat(parts) for parts in zip((shifted, labels), *past)]
    past = [Past(*step) for step in past]
    losses, grad = solve(*everything, rankings, **kwargs)
    kwargs.update(past=past, any_ignored=False)
    found = solve(scores, labels, rankings, margin=0.4, **kwargs)
    torch.testing.assert_close(found, (losses, grad[:rows]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('rows', 'columns'), [(5, 1), (1, 4), (1, 1)])
def test_past_scores_are_only_read(rows, columns):
    scores, labels = draw(rows, columns, 1)
    past = Past(scores.clone(), labels)
    now = draw(4, columns, 2, seed=1)
    first, second = (
        solve(*now, [Ranking(INFINITY, True)], perturb='singly', past=[past])
        for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(past.scores, scores)


# Scores and shapes at the ends


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(
        st.one_of(
            st.sampled_from([INFINITY, -INFINITY, 0.0, -0.0, 1e-45, 3e38, -3e38, 1e30]),
            st.floats(width=32, allow_nan=False),
        ),
        min_size=1,
        max_size=12,
    ),
    data=st.data(),
)
def test_scores_of_any_size(values, data):
    targets = data.draw(
        st.lists(st.booleans(), min_size=len(values), max_size=len(values))
    )
    problem = torch.tensor([values]), torch.tensor([targets])
    expected = oracle.average_precision(problem[0][0].tolist(), targets)
    for solver in ('table', 'sort'):
        found = average_precision(*problem, solver=solver).item()
        assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize('solver', ['table', 'sort'])
@pytest.mark.parametrize(('rows', 'columns'), [(0, 3), (3, 0), (0, 0)])
def test_matrices_without_entries(rows, columns, solver):
    labels, index = torch.full((rows,), columns), torch.zeros(rows).long()
    rankings = [Ranking(INFINITY, True), Ranking(INFINITY, False, index, 2)]
    scores, kwargs = torch.zeros(rows, columns), dict(perturb='singly', solver=solver)
    losses, grad = solve(scores, labels, rankings, **kwargs)
    assert losses.tolist() == [0.0] * (columns + 2)
    assert grad.shape == (rows, columns)
    assert ap_loss(scores, scores, lambd=1.0, **kwargs).tolist() == [0.0] * rows
    assert (
        average_precision(scores, scores, solver=solver).isnan().tolist()
        == [True] * rows
    )


# The random shifts


def test_few_entries_have_their_own_draws():
    scores, labels = draw(100, 5, 20)
    positive = labels.unsqueeze(1) == torch.arange(5)
    seeds = [torch.Generator().manual_seed(3) for _ in range(3)]
    shifted = apply_margin(scores, positive, 0.6, True, seeds[0])
    assert torch.equal(with_margin(scores, labels, 0.6, True, seeds[1]), shifted)
    rankings = [Ranking(INFINITY, True), Ranking(INFINITY, False)]
    expected = solve(shifted, labels, rankings, perturb='singly')
    noise = dict(margin=0.6, margin_noise=True, generator=seeds[2])
    found = solve(scores, labels, rankings, perturb='singly', **noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_many_entries_share_their_draws():
    """The shifts are |N(0, 1)| wherever one looks, and no chunk has another's."""
    columns, rows = 8, 5 * margin.DRAWS // 8
    labels = torch.full((rows,), columns)
    labels[::50] = 3
    zeros = torch.zeros(rows, columns)
    shifts = with_margin(zeros, labels, 2.0, True, torch.Generator().manual_seed(0))
    assert torch.equal(shifts < 0, labels.unsqueeze(1) == torch.arange(columns))
    sizes = shifts.abs()
    for part in (*sizes.view(-1).split(margin.CHUNK), sizes[::50, 3]):
        assert part.mean().item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.1)
        assert part.square().mean().item() == pytest.approx(1, rel=0.15)
    starts = {tuple(part[:5].tolist()) for part in sizes.view(-1).split(margin.CHUNK)}
    assert len(starts) == math.ceil(5 * margin.DRAWS / margin.CHUNK)
    assert len(sizes.unique()) < 2 * margin.DRAWS
    again = with_margin(zeros, labels, 2.0, True, torch.Generator().manual_seed(0))
    assert torch.equal(again, shifts)


# Which solver


@pytest.mark.parametrize(
    ('rankings', 'by_tables'),
    [
        (lambda rows: [Ranking(1.0, True), Ranking(1.0, False)], True),
        (lambda rows: [Ranking(1.0, True, rows % 2, 2), Ranking(1.0, False)], True),
        (lambda rows: [Ranking(1.0, False, rows, len(rows))], False),  # large tables
        (
            lambda rows: [
                Ranking(1.0, True, rows % 2, 2),
                Ranking(1.0, False, rows % 3, 3),
            ],
            False,
        ),
    ],
)
def test_tables_are_used_where_they_suit(rankings, by_tables):
    scores, labels = draw(500, 4, 100)
    rankings = rankings(torch.arange(500))
    positives = torch.arange(100)
    assert table_solver.suits(scores, positives, rankings) == by_tables
    found = solve(scores, labels, rankings)
    torch.testing.assert_close(found, solve(scores, labels, rankings, solver='sort'))


def test_what_tables_cannot_rank_is_refused():
    scores, labels = draw(12, 2, 6)
    rows = torch.arange(12)
    two = [Ranking(1.0, True, rows % 3, 3), Ranking(1.0, False, rows % 2, 2)]
    with pytest.raises(ValueError, match='one grouping'):
        solve(scores, labels, two, solver='table')
    past = [Past(*draw(5, 2, 1))]
    with pytest.raises(ValueError, match='rankings of all rows'):
        solve(
            scores, labels, [Ranking(1.0, True, first_row=6)], past=past, solver='table'
        )


def test_more_sequences_than_keys_can_hold():
    ranking = Ranking(1.0, False, torch.tensor([0, 1]), 2**29)
    with pytest.raises(ValueError, match=r'sort.*536870912 sequences at once, got'):
        solve(torch.ones(2, 1), torch.tensor([0, 1]), [ranking], solver='sort')
