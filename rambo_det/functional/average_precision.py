"""Average precision and the loss ``1 - AP`` with the blackbox gradient."""

from functools import cached_property
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .checks import (
    at_least_float32,
    check_binary,
    check_lambd,
    check_perturb,
    check_scores,
)
from .lines import ALL, Levels, Line
from .margin import Shift
from .past import Past
from .sequences import Ranking, positive_indices
from .sort_solver import sort_average_precision, sort_loss
from .table_solver import can_rank, suits, table_average_precision, table_loss

Results = List[Tuple[Tensor, Tensor]]


class _Positives:
    """The positives of a score matrix, told by a mask (N, C) or by labels (N,)."""

    def __init__(self, scores: Tensor, mask_or_labels: Tensor) -> None:
        self._given, self._columns = mask_or_labels, scores.size(1)

    @cached_property
    def mask(self) -> Tensor:
        """True for positives, (N, C)."""
        if self._given.dim() == 2:
            return self._given
        columns = torch.arange(self._columns, device=self._given.device)
        return self._given.unsqueeze(1) == columns

    @cached_property
    def index(self) -> Tensor:
        """Their flat indices, ascending."""
        if self._given.dim() == 2:
            return self._given.reshape(-1).nonzero().squeeze(1)
        return positive_indices(self._given, self._columns)


def _by_tables(
    scores: Tensor,
    positives: _Positives,
    rankings: Sequence[Ranking],
    solver: Optional[str],
    past: Sequence[Past] = (),
) -> bool:
    """Return whether the table solver is used, and not the sort solver.

    By default it is used on CPUs, where it suits. An accelerator sorts everything
    faster than it tells the host which entries matter.

    Raises:
        ValueError: If the solver is unknown, or cannot rank this.
    """
    if solver not in (None, 'table', 'sort'):
        raise ValueError(f"solver must be None, 'table' or 'sort', got {solver!r}")
    if solver is None:
        on_host = scores.device.type == 'cpu'
        return on_host and suits(scores, positives.index, rankings, past)
    if solver == 'table' and not can_rank(len(scores), rankings, past):
        raise ValueError(
            "solver='table' ranks the rows of one grouping, and past rows only in "
            "rankings of all rows; use solver=None, which chooses, or 'sort'"
        )
    return solver == 'table'


def apply_margin(
    scores: Tensor,
    targets: Tensor,
    margin: float,
    noise: bool = False,
    generator: Optional[torch.Generator] = None,
) -> Tensor:
    """Lower positives and raise negatives by half the margin before ranking.

    It keeps scores from collapsing to ties (section 4.2 of arXiv 1912.03500).

    Args:
        scores: Floating-point tensor of any shape.
        targets: Tensor of the same shape, nonzero or True for positives.
        margin: The distance α >= 0 between positives and negatives.
        noise: Whether each entry's shift is multiplied by its own ``|N(0, 1)|``.
        generator: Random generator for the noise.

    Returns:
        The shifted scores, float32 for half-precision ones.

    Raises:
        TypeError: If ``scores`` or ``targets`` has the wrong type.
        ValueError: If the shapes differ or ``margin`` is negative or not finite.

    Example:
        >>> import torch
        >>> apply_margin(torch.tensor([1.0, 1.0]), torch.tensor([1, 0]), margin=0.5)
        tensor([0.7500, 1.2500])
    """
    check_scores('apply_margin', scores, check_nan=False, scalar=True)
    if isinstance(margin, Tensor) or not 0 <= margin < float('inf'):
        raise ValueError(
            f'apply_margin: margin must be a finite number >= 0, got {margin!r}'
        )
    positive = check_binary('apply_margin', 'targets', targets, scores)
    scores = at_least_float32(scores)
    if margin == 0:
        return scores
    shift = torch.full_like(scores, margin / 2).masked_fill_(positive, -margin / 2)
    if noise:
        draw = shift.new_empty(shift.shape).normal_(generator=generator)
        shift *= draw.abs_()
    return scores + shift


