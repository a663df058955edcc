"""Ranking losses of other papers, to compare with.

Sources, written from the papers and not from the authors' code:

- AP Loss: Chen et al., *Towards Accurate One-Stage Object Detection with AP-Loss*, CVPR
  2019 (arXiv 1904.06373);
- RS Loss: Oksuz et al., *Rank & Sort Loss for Object Detection and Instance
  Segmentation*, ICCV 2021 (arXiv 2107.11669);
- their bucketed forms: Yavuz et al., *Bucketed Ranking-based Losses for Efficient
  Training of Object Detectors*, ECCV 2024 (arXiv 2407.14204).

All rank every (row, class) entry against every other. With the soft step ``H``, which
is 0 below -δ, 1 above δ and linear between, the rank of a positive i is the sum of
``H(s_j - s_i)`` over all entries j. The gradient is the error-driven update of AP Loss:
an error of positive i lowers the entries that cause it, each by its share of the sum of
``H``, and raises i by as much. The sums over pairs of a positive and a negative are
those of the definition, but made without visiting each pair: see :class:`_Entries`.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import at_least_float32
from .sequences import positive_indices

__all__ = [
    'ap_loss',
    'bucketed_ap_loss',
    'bucketed_rank_sort_loss',
    'rank_sort_loss',
]

# Pairs of positives that are compared at a time.
_PAIRS = 2**20


class _GivenGradient(torch.autograd.Function):
    """A loss whose gradient was computed along with it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None


def _step(difference: Tensor, delta: float) -> Tensor:
    """Return ``H``; without a δ it is 1 at 0."""
    if not delta:
        return (difference >= 0).to(difference)
    return difference.div(2 * delta).add_(0.5).clamp_(0, 1)


def _step_sums(values: Tensor, delta: float) -> Tensor:
    """Return the sum of ``H(v_j - v_i)`` over all j for each i; values (P,) ascend."""
    count, first = len(values), torch.searchsorted(values, values - delta)
    if not delta:
        return (count - first).to(values)
    last = torch.searchsorted(values, values + delta)
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    partly = (last - first).to(values)
    slope = (total[last] - total[first] - values * partly) / (2 * delta)
    return count - last + slope + 0.5 * partly


