"""Ranking as a blackbox solver, differentiated by Algorithm 1."""

from typing import Any, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import at_least_float32, check_lambd, check_scores, representable


def _rank(scores: Tensor, dim: int) -> Tensor:
    order = scores.argsort(dim=dim, descending=True, stable=True)
    positions = torch.arange(1, scores.size(dim) + 1, device=scores.device)
    positions = positions.expand_as(order.transpose(dim, -1)).transpose(dim, -1)
    return torch.empty_like(order).scatter_(dim, order, positions)


def rank(scores: Tensor, dim: int = -1, *, check_nan: bool = True) -> Tensor:
    """Rank scores, 1 being the highest.

    Args:
        scores: Floating-point tensor of any shape with at least one dimension.
        dim: The dimension along which to rank.
        check_nan: Whether to raise on NaN.

    Returns:
        int64 tensor of the shape of ``scores`` with values 1..n. Ties are ranked by
        index, the first highest.

    Raises:
        TypeError: If ``scores`` is no floating-point tensor.
        ValueError: If ``scores`` has no dimension or contains NaN.

    Example:
        >>> import torch
        >>> rank(torch.tensor([0.1, 0.9, 0.5, 0.9]))
        tensor([4, 1, 3, 2])
    """
    check_scores('rank', scores, check_nan)
    return _rank(scores, dim)


class _BlackboxRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, lambd: float, dim: int) -> Tensor:
        ranks = _rank(scores, dim)
        ctx.save_for_backward(scores, ranks)
        ctx.lambd, ctx.dim = lambd, dim
        return ranks.to(scores.dtype) / max(scores.size(dim), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Tensor, None, None]:
        scores, ranks = ctx.saved_tensors
        perturbed = _rank(scores + ctx.lambd * grads[0], ctx.dim)
        # Ranks are subtracted as integers: their difference is exact.
        jump = (ranks - perturbed).to(scores.dtype)
        return -jump / (ctx.lambd * max(scores.size(ctx.dim), 1)), None, None


def blackbox_rank(
    scores: Tensor, lambd: float, dim: int = -1, *, check_nan: bool = True
) -> Tensor:
    """Rank scores, normalised by length, with Algorithm 1 as the gradient.

    With ``r(y) = rank(y) / n`` and the incoming gradient ``g``, the backward pass
    returns ``-(r(y) - r(y + lambd * g)) / lambd``. Any rank-based loss can be composed
    from it. This gradient is not linear in ``g``: a factor on the loss changes it like
    a factor on ``lambd`` does.

    Args:
        scores: Floating-point tensor of any shape with at least one dimension.
        lambd: Interpolation range λ > 0; larger ones give a smoother gradient.
        dim: The dimension along which to rank.
        check_nan: Whether to raise on NaN.

    Returns:
        Tensor of the shape of ``scores`` with values in (0, 1], 1/n for the highest
        score; float32 for half-precision scores. Ties are ranked by index.

    Raises:
        TypeError: If ``scores`` is no floating-point tensor.
        ValueError: If ``lambd`` is not positive and finite, or ``scores`` has no
            dimension or contains NaN.

    Example:
        >>> import torch
        >>> scores = torch.tensor([0.1, 0.9, 0.5, 0.4], requires_grad=True)
        >>> ranks = blackbox_rank(scores, lambd=2.0)
        >>> ranks
        tensor([1.0000, 0.2500, 0.5000, 0.7500], grad_fn=<_BlackboxRankBackward>)
        >>> ranks[0].backward()  # the last entry should rank higher
        >>> scores.grad
        tensor([-0.3750,  0.1250,  0.1250,  0.1250])
    """
    check_scores('blackbox_rank', scores, check_nan)
    check_lambd('blackbox_rank', lambd)
    dim = dim if dim >= 0 else dim + scores.dim()
    scores = at_least_float32(scores)
    return _BlackboxRank.apply(scores, representable(lambd, scores.dtype), dim)