def rows_of(
    name: str,
    scores: Tensor,
    targets: Tensor,
    mask: Optional[Tensor],
    check_nan: bool,
    lambd: float = 1.0,
) -> Tuple[Tensor, _Positives, Optional[Tensor], Ranking]:
    """Scores, positives, existing entries and ranking of (R, n) problems."""
    if isinstance(mask, Tensor) and mask.shape == scores.shape:
        scores = scores.masked_fill(mask == 0, 0.0)  # what does not exist may be NaN
    check_scores(name, scores, check_nan, ndim=2)
    positive = check_binary(name, 'targets', targets, scores)
    exists = None
    if mask is not None:
        exists = check_binary(name, 'mask', mask, scores)
        positive = positive & exists
    groups = torch.arange(len(scores), device=scores.device)
    ranking = Ranking(lambd, False, groups, len(scores))
    return at_least_float32(scores), _Positives(scores, positive), exists, ranking


def _average_precision(
    scores: Tensor,
    positives: _Positives,
    exists: Optional[Tensor],
    ranking: Ranking,
    solver: Optional[str],
) -> Tensor:
    """AP of each sequence of a ranking, (S,)."""
    if _by_tables(scores, positives, [ranking], solver):
        return table_average_precision(scores, positives.index, exists, ranking)
    return sort_average_precision(scores, positives.mask, exists, ranking)


def average_precision(
    scores: Tensor,
    targets: Tensor,
    mask: Optional[Tensor] = None,
    *,
    check_nan: bool = True,
    solver: Optional[str] = None,
) -> Tensor:
    """Exact average precision of each row.

    ``AP = mean over positives of rk+ / rk``, with ``rk`` the rank among all entries of
    the row and ``rk+`` the rank among its positives. Order: score descending, then
    negatives before positives (ties count against the detector), then index.

    Args:
        scores: (R, n) floating-point tensor.
        targets: (R, n) tensor, nonzero or True for positives.
        mask: (R, n) tensor, zero or False for entries that do not exist.
        check_nan: Whether to raise on NaN.
        solver: 'table' or 'sort', which give the same; by default, as the device
            suggests.

    Returns:
        (R,) tensor with values in (0, 1]; NaN for a row without positives.

    Raises:
        TypeError: If ``scores`` is no floating-point tensor.
        ValueError: If shapes or devices differ or ``scores`` contains NaN.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
        >>> average_precision(scores, torch.tensor([[1, 0, 1, 0]]))
        tensor([0.8333])
    """
    problem = rows_of('average_precision', scores, targets, mask, check_nan)
    return _average_precision(*problem, solver)


