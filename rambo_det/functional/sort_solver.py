"""Average precision and its blackbox gradient by sorting, for accelerators.

All sequences of all rankings are sorted at once, by integers that have the sequence in
their upper bits, then the score, and then whether the entry is a positive. Ranks,
precisions and gradients are cumulative sums in that order. Everything is an integer up
to the last step: the sums are exact and the same in every run, nothing needs float64,
and the host never waits for the device.

Shares of a loss are fixed-point numbers, multiples of ``2**-FRACTION``. Their running
sums may wrap around; differences of these are right all the same.

Order everywhere: score descending, then negatives before positives, then index.
"""

from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .checks import representable
from .sequences import Ranking

# A key: the sequence from this bit on, 32 bits for the score, 1 for positives.
SEQUENCE_BIT = 33
# The sum of 1 / rank over a sequence is below 2**5.
FRACTION = 58


def _running_sums(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, … values (M,), as (M + 1,)."""
    return pad(values.cumsum(0), (1, 0))


def _falling(scores: Tensor) -> Tensor:
    """Integers 0..2**32-1 that fall as scores rise and are equal for equal scores."""
    negated = 0.0 - scores  # makes +0 of both zeros
    if scores.dtype == torch.float32:
        # The bits of a float are in order like integers; those of negative ones,
        # inverted.
        bits = negated.view(torch.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + 2**31
    values, order = torch.sort(negated)
    distinct = (values[1:] != values[:-1]).cumsum(0)
    return torch.empty_like(order).scatter_(
        0, order, pad(distinct, (1, 0))[: len(order)]
    )


class _Sorted:
    """Entries in their order, sequence by sequence; ``M`` entries, ``S`` sequences."""

    def __init__(self, keys: Tensor, num_sequences: int) -> None:
        keys, self.order = torch.sort(keys, stable=True)
        self.sequence = keys >> SEQUENCE_BIT  # (M,)
        self.positive = keys & 1  # (M,)
        step = 1 << SEQUENCE_BIT
        bounds = torch.arange(0, (num_sequences + 1) * step, step, device=keys.device)
        self.edges = torch.searchsorted(keys, bounds)  # (S + 1,) where sequences begin
        above = _running_sums(self.positive)
        before = above[self.edges]
        self.counts = before.diff()  # (S,) positives
        # (M,) the number of positives down to the entry, and of all entries
        self.among = above[1:] - before[self.sequence]
        places = torch.arange(1, len(keys) + 1, device=keys.device)
        self.rank = places - self.edges[self.sequence]
        self.share = (self.positive << FRACTION) // self.rank

    def precisions(self) -> Tuple[Tensor, int]:
        """Sum of ``rk+ / rk`` of each sequence, (S,), and of how many bits is 1."""
        spare = max(len(self.order).bit_length() - (63 - FRACTION), 0)
        sums = _running_sums(self.share * self.among >> spare)
        return sums[self.edges].diff(), FRACTION - spare

    def below(self, values: Tensor) -> Tensor:
        """For each entry the sum of the values (M,) below it in its sequence."""
        sums = _running_sums(values)
        return sums[self.edges][1:][self.sequence] - sums[1:]

    def restore(self, values: Tensor) -> Tensor:
        """Put values (M,) back into the order of the entries."""
        return torch.empty_like(values).scatter_(0, self.order, values)


class _Problem:
    """The entries of all rankings, one ranking after the other, and their keys."""

    def __init__(
        self,
        scores: Tensor,
        positive: Tensor,
        exists: Optional[Tensor],
        rankings: Sequence[Ranking],
    ) -> None:
        columns = scores.size(1)
        self.sizes = [r.num_groups * (columns if r.per_class else 1) for r in rankings]
        self.rankings, self.total = rankings, sum(self.sizes)
        if self.total >> (62 - SEQUENCE_BIT):
            raise ValueError(
                f'the sort solver cannot rank {self.total} sequences at once; at most '
                f'{2 ** (62 - SEQUENCE_BIT) - 1}'
            )
        missing = None if exists is None else ~exists
        parts, codes, first = [], [], 0
        for ranking, size in zip(rankings, self.sizes):
            sequence = _sequences(ranking, columns, first, scores.device)
            part = _rows(positive, ranking)
            code = torch.add(part, sequence, alpha=1 << SEQUENCE_BIT)
            if missing is not None:
                # What is in no sequence has one of its own, the last.
                code.masked_fill_(_rows(missing, ranking), self.total << SEQUENCE_BIT)
            parts.append(_rows(scores, ranking).reshape(-1))
            codes.append(code.reshape(-1))
            first += size
        self.lengths = [len(part) for part in parts]
        self.scores, self.codes = torch.cat(parts), torch.cat(codes)

    def sort(self, scores: Tensor, at_top: Optional[Tensor] = None) -> _Sorted:
        """Sort the entries by scores (M,), those at the top above all others."""
        keys = torch.add(self.codes, _falling(scores), alpha=2)
        if at_top is not None:
            keys = torch.where(at_top, self.codes, keys)
        return _Sorted(keys, self.total + 1)

    def spread(self, lengths: Sequence[int]) -> Union[float, Tensor]:
        """Repeat λ of each ranking; a number where it is the same for all."""
        lambds = [representable(r.lambd, self.scores.dtype) for r in self.rankings]
        if len(set(lambds)) == 1:
            return lambds[0]
        pairs = zip(lengths, lambds)
        return torch.cat([self.scores.new_full((n,), lambd) for n, lambd in pairs])

    def move_together(self, before: _Sorted) -> Tuple[Tensor, Tensor]:
        """Algorithm 1 on the ranking of a sequence: all positives move at once.

        Returns, as :meth:`move_singly` does, the gradient of ``1 - AP`` for the entries
        (M,), in units that differ between sequences, and these (S,).
        """
        # lambd * dL / d(rank / n), as n * rk+ / (P * rk^2). In floating point: the
        # product in the denominator can exceed int64.
        dtype = self.scores.dtype
        lengths = before.edges.diff()[: self.total].clamp(min=1)
        step = lengths.to(dtype) * self.spread(self.sizes)
        step = pad(step, (0, 1), value=1.0)  # of entries that do not exist
        rank = before.rank.to(dtype)
        rise = step[before.sequence] * before.among
        rise /= before.counts.to(dtype)[before.sequence] * rank * rank
        rise.clamp_(max=torch.finfo(dtype).max)  # -inf + inf has no rank
        positive = (self.codes & 1).bool()
        moved = torch.where(positive, self.scores + before.restore(rise), self.scores)
        after = self.sort(moved)
        jump = after.restore(after.rank) - before.restore(before.rank)
        return jump.to(dtype), 1 / step

    def move_singly(self, before: _Sorted) -> Tuple[Tensor, Tensor]:
        """Algorithm 1 on the rank of each positive among the negatives, on its own."""
        # At the top, a positive has nothing but positives above it.
        now, after, part = before.among, None, before.share
        if any(ranking.lambd < float('inf') for ranking in self.rankings):
            after = self.sort(*self._moved_singly())
            # Each has moved alone: its rank among the positives is the old one.
            negatives = after.restore(after.rank - after.among)
            now = now + negatives[before.order]
            part = part * before.among // now.clamp(min=1)
        # Each negative that a positive has passed bears an equal part of its gain.
        gradient = before.restore(
            torch.where(
                before.positive > 0, part * (now - before.rank), before.below(part)
            )
        )
        if after is not None:
            not_passed = after.below(before.restore(part)[after.order])
            gradient -= after.restore(not_passed.masked_fill_(after.positive > 0, 0))
        unit = 2.0**-FRACTION / before.counts.clamp(min=1).to(self.scores.dtype)
        return gradient.to(self.scores.dtype), unit

    def _moved_singly(self) -> Tuple[Tensor, Optional[Tensor]]:
        """Scores of the entries with all positives moved, and which are at the top."""
        positive = (self.codes & 1).bool()
        lambd = self.spread(self.lengths)
        moved = torch.where(positive, self.scores + lambd, self.scores)
        if isinstance(lambd, Tensor):
            return moved, positive & lambd.isinf()
        return moved, None


def _rows(values: Tensor, ranking: Ranking) -> Tensor:
    """The rows that take part in a ranking."""
    count = ranking.num_rows
    if count is None or count >= len(values):
        return values
    return values.narrow(0, ranking.first_row, count)


def _sequences(
    ranking: Ranking, columns: int, first: int, device: torch.device
) -> Union[int, Tensor]:
    """The sequences of a ranking's entries, to be broadcast, numbered from first."""
    if not ranking.per_class:
        return first if ranking.groups is None else ranking.groups.unsqueeze(1) + first
    own = torch.arange(first, first + columns, device=device)
    if ranking.groups is None:
        return own
    return torch.add(own, ranking.groups.unsqueeze(1), alpha=columns)


class _SortAPLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, problem: _Problem, together: bool, order: _Sorted
    ) -> Tuple[Tensor, ...]:
        sizes = [*problem.sizes, 1]
        if ctx.needs_input_grad[0]:
            move = problem.move_together if together else problem.move_singly
            gradient, unit = move(order)
            ctx.save_for_backward(
                *gradient.split(problem.lengths), *unit.split(sizes)[:-1]
            )
        ctx.shape, ctx.rankings = scores.shape, problem.rankings
        # Without positives it is 0. The one subtraction is that of integers.
        sums, bits = order.precisions()
        lost = ((order.counts << bits) - sums).to(scores.dtype)
        losses = lost / order.counts.clamp(min=1) * 2.0**-bits
        return losses.split(sizes)[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        half = len(grads)
        gradients, units = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        result = grads[0].new_zeros(ctx.shape)
        for ranking, grad, gradient, unit in zip(ctx.rankings, grads, gradients, units):
            weight = (grad * unit).view(-1, ctx.shape[1] if ranking.per_class else 1)
            if ranking.groups is not None:
                weight = weight[ranking.groups]
            rows = _rows(result, ranking)
            rows.addcmul_(gradient.view(rows.shape), weight)
        return result, None, None, None


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
    problem = _Problem(scores.detach(), positive, exists, rankings)
    order = problem.sort(problem.scores)
    losses = _SortAPLoss.apply(scores, problem, together, order)
    present = (order.counts > 0).split([*problem.sizes, 1])
    return list(zip(losses, present))


def sort_average_precision(
    scores: Tensor, positive: Tensor, exists: Optional[Tensor], ranking: Ranking
) -> Tensor:
    """Exact AP of each sequence of a ranking, (S,); NaN without positives."""
    problem = _Problem(scores.detach(), positive, exists, [ranking])
    order = problem.sort(problem.scores)
    sums, bits = order.precisions()
    return (sums.to(scores.dtype) / order.counts * 2.0**-bits)[: problem.total]