class _Entries:
    """The positives, and the negatives for which some positive has ``H > 0``.

    The scores ``s_i ± δ`` of the positives are edges. Between two edges ``H`` of every
    positive is 0, 1, or linear, so that only the number and the sum of the negatives
    there count.

    Attributes:
        positives: (P,) float64, ascending, on an axis on which gaps between edges are
            at most 2δ, or 1 without a δ. There all ``H`` are those of the scores, and
            sums stay exact where scores are far apart. At a tie of scores so large that
            adding δ changes nothing, also of infinite ones, a negative counts 1, not
            ``H(0)``.
        index: (P,) their flat indices.
        wrong: (P,) the sum of ``H`` over all negatives for each of them.
    """

    def __init__(
        self, logits: Tensor, labels: Tensor, delta: float, bucketed: bool
    ) -> None:
        self._logits, self.delta = logits, delta
        flat = logits.detach().reshape(-1)
        index = positive_indices(labels, logits.size(1))
        matters = flat >= flat[index].min() - delta
        matters[index] = False
        self._others = matters.nonzero().squeeze(1)
        scores, order = flat[index].double().sort()
        self.index, count = index[order], len(index)
        rest, sizes = flat[self._others].double(), None
        self._bucket: Optional[Tensor] = None
        if bucketed:
            # All between two positives get their mean, and count so many times.
            self._bucket = torch.searchsorted(scores, rest, right=True)
            sizes = torch.bincount(self._bucket, minlength=count + 1).double()
            rest = torch.bincount(self._bucket, rest, count + 1) / sizes.clamp(min=1)

        edges, order = torch.cat([scores - delta, scores + delta]).sort(stable=True)
        self._low, self._high = order.argsort().split(count)
        # A hard step only asks for the order, in which a tiny gap must not get lost.
        gaps = edges.diff().nan_to_num(nan=0.0)
        gaps = gaps.clamp_(max=2 * delta) if delta else (gaps > 0).to(gaps)
        axis = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])
        self.positives = axis[self._low] + delta
        self._bin = torch.searchsorted(edges, rest, right=True)
        # Where no edge is below, or none above, H is 0 or 1 whatever the place.
        below = (self._bin - 1).clamp_(min=0)
        after = (rest - edges[below]).nan_to_num_(nan=0.0).clamp_(0, 2 * delta)
        self._places = after.add_(axis[below])
        weighted = self._places if sizes is None else self._places * sizes
        # How many negatives are below each edge, and in all; the sums of their places.
        numbers, sums = (
            torch.bincount(self._bin, weights, 2 * count + 1).double().cumsum(0)
            for weights in (sizes, weighted)
        )
        self.wrong = numbers[-1] - numbers[self._high]
        if delta:
            partly = numbers[self._high] - numbers[self._low]
            moment = sums[self._high] - sums[self._low] - self.positives * partly
            self.wrong += moment / (2 * delta) + 0.5 * partly
            self.wrong.clamp_(min=0)

    def _blame(self, scale: Tensor) -> Tensor:
        """Return the sum of ``scale_i * H`` over the positives for each negative."""
        # At an edge the line that sums up all positives below changes.
        changes = scale.new_zeros(2, 2 * len(scale) + 1)
        changes[0, self._high + 1] = scale
        if self.delta:
            slope = scale / (2 * self.delta)
            constant = 0.5 * scale - slope * self.positives
            changes[:, self._low + 1] = torch.stack([constant, slope])
            changes[:, self._high + 1] -= torch.stack([constant, slope])
        constant, slope = changes.cumsum(1)
        blame = constant[self._bin].addcmul_(slope[self._bin], self._places)
        return blame if self._bucket is None else blame[self._bucket]

    def loss(self, loss: Tensor, update: Tensor, errors: Tensor) -> Tensor:
        """Return the mean over the positives, with its gradient.

        Args:
            loss: The sum of the loss over the positives.
            update: (P,) gradient of the positives.
            errors: (P,) ranking errors, for which the negatives are blamed.
        """
        blame = self._blame(
            errors / self.wrong.clamp(min=torch.finfo(errors.dtype).tiny)
        )
        logits, count = self._logits, len(self.positives)
        gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        gradient.view(-1)[self.index] = (update / count).to(logits)
        gradient.view(-1)[self._others] = blame.div_(count).to(logits)
        return _GivenGradient.apply(logits, (loss / count).to(logits), gradient)


def _ap(logits: Tensor, labels: Tensor, delta: float, bucketed: bool) -> Tensor:
    """AP Loss; the bucketed form has no interpolation, and ``H(0)`` in the rank."""
    logits = at_least_float32(logits)
    if not bool((labels < logits.size(1)).any()):
        return logits[:0].sum()
    entries = _Entries(logits, labels, delta, bucketed)
    places = _step_sums(entries.positives, delta)
    if bucketed:
        errors = entries.wrong / (places + entries.wrong)
    else:
        # A positive counts 1 in its rank, not H(0); from the lowest one up, precision
        # may not fall.
        places += 0.5 if delta else 0.0
        errors = (entries.wrong / (places + entries.wrong)).cummin(0).values
    return entries.loss(errors.sum(), -errors, errors)