def ap_loss(
    scores: Tensor,
    targets: Tensor,
    *,
    lambd: float,
    margin: float = 0.0,
    margin_noise: bool = False,
    mask: Optional[Tensor] = None,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = True,
    perturb: str = 'together',
    solver: Optional[str] = None,
) -> Tensor:
    """``1 - AP`` of each row, differentiated as a blackbox.

    The gradient of a row is Algorithm 1 with incoming gradient 1,
    ``-(rk(y) - rk(y + lambd * g)) / (n * lambd)`` with ``g = n * rk+ / (P * rk^2)`` for
    positives and 0 for negatives (Rolínek et al., arXiv 1912.03500). It is multiplied
    by the incoming gradient afterwards: unlike in a literal composition, a loss weight
    weights, and λ belongs to the sequence alone.

    With ``perturb='singly'`` each positive is moved by λ while all others stay. Its
    gradient is the loss that this gains, ``(rk+ / (rk - k) - rk+ / rk) / P`` where it
    passes k negatives, which share it equally. With an infinite λ each positive moves
    to the top, and its gradient ``(1 - rk+ / rk) / P`` is the error-driven update of
    AP Loss (Chen et al., arXiv 1904.06373). ``docs/algorithm.md`` derives both.

    Args:
        scores: (R, n) floating-point tensor, one sequence per row.
        targets: (R, n) tensor, nonzero or True for positives.
        lambd: Interpolation range λ > 0; with 'singly' in units of the scores.
        margin: α >= 0; positives are lowered and negatives raised by half of it.
        margin_noise: Whether the shift is multiplied by ``|N(0, 1)|``, drawn anew.
        mask: (R, n) tensor, zero or False for entries that do not exist: they have no
            rank and do not count in n.
        generator: Random generator for the noise.
        check_nan: Whether to raise on NaN.
        perturb: Whether positives are moved 'together', as in the paper, or 'singly'.
        solver: 'table' or 'sort', which give the same; by default, as the device
            suggests.

    Returns:
        (R,) tensor with values in [0, 1), float32 for half-precision scores; 0 with
        zero gradient for a row without positives.

    Raises:
        TypeError: If ``scores`` is no floating-point tensor.
        ValueError: If shapes or devices differ, ``lambd`` or ``margin`` is out of
            range, or ``scores`` contains NaN where ``mask`` is True.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]], requires_grad=True)
        >>> loss = ap_loss(scores, torch.tensor([[0, 1, 1, 0]]), lambd=0.5)
        >>> loss.detach()
        tensor([0.4167])
        >>> loss.sum().backward()
        >>> scores.grad
        tensor([[ 1.0000, -0.5000, -0.5000,  0.0000]])
    """
    shift = dict(margin=margin, noise=margin_noise, generator=generator)
    return loss_of_rows(
        'ap_loss', scores, targets, lambd, shift, mask, check_nan, perturb, solver
    )


def loss_of_rows(
    name: str,
    scores: Tensor,
    targets: Tensor,
    lambd: float,
    shift: Dict[str, Any],
    mask: Optional[Tensor],
    check_nan: bool,
    perturb: str,
    solver: Optional[str],
    new_line: Callable[..., Line] = Line,
) -> Tensor:
    """The loss of each row, (R,), for the function ``name``; see :func:`ap_loss`.

    ``shift`` holds arguments of :func:`apply_margin`. ``new_line`` makes the line that
    defines the loss.
    """
    together = check_perturb(name, perturb)
    check_lambd(name, lambd, together)
    scores, positives, exists, ranking = rows_of(
        name, scores, targets, mask, check_nan, float(lambd)
    )
    scores = apply_margin(scores, targets, **shift)
    of: Tuple[Optional[Tensor], List[Ranking]] = (exists, [ranking])
    if _by_tables(scores, positives, [ranking], solver):
        given = scores, positives.index, *of, Shift(), together
        results = table_loss(*given, new_line=new_line)
    else:
        results = sort_loss(scores, positives.mask, *of, together, new_line=new_line)
    return results[0][0]


def detection_average_precision(
    scores: Tensor, labels: Tensor, ranking: Ranking, solver: Optional[str] = None
) -> Tensor:
    """Exact AP of each sequence of a detector's classification scores.

    Args:
        scores: (N, C) floating-point tensor.
        labels: (N,) int64 tensor, as for :func:`detection_ap_loss`.
        ranking: What is ranked; its ``lambd`` is not used.
        solver: See :func:`ap_loss`.

    Returns:
        (S,) tensor; NaN for a sequence without positives.
    """
    positives, exists = _Positives(scores, labels), (labels >= 0).unsqueeze(1)
    return _average_precision(
        at_least_float32(scores), positives, exists, ranking, solver
    )


