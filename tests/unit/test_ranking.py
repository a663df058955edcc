"""rank and blackbox_rank against the definition and Algorithm 1."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rambo_det.functional import blackbox_rank, rank
from tests.helpers.oracle import ranks

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# Few distinct values, so that ties are the rule.
scores_lists = st.lists(
    st.one_of(st.integers(-3, 3).map(float), st.floats(-4, 4, width=16)),
    min_size=1,
    max_size=12,
)


@given(values=scores_lists, dtype=st.sampled_from(DTYPES))
def test_rank_is_the_definition(values, dtype):
    scores = torch.tensor(values, dtype=dtype)
    result = rank(scores)
    assert result.dtype == torch.int64
    # Equal targets leave score and index to decide.
    assert result.tolist() == ranks(scores.double().tolist(), [0] * len(values))


@pytest.mark.parametrize('dim', [0, 1, 2, -1, -2])
def test_rank_along_any_dimension(dim):
    scores = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    last = scores.movedim(dim, -1)
    expected = 1 + (last.unsqueeze(-2) > last.unsqueeze(-1)).sum(-1)
    assert torch.equal(rank(scores, dim).movedim(dim, -1), expected)


@pytest.mark.parametrize(
    'values, expected',
    [
        ([float('inf'), float('-inf'), 0.0], [1, 3, 2]),
        ([float('-inf'), float('-inf')], [1, 2]),
        ([7.0], [1]),
        ([], []),
        ([0.0, -0.0], [1, 2]),
    ],
)
def test_rank_of_special_values(values, expected):
    assert rank(torch.tensor(values)).tolist() == expected


@settings(max_examples=300)
@given(
    values=scores_lists,
    data=st.data(),
    lambd=st.floats(0.01, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_blackbox_rank_is_algorithm_1(values, data, lambd, dtype):
    n = len(values)
    incoming = data.draw(st.lists(st.floats(-2, 2, width=16), min_size=n, max_size=n))
    scores = torch.tensor(values, dtype=dtype, requires_grad=True)
    grad = torch.tensor(incoming, dtype=dtype)
    result = blackbox_rank(scores, lambd)
    result.backward(grad)

    before = ranks(scores.tolist(), [0] * n)
    after = ranks((scores.detach() + lambd * grad).tolist(), [0] * n)
    assert torch.equal(result.detach(), torch.tensor(before, dtype=dtype) / n)
    expected = [-(b - a) / (n * lambd) for b, a in zip(before, after)]
    torch.testing.assert_close(scores.grad, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize('dtype', DTYPES)
def test_blackbox_rank_of_half_precision_is_float32(dtype):
    """4,097 ranks / n cannot be told apart in half precision."""
    scores = torch.arange(4097.0).to(dtype).requires_grad_()
    result = blackbox_rank(scores, 1.0)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.unique().numel() == 4097
    result.sum().backward()
    assert scores.grad.dtype == dtype


def test_blackbox_rank_other_dimension_and_strides():
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()
    rows = scores.clone().requires_grad_()
    blackbox_rank(rows, 2.0).backward(grad)
    columns = scores.t().contiguous().t().requires_grad_()
    blackbox_rank(columns.t(), 2.0, dim=0).backward(grad.t())
    assert torch.equal(rows.grad, columns.grad)


def test_no_second_derivative_is_pretended():
    scores = torch.randn(5, requires_grad=True)
    weights = torch.ones(5, requires_grad=True)
    total = (blackbox_rank(scores, 1.0) * weights).sum()
    (grad,) = torch.autograd.grad(total, scores, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


@pytest.mark.parametrize('function', [rank, lambda s: blackbox_rank(s, 1.0)])
@pytest.mark.parametrize(
    'scores, error, match',
    [
        ([1.0, 2.0], TypeError, 'must be a torch.Tensor, got list'),
        (torch.tensor([1, 2]), TypeError, 'floating point, got torch.int64'),
        (torch.tensor(1.0), ValueError, 'at least one dimension'),
        (torch.tensor([1.0, float('nan')]), ValueError, 'NaN .1 of 2 entries.'),
    ],
)
def test_bad_scores(function, scores, error, match):
    with pytest.raises(error, match=match):
        function(scores)


@pytest.mark.parametrize('lambd', [0, -1.0, float('nan'), float('inf')])
def test_bad_lambd(lambd):
    with pytest.raises(ValueError, match='lambd must be a positive finite number'):
        blackbox_rank(torch.zeros(2), lambd)


def test_nan_check_can_be_switched_off():
    assert rank(torch.tensor([1.0, float('nan')]), check_nan=False).numel() == 2