def _rank_sort(
    logits: Tensor, labels: Tensor, quality: Tensor, delta: float, bucketed: bool
) -> Tensor:
    logits = at_least_float32(logits)
    if not bool((labels < logits.size(1)).any()):
        return logits[:0].sum()
    entries = _Entries(logits, labels, delta, bucketed)
    scores, wrong = entries.positives, entries.wrong
    ranking = wrong / (_step_sums(scores, delta) + wrong)
    if quality.shape != scores.shape:
        raise ValueError(
            f'rank_sort_loss: quality must have shape ({len(scores)},), one value per '
            f'positive, got {tuple(quality.shape)}'
        )
    quality = quality.detach().to(scores)
    # It comes in the order of the rows, the entries are sorted by score.
    quality = quality[entries.index.argsort().argsort()]
    defect, update, total = 1 - quality, -ranking, ranking.sum()
    step = max(1, _PAIRS // len(scores))
    for own in range(0, len(scores), step):
        rows = slice(own, own + step)
        before = _step(scores - scores[rows].unsqueeze(1), delta)
        # Those of its quality or better may stay before a positive.
        stays = before * (quality >= quality[rows].unsqueeze(1))
        before -= stays
        moves, kept = before.sum(1), stays.sum(1)
        target = stays @ defect / kept
        current = (stays @ defect + before @ defect) / (kept + moves)
        sorting = (current - target) * (moves > 0)
        update[rows] -= sorting
        share = sorting / moves.clamp(min=torch.finfo(moves.dtype).tiny)
        update += share @ before
        total = total + sorting.sum()
    return entries.loss(total, update, ranking)


def ap_loss(logits: Tensor, labels: Tensor, delta: float = 1.0) -> Tensor:
    """AP Loss: one minus the interpolated AP of all entries together.

    A positive i with the rank ``r_i``, in which it counts 1 itself, has the error
    ``sum_j H(s_j - s_i) / r_i`` over the negatives j. From the lowest positive up, the
    errors may not grow: a row of pairs is scaled down where they would.

    Args:
        logits: (N, C) tensor.
        labels: (N,) tensor: 0..C-1 foreground, C background.
        delta: Half the width of the soft step.

    Returns:
        The mean over the positives; 0 with zero gradient without any.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[3.0], [0.0]], requires_grad=True)
        >>> loss = ap_loss(logits, torch.tensor([1, 0]))  # the second row is positive
        >>> loss.backward()
        >>> loss.item(), logits.grad.tolist()
        (0.5, [[0.5], [-0.5]])
    """
    return _ap(logits, labels, delta, bucketed=False)


def bucketed_ap_loss(logits: Tensor, labels: Tensor, delta: float = 1.0) -> Tensor:
    """Bucketed AP Loss: the negatives between two positives have their mean score.

    As its authors define it, it also differs from :func:`ap_loss` in two points: it has
    no interpolation, and a positive counts ``H(0)`` in its own rank. Arguments and
    result are those of :func:`ap_loss`.
    """
    return _ap(logits, labels, delta, bucketed=True)


def rank_sort_loss(
    logits: Tensor, labels: Tensor, quality: Tensor, delta: float = 0.5
) -> Tensor:
    """RS Loss: rank positives above negatives, and sort them by quality.

    To the ranking error of a positive i, without interpolation, comes its sorting
    error: the mean of ``1 - quality`` over the positives that are before i (weighted
    by ``H``), less the same mean over those of them whose quality is at least that of
    i. The others of them are blamed for it.

    Args:
        logits: (N, C) tensor.
        labels: (N,) tensor: 0..C-1 foreground, C background.
        quality: (P,) quality of each positive in [0, 1], such as the overlap of its
            box, in the order of the rows.
        delta: Half the width of the soft step.

    Returns:
        The mean over the positives; 0 with zero gradient without any.
    """
    return _rank_sort(logits, labels, quality, delta, bucketed=False)


def bucketed_rank_sort_loss(
    logits: Tensor, labels: Tensor, quality: Tensor, delta: float = 0.5
) -> Tensor:
    """Bucketed RS Loss: :func:`rank_sort_loss` with the negatives of bucketed AP Loss.

    Arguments and result are those of :func:`rank_sort_loss`.
    """
    return _rank_sort(logits, labels, quality, delta, bucketed=True)
