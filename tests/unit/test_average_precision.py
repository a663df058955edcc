"""AP and its loss against the definition and against Algorithm 1 done literally."""

import functools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rambo_det.functional import (
    Ranking,
    ap_loss,
    apply_margin,
    average_precision,
    blackbox_rank,
    detection_ap_loss,
    detection_average_precision,
    rank,
    recall_at_k,
    recall_loss,
)
from tests.helpers import oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SOLVERS = ['table', 'sort']

score = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(-4, 4, width=16),
    st.sampled_from([math.inf, -math.inf]),
)


@st.composite
def problems(draw, max_rows=3, max_length=9):
    """Scores, targets and a mask of shape (R, n), and λ.

    What the mask hides is NaN, and the memory may be that of the transposed matrices.
    """
    rows = draw(st.integers(1, max_rows))
    length = draw(st.integers(1, max_length))
    many = rows * length
    values = draw(st.lists(score, min_size=many, max_size=many))
    # Drawn as one value, which takes a fraction of the time that a list of them takes.
    flags = st.binary(min_size=many, max_size=many).map(lambda b: [x % 2 for x in b])
    targets, mask = draw(flags), draw(st.one_of(flags, st.just([1] * many)))
    lambd = draw(st.floats(0.01, 100))
    scores, targets, mask = (
        torch.tensor(part, dtype=kind).view(rows, length)
        for part, kind in ((values, None), (targets, torch.bool), (mask, torch.bool))
    )
    parts = scores.masked_fill(~mask, math.nan), targets, mask
    if draw(st.booleans()):
        parts = tuple(part.t().contiguous().t() for part in parts)
    return (*parts, lambd)


def sequences(scores, targets, mask):
    """Each row's existing entries as lists, with their positions."""
    for r in range(scores.size(0)):
        at = mask[r].nonzero().flatten().tolist()
        yield (
            r,
            at,
            [scores[r, i].item() for i in at],
            [int(targets[r, i]) for i in at],
        )


@settings(max_examples=500)
@given(
    problem=problems(),
    dtype=st.sampled_from(DTYPES),
    solver=st.sampled_from(SOLVERS),
)
def test_average_precision_is_the_definition(problem, dtype, solver):
    scores, targets, mask, _ = problem
    scores = scores.to(dtype)
    result = average_precision(scores, targets, mask, solver=solver)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for r, _, values, flags in sequences(scores.double(), targets, mask):
        expected = oracle.average_precision(values, flags)
        assert result[r].item() == pytest.approx(expected, rel=1e-6, nan_ok=True)


ORACLES = {'together': oracle.ap_loss, 'singly': oracle.ap_loss_singly}
WEIGHTINGS = [None, 'log', 'loglog']  # of recall; None is AP


def loss_of(weighting):
    return functools.partial(recall_loss, weighting=weighting) if weighting else ap_loss


