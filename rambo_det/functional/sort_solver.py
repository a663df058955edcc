"""Average precision and its blackbox gradient by sorting, for accelerators.

The entries of all rankings are sorted at once, by integers that hold the sequence, the
score, and whether the entry is a positive. Ranks, precisions and gradients are running
sums in that order. Shares of a loss are fixed-point integers, so that sums are exact
and the same in every run, and no number of higher precision is needed. The host never
waits for the device. ``docs/algorithm.md`` shows all this with an example.

Order everywhere: score descending, then negatives before positives, then index.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .checks import representable
from .sequences import Ranking

# A key is sequence * SEQUENCE + 2 * score + positive, the score as a signed integer of
# 32 bits. So the keys of a sequence are within HALF of its multiple.
SEQUENCE = 1 << 33
HALF = 1 << 32
MOST_SEQUENCES = 1 << 29
# 1 in fixed point. Sums of 1 / rank over a sequence are below 2^5.
ONE_BITS = 58


def _running_sums(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, … integers (M,), as (M + 1,).

    They may wrap around; their differences are right all the same.
    """
    return pad(values.cumsum(0), (1, 0))


class _Order:
    """M entries in S sequences, in the order of their keys.

    The code of an entry is its key with a score of 0.
    """

    def __init__(self, keys: Tensor, codes: Tensor, num_sequences: int) -> None:
        keys, self.entry = torch.sort(keys, stable=True)  # (M,) each place's entry
        self.codes = codes[self.entry]
        self.positive = self.codes & 1
        self.sequence = self.codes // SEQUENCE
        end = num_sequences * SEQUENCE
        bounds = torch.arange(-HALF, end, SEQUENCE, device=keys.device)
        edges = torch.searchsorted(keys, bounds)
        self.starts, self.ends = edges[:-1], edges[1:]  # (S,)
        above = _running_sums(self.positive)
        before = above[self.starts]
        self.counts = above[self.ends] - before  # (S,) positives
        self.among = above[1:] - before[self.sequence]  # (M,) positives down to here
        places = torch.arange(1, len(keys) + 1, device=keys.device)
        self.rank = places - self.starts[self.sequence]  # (M,)

    def below(self, values: Tensor) -> Tensor:
        """Sums of integers (M,) below each entry in its sequence, (M,)."""
        sums = _running_sums(values)
        return sums[self.ends][self.sequence] - sums[1:]

    def restore(self, values: Tensor) -> Tensor:
        """Put values (M,) back in the order before sorting."""
        return torch.empty_like(values).scatter_(0, self.entry, values)


class _Solver:
    """The entries of all rankings, one ranking after the other, and their order."""

    def __init__(
        self,
        scores: Tensor,
        positive: Tensor,
        exists: Optional[Tensor],
        rankings: Sequence[Ranking],
    ) -> None:
        missing = None if exists is None else ~exists
        widths = [scores.size(1) if r.per_class else 1 for r in rankings]
        sizes = [r.num_sequences(scores.size(1)) for r in rankings]
        # Entries that do not exist have a sequence of their own, the last.
        self.sizes, last = [*sizes, 1], sum(sizes)
        if last >= MOST_SEQUENCES:
            raise ValueError(
                f"solver='sort' ranks fewer than {MOST_SEQUENCES} sequences at once, "
                f'got {last}'
            )
        codes = []
        for number, (ranking, width) in enumerate(zip(rankings, widths)):
            first = sum(sizes[:number])
            sequence = torch.arange(first, first + width, device=scores.device)
            if ranking.groups is not None:
                sequence = torch.add(sequence, ranking.groups[:, None], alpha=width)
            code = torch.add(_rows(positive, ranking), sequence, alpha=SEQUENCE)
            if missing is not None:
                code.masked_fill_(_rows(missing, ranking), last * SEQUENCE)
            codes.append(code)
        self.rows = [len(code) for code in codes]
        self.lambds = [representable(r.lambd, scores.dtype) for r in rankings]
        self.codes = torch.cat(codes).view(-1)
        self.scores = torch.cat([_rows(scores, r) for r in rankings]).view(-1)
        self.order = self.sort(self.scores, self.codes)
        # (M,) 1 / rk of positives, and (S,) the number of positives or 1
        self.share = (self.order.positive << ONE_BITS) // self.order.rank
        self.divisor = self.order.counts.clamp(min=1).to(scores.dtype)

    def sort(
        self, scores: Tensor, codes: Tensor, at_top: Optional[Tensor] = None
    ) -> _Order:
        """Sort entries by their scores, those at the top above all others."""
        keys = torch.add(codes, _falling(scores), alpha=2)
        if at_top is not None:
            keys = torch.where(at_top, codes - HALF, keys)
        return _Order(keys, codes, sum(self.sizes))

    def lambd(self) -> Tensor:
        """λ of each sequence, (S,)."""
        pairs = zip(self.sizes, [*self.lambds, 1.0])
        return torch.cat([self.scores.new_full((n,), lambd) for n, lambd in pairs])

    def mean(self, numerators: Tensor) -> Tensor:
        """Mean of ``numerator / rk`` over the positives of each sequence, (S,).

        The numerators (M,) are at most ``rk``. Without positives it is 0.
        """
        # The sum of numbers up to 1 must stay below 2^63.
        bits = min(ONE_BITS, 63 - len(self.codes).bit_length())
        sums = _running_sums(self.share * numerators >> (ONE_BITS - bits))
        total = sums[self.order.ends] - sums[self.order.starts]
        return total / self.divisor * 2.0**-bits

    def move_together(self) -> Tensor:
        """Algorithm 1 on the ranking of a sequence: all positives move at once.

        Returns, as :meth:`move_singly` does, the gradient of ``1 - AP`` in the order of
        the entries before they moved, (M,).
        """
        # lambd * dL / d(rank / n), as n * rk+ / (P * rk^2). In floating point: the
        # product in the denominator can exceed int64.
        order, dtype = self.order, self.scores.dtype
        step = ((order.ends - order.starts).to(dtype) * self.lambd())[order.sequence]
        rank = order.rank.to(dtype)
        rise = step * order.among / (self.divisor[order.sequence] * rank * rank)
        rise.clamp_(max=torch.finfo(dtype).max)  # -inf + inf has no rank
        positive = (self.codes & 1).bool()
        moved = torch.where(positive, self.scores + order.restore(rise), self.scores)
        after = self.sort(moved, self.codes)
        return (after.restore(after.rank)[order.entry] - order.rank) / step

    def move_singly(self) -> Tensor:
        """Algorithm 1 on the rank of each positive among the negatives, on its own."""
        order, part = self.order, self.share
        positive = order.positive > 0
        # At the top, a positive has only positives above it, the same as before.
        now, after = order.among, None
        if min(self.lambds) < float('inf'):
            scores, lambd = self.scores[order.entry], self.lambd()[order.sequence]
            moved = torch.where(positive, scores + lambd, scores)
            after = self.sort(moved, order.codes, positive & lambd.isinf())
            now = now + after.restore(after.rank - after.among)
            part = part * order.among // now.clamp(min=1)
        # Each negative that a positive has passed bears an equal part of its gain.
        blame = order.below(part)
        if after is not None:
            blame -= after.restore(after.below(part[after.entry]))
        gradient = torch.where(positive, part * (now - order.rank), blame)
        return gradient / (self.divisor * 2.0**ONE_BITS)[order.sequence]


