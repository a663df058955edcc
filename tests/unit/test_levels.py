"""AP over several thresholds in one pass, against the definition at each of them."""

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rambo_det.functional import Past, Ranking, detection_ap_loss, with_margin
from tests.helpers import oracle

SOLVERS = ['table', 'sort']
ORACLES = {'together': oracle.ap_loss, 'singly': oracle.ap_loss_singly}
score = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(-4, 4, width=16),
    st.sampled_from([math.inf, -math.inf]),
)


@st.composite
def steps(draw, columns, thresholds, least=0):
    """Scores (N, C), labels with ignored rows, and levels (N,)."""
    rows = draw(st.integers(least, 7))
    many = dict(min_size=rows, max_size=rows)
    row = st.lists(score, min_size=columns, max_size=columns)
    values = torch.tensor(draw(st.lists(row, **many))).view(rows, columns)
    labels = draw(st.lists(st.integers(-1, columns), **many))
    levels = draw(st.lists(st.integers(-1, thresholds - 1), **many))
    return values, torch.tensor(labels).long(), torch.tensor(levels).long()


@st.composite
def problems(draw):
    columns, thresholds = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    now = draw(steps(columns, thresholds, least=1))
    past = draw(st.lists(steps(columns, thresholds), max_size=2))
    images = draw(
        st.lists(st.integers(0, 1), min_size=len(now[1]), max_size=len(now[1]))
    )
    kinds = draw(st.sampled_from(['all', 'images', 'this step']))
    return now, past, thresholds, torch.tensor(images), kinds


def sequence_of(ranking, columns, row, column):
    """The sequence of an entry, or None."""
    if ranking.num_rows is not None and row >= ranking.num_rows:
        return None
    group = 0 if ranking.groups is None else int(ranking.groups[row])
    return group * columns + column if ranking.per_class else group


def by_definition(scores, labels, levels, ranking, thresholds, perturb, over_all):
    """Losses and gradients of the sequences, one ranking for each threshold."""
    rows, columns = scores.shape
    losses = torch.zeros(ranking.num_sequences(columns), dtype=torch.float64)
    gradients = torch.zeros(len(losses), rows, columns, dtype=torch.float64)
    for number in range(len(losses)):
        entries = [
            (int(levels[row]) if labels[row] == column else -2, row, column)
            for row in range(rows)
            for column in range(columns)
            if labels[row] >= 0 and sequence_of(ranking, columns, row, column) == number
        ]
        entries.sort()  # of equal scores, the lower level is ahead
        values = [scores[row, column].item() for _, row, column in entries]
        count = sum(level > -2 for level, *_ in entries) if over_all else None
        for threshold in range(thresholds):
            targets = [int(level >= threshold) for level, *_ in entries]
            together = perturb == 'together'
            near = oracle.rounding_decides(
                values, targets, ranking.lambd, 1e-12, together, count
            )
            assume(not near)
            loss, gradient = ORACLES[perturb](values, targets, ranking.lambd, count)
            losses[number] += loss / thresholds
            for (_, row, column), value in zip(entries, gradient):
                gradients[number, row, column] += value / thresholds
    return losses, gradients


@settings(max_examples=1000, deadline=None)
@given(
    problem=problems(),
    lambd=st.floats(0.01, 100),
    to_the_top=st.booleans(),
    perturb=st.sampled_from(sorted(ORACLES)),
    over_all=st.booleans(),
    solver=st.sampled_from(SOLVERS),
    margin=st.sampled_from([0.0, 0.5]),
)
def test_one_pass_is_one_ranking_for_each_threshold(
    problem, lambd, to_the_top, perturb, over_all, solver, margin
):
    now, past, thresholds, images, kind = problem
    scores, labels, levels = now
    if to_the_top and perturb == 'singly':
        lambd = math.inf
    per_class, pooled = Ranking(lambd, True), Ranking(0.5 * lambd, False)
    rankings = {
        'all': [per_class, pooled],
        'images': [
            per_class._replace(groups=images, num_groups=2, num_rows=len(labels)),
            pooled._replace(num_rows=len(labels)),
        ],
        'this step': [per_class, pooled._replace(num_rows=len(labels))],
    }[kind]
    # Margins and sums that every type holds exactly.
    scores = scores.double().requires_grad_()
    results = detection_ap_loss(
        scores,
        labels,
        rankings,
        margin=margin,
        perturb=perturb,
        past=[Past(own.double(), *rest) for own, *rest in past],
        levels=levels,
        num_levels=thresholds,
        over_all=over_all,
        solver=solver,
    )
    shifted = with_margin(scores.detach(), labels, margin)
    everything = [torch.cat(x) for x in zip((shifted, labels, levels), *past)]
    for ranking, (losses, present) in zip(rankings, results):
        expected, gradients = by_definition(
            *everything, ranking, thresholds, perturb, over_all
        )
        torch.testing.assert_close(losses.detach(), expected, rtol=0, atol=1e-12)
        for number, gradient in enumerate(gradients):
            (found,) = torch.autograd.grad(losses[number], scores, retain_graph=True)
            torch.testing.assert_close(
                found, gradient[: len(labels)], rtol=1e-9, atol=1e-12
            )
        labelled = [
            any(
                labels_of_row == column
                and sequence_of(ranking, scores.size(1), row, column) == number
                for row, labels_of_row in enumerate(everything[1].tolist())
                for column in range(scores.size(1))
            )
            for number in range(len(losses))
        ]
        assert present.tolist() == labelled