@settings(max_examples=2000, deadline=None)
@given(
    problem=problems(),
    dtype=st.sampled_from(DTYPES),
    perturb=st.sampled_from(sorted(ORACLES)),
    to_the_top=st.booleans(),
    solver=st.sampled_from(SOLVERS),
    weighting=st.sampled_from(WEIGHTINGS),
)
def test_loss_and_gradient_are_algorithm_1(
    problem, dtype, perturb, to_the_top, solver, weighting
):
    scores, targets, mask, lambd = problem
    together = perturb == 'together'
    if to_the_top and not together:
        lambd = math.inf
    exact = dtype == torch.float64
    scores = scores.to(dtype).requires_grad_()
    # Incoming gradients that half precision holds exactly: they must only scale.
    incoming = torch.tensor([0.5, 2.0, -1.0])[: scores.size(0)]
    losses = loss_of(weighting)(
        scores, targets, lambd=lambd, mask=mask, perturb=perturb, solver=solver
    )
    (losses * incoming.to(losses)).sum().backward()

    expected = torch.zeros(scores.shape, dtype=torch.float64)
    for r, at, values, flags in sequences(scores.detach().double(), targets, mask):
        tol = 1e-12 if exact else 1e-5
        args = values, flags, lambd
        assume(not oracle.rounding_decides(*args, tol, together, None, weighting))
        loss, gradient = ORACLES[perturb](*args, None, weighting)
        assert losses[r].item() == pytest.approx(loss, abs=1e-12 if exact else 1e-6)
        expected[r, at] = torch.tensor(gradient, dtype=torch.float64) * incoming[r]
    assert scores.grad.dtype == dtype
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(
        scores.grad.double(), expected, rtol=rtol, atol=1e-12 if exact else 1e-7
    )


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.one_of(st.integers(1, 12), st.integers(200, 1500)),
    share=st.sampled_from([0.02, 0.2, 0.9]),
    digits=st.sampled_from([1, 2, 15]),
    spread=st.sampled_from([1.0, 1e-3, 1e6]),
    lambd=st.sampled_from([0.05, 1.0, 30.0]),
    solver=st.sampled_from(SOLVERS),
    weighting=st.sampled_from(WEIGHTINGS),
)
def test_unit_gradient_form_equals_the_literal_composition(
    seed, length, share, digits, spread, lambd, solver, weighting
):
    """The same loss composed from blackbox_rank, the positives' ranks constant.

    blackbox_rank breaks ties by index, so the negatives are first. Few digits make
    ties; outliers make bins uneven.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(length, generator=generator, dtype=torch.float64)
    scores = scores.round(decimals=digits)
    scores[torch.rand(length, generator=generator) < 0.02] *= spread
    number = max(1, round(share * length))
    positive = torch.arange(length) >= length - number
    literal = scores.clone().requires_grad_()
    among = rank(scores[positive]).double()
    ranks = blackbox_rank(literal, lambd)[positive]
    loss = 1 - (among / length / ranks).mean()
    if weighting:
        above = ranks * length - among
        # Rounded, as ties between positives would be broken by rounding.
        loss = (above + (above.round() - above).detach()).log1p()
        loss = (loss.log1p() if weighting == 'loglog' else loss).mean()
    loss.backward()
    ours = scores[None].clone().requires_grad_()
    result = loss_of(weighting)(ours, positive[None], lambd=lambd, solver=solver)
    result.sum().backward()
    torch.testing.assert_close(result[0], loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.grad[0], literal.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'values, targets, loss',
    [
        ([3.0, 2.0, 1.0], [1, 1, 0], 0.0),
        ([3.0, 2.0, 1.0], [0, 0, 1], 2 / 3),
        ([1.0], [1], 0.0),
        ([1.0], [0], 0.0),
        ([2.0, 1.0], [1, 1], 0.0),
        ([2.0, 1.0], [0, 0], 0.0),
        ([0.0, 0.0, 0.0, 0.0], [1, 0, 1, 0], 1 - (1 / 3 + 2 / 4) / 2),
        ([math.inf, math.inf, -math.inf], [1, 0, 1], 1 - (1 / 2 + 2 / 3) / 2),
        ([], [], 0.0),
    ],
)
def test_special_sequences(values, targets, loss, dtype, solver):
    scores = torch.tensor([values], dtype=dtype).requires_grad_()
    result = ap_loss(scores, torch.tensor([targets]), lambd=1.0, solver=solver)
    assert result.tolist() == pytest.approx([loss], abs=1e-6)
    result.sum().backward()
    assert torch.isfinite(scores.grad).all()


@settings(max_examples=200)
@given(problem=problems(), dtype=st.sampled_from(DTYPES), k=st.integers(1, 9))
def test_recall_at_k_is_the_definition(problem, dtype, k):
    scores, targets, mask, _ = problem
    scores = scores.to(dtype)
    result = recall_at_k(scores, targets, k, mask)
    for r, _, values, flags in sequences(scores.double(), targets, mask):
        ranks = [n for n, t in zip(oracle.ranks(values, flags), flags) if t]
        expected = float(min(ranks) <= k) if ranks else math.nan
        assert result[r].item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('perturb', sorted(ORACLES))
@pytest.mark.parametrize('lambd', [1e-320, 1e-46, 1e-38, 1e38, 1e39, 1e300])
def test_lambda_at_the_ends_of_floating_point(lambd, perturb, weighting, dtype, solver):
    """Nothing moves below the range of the type; above it, everything that can."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 30, generator=generator).to(dtype)
    targets = torch.arange(30).expand(3, 30) % 4 == 0
    # Those that are infinite stay, whatever finite number is added.
    scores[1, :5], scores[2, :5] = math.inf, -math.inf
    scores.requires_grad_()
    loss = functools.partial(loss_of(weighting), perturb=perturb, solver=solver)
    loss(scores, targets, lambd=lambd).sum().backward()
    assert torch.isfinite(scores.grad).all()
    grad = scores.grad.clone()
    if perturb == 'together':
        # The jumps, at most the whole sequence, divided by λ.
        assert grad.abs().max() <= 1 / max(lambd, torch.finfo(dtype).tiny)
    elif lambd < 1:
        assert not grad.any()
    else:
        scores.grad = None
        loss(scores, targets, lambd=math.inf).sum().backward()
        assert torch.equal(grad[0], scores.grad[0])
    for values in (scores[0].detach(), torch.zeros(30, dtype=dtype)):
        leaf = values.clone().requires_grad_()
        ranks = blackbox_rank(leaf, lambd)
        ranks[targets[0]].sum().backward()
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_million_positives_are_summed_exactly(dtype, solver):
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(1, 1_200_000, generator=generator) < 0.85
    scores = targets + 2 * torch.randn(targets.shape, generator=generator, dtype=dtype)
    negatives_first = targets[0].byte().argsort(stable=True)
    order = scores[0][negatives_first].argsort(descending=True, stable=True)
    sorted_targets = targets[0][negatives_first][order]
    among = sorted_targets.cumsum(0)[sorted_targets].tolist()
    overall = (sorted_targets.nonzero().squeeze(1) + 1).tolist()
    assert len(among) > 1_000_000
    exact = math.fsum(a / b for a, b in zip(among, overall)) / len(among)
    # The result has the type of the scores, and so its rounding.
    tolerance = 1e-9 if dtype == torch.float64 else 2**-24
    result = average_precision(scores, targets, solver=solver)
    assert abs(result.item() - exact) <= tolerance
    loss = ap_loss(scores, targets, lambd=math.inf, perturb='singly', solver=solver)
    assert abs(loss.item() - (1 - exact)) <= tolerance