def _falling(scores: Tensor) -> Tensor:
    """Integers that fall as scores rise and are equal for equal scores."""
    negated = 0.0 - scores  # makes +0 of both zeros
    if scores.dtype == torch.float32:
        # The bits of floats are in order like integers; those of negative ones,
        # inverted.
        bits = negated.view(torch.int32)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)
    values, order = torch.sort(negated)
    place = pad(values[1:] != values[:-1], (1, 0))[: len(order)].cumsum(0)
    return torch.empty_like(order).scatter_(0, order, place)


def _rows(values: Tensor, ranking: Ranking) -> Tensor:
    """The rows that take part in a ranking."""
    count = ranking.num_rows
    if count is None or count >= len(values):
        return values
    return values.narrow(0, ranking.first_row, count)


class _SortAPLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, together: bool, *given: Any) -> Any:
        solver = _Solver(scores, *given)
        order = solver.order
        if ctx.needs_input_grad[0]:
            move = solver.move_together if together else solver.move_singly
            gradient = order.restore(move()).view(sum(solver.rows), scores.size(1))
            ctx.save_for_backward(*gradient.split(solver.rows))
        ctx.shape, ctx.rankings = scores.shape, given[-1]
        losses = solver.mean(order.rank - order.among).split(solver.sizes)[:-1]
        present = (order.counts > 0).split(solver.sizes)[:-1]
        ctx.mark_non_differentiable(*present)
        ctx.set_materialize_grads(False)
        return (*losses, *present)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        result = ctx.saved_tensors[0].new_zeros(ctx.shape)
        for ranking, grad, gradient in zip(ctx.rankings, grads, ctx.saved_tensors):
            if grad is not None:
                if ranking.groups is not None:
                    width = ctx.shape[1] if ranking.per_class else 1
                    grad = grad.view(-1, width)[ranking.groups]
                _rows(result, ranking).addcmul_(gradient, grad)
        return result, None, None, None, None


def sort_ap_loss(
    scores: Tensor,
    positive: Tensor,
    exists: Optional[Tensor],
    rankings: Sequence[Ranking],
    together: bool,
) -> List[Tuple[Tensor, Tensor]]:
    """``1 - AP`` of each sequence of each ranking, with the blackbox gradient.

    ``scores`` (N, C) are float32 or float64, ``positive`` (N, C) is a mask. ``exists``
    (N, C) or (N, 1) is False where an entry is in no sequence, or ``None``. With
    ``together`` all positives of a sequence are perturbed at once. Returns for each
    ranking the losses (S,), and (S,) True where there is a positive.
    """
    results = _SortAPLoss.apply(scores, together, positive, exists, rankings)
    return list(zip(results, results[len(rankings) :]))


def sort_average_precision(
    scores: Tensor, positive: Tensor, exists: Optional[Tensor], ranking: Ranking
) -> Tensor:
    """Exact AP of each sequence of a ranking, (S,); NaN without positives."""
    solver = _Solver(scores.detach(), positive, exists, [ranking])
    precision = solver.mean(solver.order.among)
    precision.masked_fill_(solver.order.counts == 0, float('nan'))
    return precision.split(solver.sizes)[0]