def detection_ap_loss(
    scores: Tensor,
    labels: Tensor,
    rankings: Sequence[Ranking],
    *,
    margin: float = 0.0,
    margin_noise: bool = False,
    generator: Optional[torch.Generator] = None,
    any_ignored: bool = True,
    perturb: str = 'together',
    past: Sequence[Past] = (),
    levels: Optional[Tensor] = None,
    num_levels: int = 1,
    over_all: bool = False,
    solver: Optional[str] = None,
) -> Results:
    """``1 - AP`` over the rows of a classifier, differentiated as a blackbox.

    Loss and gradient are those of :func:`ap_loss` on the sequences spelled out as rows,
    for several rankings of the same scores at once. Values are not checked.

    Args:
        scores: (N, C) floating-point tensor: anchors or proposals, and classes.
        labels: (N,) int64 tensor: 0..C-1 foreground, C or more background, negative
            for rows that do not exist.
        rankings: What is ranked; see :class:`Ranking`.
        margin: α >= 0; positives are lowered and negatives raised by half of it.
        margin_noise: Whether the shift is multiplied by ``|N(0, 1)|``, drawn anew; on a
            CPU, more than 2^18 entries share so many draws, taken at random places.
        generator: Random generator for the noise.
        any_ignored: False promises that no label is negative, which saves a pass.
        perturb: 'together' or 'singly', see :func:`ap_loss`.
        past: Past steps, with the margin they had. Their rows follow those of this one,
            as far as rankings take them, and have no gradient.
        levels: (N,) int64 tensor, what each foreground row reaches; values in other
            rows are not used. The loss is then the mean of those at the thresholds t =
            0..num_levels-1: a row of level l is a positive at t <= l, and a negative
            at the others, with the margin of a positive; with -1 it is one at all. A
            threshold that no row of a sequence reaches has loss 0 there.
        num_levels: The number of thresholds; only used with ``levels``.
        over_all: Whether the loss of a threshold, a sum over the rows that reach it, is
            divided by the number of all foreground rows of the sequence. So a threshold
            that few reach has little weight.
        solver: See :func:`ap_loss`.

    Returns:
        For each ranking the losses of its sequences, (S,), and (S,) True where there
        is a positive.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.4, 0.8]])
        >>> labels = torch.tensor([0, 1, 2])  # the last row is background
        >>> detection_ap_loss(scores, labels, [Ranking(0.5, per_class=True)])
        [(tensor([0.0000, 0.5000]), tensor([True, True]))]
    """
    together = check_perturb('detection_ap_loss', perturb)
    scores = at_least_float32(scores)
    exists = (labels >= 0).unsqueeze(1) if any_ignored else None
    positives = _Positives(scores, labels)
    thresholds = ALL
    if levels is not None:
        thresholds = Levels(levels, num_levels, over_all)
    if _by_tables(scores, positives, rankings, solver, past):
        shift, index = Shift(margin, margin_noise, generator), positives.index
        return table_loss(
            scores, index, exists, rankings, shift, together, past, thresholds
        )
    if margin:
        scores = apply_margin(scores, positives.mask, margin, margin_noise, generator)
    if past:
        if levels is not None:
            levels = torch.cat([levels, *(of.reached(num_levels) for of in past)])
        scores = torch.cat([scores, *(of.scores for of in past)])
        labels = torch.cat([labels, *(of.labels for of in past)])
        positives, exists = _Positives(scores, labels), (labels >= 0).unsqueeze(1)
    codes = positives.mask
    if levels is not None:
        codes = codes * (levels + 2).unsqueeze(1)
    return sort_loss(scores, codes, exists, rankings, together, True, thresholds)


def with_margin(
    scores: Tensor,
    labels: Tensor,
    margin: float,
    noise: bool = False,
    generator: Optional[torch.Generator] = None,
) -> Tensor:
    """:func:`apply_margin` on the rows of a classifier, as they are ranked and kept.

    Args:
        scores: (N, C) floating-point tensor.
        labels: (N,) int64 tensor, as for :func:`detection_ap_loss`.
        margin: α >= 0.
        noise: Whether each shift is multiplied by ``|N(0, 1)|``.
        generator: Random generator for the noise.

    Returns:
        The shifted scores, (N, C), float32 for half-precision ones.
    """
    scores, positives = at_least_float32(scores), _Positives(scores, labels)
    if scores.device.type == 'cpu':
        shift = Shift(margin, noise, generator)
        return scores + shift.matrix(scores.detach(), positives.index)
    return apply_margin(scores, positives.mask, margin, noise, generator)