# The margin


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('noise', [False, True])
@pytest.mark.parametrize('margin', [0.1, 1.7])
def test_margin_is_its_formula_bit_for_bit(margin, noise, dtype):
    """Whatever the strides: a seed always draws the same noise for an entry."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, 40, dtype=dtype, generator=generator)
    targets = torch.rand(30, 40, generator=generator) < 0.3
    draw = torch.ones(30, 40, dtype=dtype)
    if noise:
        seed = torch.Generator().manual_seed(1)
        draw = torch.randn(30, 40, dtype=dtype, generator=seed).abs()
    expected = scores + (0.5 - targets.to(dtype)) * margin * draw
    for same in (scores, scores.t().contiguous().t()):
        seed = torch.Generator().manual_seed(1)
        assert torch.equal(apply_margin(same, targets, margin, noise, seed), expected)


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('weighting', [None, 'log'])
@pytest.mark.parametrize('noise', [False, True])
def test_loss_with_margin_is_the_loss_of_shifted_scores(noise, weighting, solver):
    scores = torch.randn(2, 30, dtype=torch.float64)
    targets = torch.rand(2, 30) < 0.3
    mask = torch.rand(2, 30) < 0.8
    plain, inside = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    shifted = apply_margin(
        plain * mask, targets, 0.5, noise, torch.Generator().manual_seed(5)
    )
    loss = loss_of(weighting)
    a = loss(shifted, targets, lambd=2.0, mask=mask, solver=solver)
    b = loss(
        inside,
        targets,
        lambd=2.0,
        margin=0.5,
        margin_noise=noise,
        mask=mask,
        generator=torch.Generator().manual_seed(5),
        solver=solver,
    )
    a.sum().backward()
    b.sum().backward()
    assert torch.equal(a, b)
    assert torch.equal(plain.grad, inside.grad)


def test_margin_keeps_half_precision_apart():
    """0.15 / 2 is lost next to 64 in bfloat16."""
    shifted = apply_margin(
        torch.full((2,), 64.0, dtype=torch.bfloat16), torch.tensor([1, 0]), 0.15
    )
    assert shifted.dtype == torch.float32
    assert (shifted[1] - shifted[0]).item() == pytest.approx(0.15, rel=1e-3)


# The detection layout


@st.composite
def detections(draw):
    """Logits (N, C), labels, image index, number of images, λ."""
    rows, columns = draw(st.integers(0, 10)), draw(st.integers(1, 4))
    num_images = draw(st.integers(1, 3))
    many = rows * columns
    values = draw(st.lists(score, min_size=many, max_size=many))
    labels = draw(st.lists(st.integers(-1, columns), min_size=rows, max_size=rows))
    index = st.lists(st.integers(0, num_images - 1), min_size=rows, max_size=rows)
    images = draw(index)
    return (
        torch.tensor(values, dtype=torch.float64).view(rows, columns),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(images, dtype=torch.long),
        num_images,
        draw(st.floats(0.01, 100)),
    )


@settings(max_examples=600, deadline=None)
@given(
    problem=detections(),
    per_class=st.booleans(),
    per_image=st.booleans(),
    solver=st.sampled_from(SOLVERS),
)
def test_detection_layout_equals_sequences_spelled_out(
    problem, per_class, per_image, solver
):
    scores, labels, images, num_images, lambd = problem
    scores.requires_grad_()
    groups = (images, num_images) if per_image else ()
    ranking = Ranking(lambd, per_class, *groups)
    ((losses, present),) = detection_ap_loss(scores, labels, [ranking], solver=solver)
    aps = detection_average_precision(scores, labels, ranking, solver)
    weights = torch.linspace(0.5, 2.0, losses.numel(), dtype=torch.float64)
    (losses * weights).sum().backward()

    expected = torch.zeros(scores.shape, dtype=torch.float64)
    columns = range(scores.size(1))
    number = 0
    for image in range(num_images if per_image else 1):
        rows = [
            i
            for i in range(len(labels))
            if labels[i] >= 0 and (not per_image or images[i] == image)
        ]
        for classes in [[c] for c in columns] if per_class else [list(columns)]:
            at = [(i, c) for i in rows for c in classes]
            values = [scores[i, c].item() for i, c in at]
            flags = [int(labels[i] == c) for i, c in at]
            assume(not oracle.rounding_decides(values, flags, lambd, 1e-12))
            loss, gradient = oracle.ap_loss(values, flags, lambd)
            assert losses[number].item() == pytest.approx(loss, abs=1e-12)
            assert bool(present[number]) == any(flags)
            assert aps[number].item() == pytest.approx(
                oracle.average_precision(values, flags), abs=1e-12, nan_ok=True
            )
            for (i, c), g in zip(at, gradient):
                expected[i, c] += g * weights[number]
            number += 1
    assert number == losses.numel()
    torch.testing.assert_close(scores.grad, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    problem=detections(),
    per_class=st.booleans(),
    per_image=st.booleans(),
    part=st.tuples(st.integers(0, 10), st.integers(0, 10)),
    perturb=st.sampled_from(['together', 'singly']),
    lambds=st.tuples(*[st.sampled_from([0.3, 2.0, math.inf])] * 2),
    solver=st.sampled_from(SOLVERS),
)
def test_a_part_of_the_rows_is_ranked_as_if_alone(
    problem, per_class, per_image, part, perturb, lambds, solver
):
    scores, labels, images, num_images, lambd = problem
    first, last = sorted(min(row, len(labels)) for row in part)
    inside, outside = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    groups = (images[first:last], num_images) if per_image else (None, 1)
    if perturb == 'together':
        lambds = (lambd, lambd)
    kwargs = dict(perturb=perturb, solver=solver)
    ranking = Ranking(lambds[0], per_class, *groups)
    placed = ranking._replace(num_rows=last - first, first_row=first)
    whole = Ranking(lambds[1], not per_class)  # ranked in the same call
    results = detection_ap_loss(inside, labels, [placed, whole], **kwargs)
    expected = [
        *detection_ap_loss(
            outside[first:last], labels[first:last], [ranking], **kwargs
        ),
        *detection_ap_loss(outside, labels, [whole], **kwargs),
    ]
    for (losses, present), (other, also) in zip(results, expected):
        # The more entries there are, the fewer bits the sort solver has for a sum.
        rounding = 1e-15 if solver == 'sort' else 0
        torch.testing.assert_close(losses, other, rtol=0, atol=rounding)
        assert torch.equal(present, also)
    for parts in (results, expected):
        sum(losses.sum() for losses, _ in parts).backward()
    torch.testing.assert_close(inside.grad, outside.grad, rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    margin=st.sampled_from([0.1, 0.15, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    per_class=st.booleans(),
    solver=st.sampled_from(SOLVERS),
)
def test_fixed_margin_inside_is_the_one_applied_before(
    seed, margin, dtype, per_class, solver
):
    """Bit for bit, on a grid where the margin makes ties that rounding decides."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-60, 60, (200, 3), generator=generator).to(dtype) / 20
    labels = torch.randint(0, 30, (200,), generator=generator).clamp(max=3)
    one_hot = labels[:, None] == torch.arange(3)
    inside, before = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    ranking = Ranking(1.0, per_class)
    kwargs = dict(solver=solver)
    ((a, _),) = detection_ap_loss(inside, labels, [ranking], margin=margin, **kwargs)
    shifted = apply_margin(before, one_hot, margin)
    ((b, _),) = detection_ap_loss(shifted, labels, [ranking], **kwargs)
    a.sum().backward()
    b.sum().backward()
    assert torch.equal(a, b)
    assert torch.equal(inside.grad, before.grad)


