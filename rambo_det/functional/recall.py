"""Recall of a retrieval: the loss of RaMBO, and R@k to report."""

from functools import partial
from typing import Optional

import torch
from torch import Tensor

from .average_precision import loss_of_rows, rows_of
from .lines import RecallLine

WEIGHTINGS = ('log', 'loglog')


def recall_loss(
    scores: Tensor,
    targets: Tensor,
    *,
    lambd: float,
    margin: float = 0.0,
    weighting: str = 'log',
    margin_noise: bool = False,
    mask: Optional[Tensor] = None,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = True,
    perturb: str = 'together',
    solver: Optional[str] = None,
) -> Tensor:
    """The recall loss of each row, differentiated as a blackbox.

    It is the mean over the positives of ``w(x)``, with x the number of negatives above
    a positive (section 4.1 of Rolínek et al., arXiv 1912.03500). A row is a query, its
    entries the gallery. With 'log', ``1 - R@k`` is at most ``loss / log(1 + k)``, for
    all k at once.

    As in :func:`~rambo_det.functional.ap_loss`, the gradient of a row is Algorithm 1
    with incoming gradient 1, here ``g = n * w'(x) / P`` for positives, with the rank
    among the positives as a constant. With ``perturb='singly'`` each positive is moved
    alone. Passing k negatives it gains ``(w(x) - w(x - k)) / P``, which these share
    equally; with an infinite λ that is ``w(x) / P``.

    Args:
        scores: (R, n) floating-point tensor, the similarities of a query in each row.
        targets: (R, n) tensor, nonzero or True for positives.
        lambd: Interpolation range λ > 0; with 'singly' in units of the scores.
        margin: α >= 0; positives are lowered and negatives raised by half of it.
        weighting: w: 'log' for ``log(1 + x)``, 'loglog' for ``log(1 + log(1 + x))``.
        margin_noise: Whether the shift is multiplied by ``|N(0, 1)|``, drawn anew.
        mask: (R, n) tensor, zero or False for entries that do not exist, such as the
            query itself.
        generator: Random generator for the noise.
        check_nan: Whether to raise on NaN.
        perturb: Whether positives are moved 'together', as in the paper, or 'singly'.
        solver: See :func:`~rambo_det.functional.ap_loss`.

    Returns:
        (R,) tensor of numbers >= 0, float32 for half-precision scores; 0 with zero
        gradient for a row without positives.

    Raises:
        TypeError: If ``scores`` is no floating-point tensor.
        ValueError: If shapes or devices differ, an argument is out of range, or
            ``scores`` contains NaN where ``mask`` is True.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]], requires_grad=True)
        >>> targets = torch.tensor([[0, 1, 0, 1]])  # 1 and 2 negatives above
        >>> loss = recall_loss(scores, targets, lambd=float('inf'), perturb='singly')
        >>> loss.detach()  # (log 2 + log 3) / 2
        tensor([0.8959])
        >>> loss.sum().backward()
        >>> scores.grad
        tensor([[ 0.6212, -0.3466,  0.2747, -0.5493]])
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(
            f'recall_loss: weighting must be one of {WEIGHTINGS}, got {weighting!r}'
        )
    shift = dict(margin=margin, noise=margin_noise, generator=generator)
    new_line = partial(RecallLine, weighting)
    how = (mask, check_nan, perturb, solver, new_line)
    return loss_of_rows('recall_loss', scores, targets, lambd, shift, *how)


def recall_at_k(
    scores: Tensor,
    targets: Tensor,
    k: int,
    mask: Optional[Tensor] = None,
    *,
    check_nan: bool = True,
) -> Tensor:
    """R@k of each row: whether one of its k highest entries is a positive.

    Ties count against the positives, as in
    :func:`~rambo_det.functional.average_precision`.

    Args:
        scores: (R, n) floating-point tensor.
        targets: (R, n) tensor, nonzero or True for positives.
        k: How many entries of a row are looked at, at least 1.
        mask: (R, n) tensor, zero or False for entries that do not exist.
        check_nan: Whether to raise on NaN.

    Returns:
        (R,) tensor of ones and zeros; NaN for a row without positives.

    Raises:
        TypeError: If ``scores`` is no floating-point tensor.
        ValueError: If shapes or devices differ, ``scores`` contains NaN, or ``k`` is
            less than 1.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.8, 0.7], [0.7, 0.8, 0.9]])
        >>> targets = torch.tensor([[0, 1, 0], [0, 0, 1]])
        >>> recall_at_k(scores, targets, 1), recall_at_k(scores, targets, 2)
        (tensor([0., 1.]), tensor([1., 1.]))
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f'recall_at_k: k must be an integer >= 1, got {k!r}')
    scores, positives, exists, _ = rows_of(
        'recall_at_k', scores, targets, mask, check_nan
    )
    positive = positives.mask
    negative = ~positive if exists is None else exists & ~positive
    if not scores.size(1):
        return scores.new_full((len(scores),), float('nan'))
    best = scores.masked_fill(~positive, float('-inf')).amax(1, keepdim=True)
    found = ((negative & (scores >= best)).sum(1) < k).to(scores.dtype)
    return found.masked_fill_(~positive.any(1), float('nan'))