def test_one_of_several_losses_has_a_gradient():
    scores = torch.randn(8, 3, requires_grad=True)
    labels = torch.arange(8) % 4
    rankings = [Ranking(1.0, True), Ranking(1.0, False)]
    for solver in SOLVERS:
        first, _ = detection_ap_loss(scores, labels, rankings, solver=solver)
        (gradient,) = torch.autograd.grad(first[0].sum(), scores)
        (alone,) = detection_ap_loss(scores, labels, rankings[:1], solver=solver)
        (expected,) = torch.autograd.grad(alone[0].sum(), scores)
        torch.testing.assert_close(gradient, expected)


# Errors


NAN = torch.full((1, 2), math.nan)


@pytest.mark.parametrize(
    'arguments, error, match',
    [
        (([[1.0]], torch.ones(1, 1)), TypeError, 'scores must be a torch.Tensor'),
        ((torch.ones(3), torch.ones(3)), ValueError, r'2 dimensions.*got shape \(3,\)'),
        ((torch.ones(1, 3), [[1, 0, 0]]), TypeError, 'targets must be a torch.Tensor'),
        ((torch.ones(1, 3), torch.ones(1, 2)), ValueError, r'targets.*\(1, 3\).*1, 2'),
        ((torch.ones(1, 3).long(), torch.ones(1, 3)), TypeError, 'torch.int64'),
        ((NAN, torch.ones(1, 2)), ValueError, 'NaN'),
        (
            (torch.ones(1, 3), torch.ones(1, 3), torch.ones(3)),
            ValueError,
            r'mask must have the shape.*\(1, 3\)',
        ),
    ],
)
def test_bad_arguments(arguments, error, match):
    scores, targets, *mask = arguments
    kwargs = dict(mask=mask[0]) if mask else {}
    losses = [functools.partial(of, lambd=1.0) for of in (ap_loss, recall_loss)]
    for function in (average_precision, functools.partial(recall_at_k, k=1), *losses):
        with pytest.raises(error, match=match):
            function(scores, targets, **kwargs)


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(lambd=0.0), 'lambd must be a positive finite number, got 0.0'),
        (dict(lambd=-1.0), 'lambd'),
        (dict(lambd=1.0, margin=-0.1), 'margin must be a finite number >= 0'),
        (dict(lambd=1.0, margin=math.inf), 'margin'),
        (dict(lambd=1.0, solver='guess'), "None, 'table' or 'sort', got 'guess'"),
    ],
)
def test_bad_settings(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ap_loss(torch.ones(1, 3), torch.ones(1, 3), **kwargs)
    with pytest.raises(ValueError, match=match.replace('ap_loss', 'recall_loss')):
        recall_loss(torch.ones(1, 3), torch.ones(1, 3), **kwargs)


@pytest.mark.parametrize('perturb', sorted(ORACLES))
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_nan_that_nobody_looked_for(perturb, dtype):
    """The check can be switched off, and then the sort solver bears it."""
    scores, targets = torch.randn(6, 50, dtype=dtype), torch.rand(6, 50) < 0.3
    scores[:, ::7], scores[:, 1::7] = math.nan, -math.nan
    leaf, unchecked = scores.requires_grad_(), dict(check_nan=False)
    kwargs = dict(lambd=1.0, perturb=perturb, **unchecked)
    ap_loss(leaf, targets, solver='sort', **kwargs).sum().backward()
    assert ap_loss(NAN, torch.ones(1, 2), **kwargs).shape == (1,)
    assert average_precision(leaf.detach(), targets, **unchecked).shape == (6,)
