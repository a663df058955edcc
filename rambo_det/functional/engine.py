"""Average precision and its blackbox gradient, for many sequences at once.

Only the positives of a sequence are perturbed, and a negative's rank changes only by
the positives that pass it. So nothing but the positives is sorted; all that a ranking
needs of a negative is how many positives lie above it, before and after. Negatives
below every positive of their sequence have no part in either and are dropped by one
comparison.

Most of the others need no search: scores are cut into bins, and a negative and a
positive in different bins are in the order of their bins. The bins of a sequence are
its cells; cells are numbered through all sequences, the highest scores first. A table
with the number of positives above each cell answers for all negatives but the few that
share a cell with a positive; these are found among the positives by binary search. The
bins save time and never change a result. ``docs/algorithm.md`` derives all this with an
example.

Order everywhere: score descending, then negatives before positives, then index.
"""

from typing import Any, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import representable
from .sequences import Ranking, View, true_indices


class _Placed(NamedTuple):
    """Where positives and negatives stand.

    The positives of a sequence, highest first, leave a gap above each and one below the
    last; gaps are numbered through all sequences.
    """

    gap: Tensor  # (P,) the gap right above each positive
    among: Tensor  # (P,) its rank among the positives of the sequence, 1 = highest
    overall: Tensor  # (P,) its rank among all entries of the sequence
    gaps: Tensor  # (cells,) the gap into which the negatives of a cell fall
    searched: Tensor  # (cells,) whether these were searched for instead
    near: Tensor  # (s,) the numbers of the negatives that were
    near_gap: Tensor  # (s,) the gaps into which they fall


def _take(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]``, several times faster for a long index."""
    return values.index_select(0, index)


def _sums(values: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Sums of ``values`` from ``first`` to ``last``, both included."""
    up_to = values.cumsum(0)
    return _take(up_to, last) - _take(up_to, first) + _take(values, first)


def _order_keys(ids: Tensor, scores: Tensor, reference: Optional[Tensor]) -> Tensor:
    """Integers that put entries in order: by sequence, then score descending.

    A float32 score fits beside its sequence; for others ``reference`` has the negated
    scores of all positives, ascending.
    """
    keys = -scores
    if reference is not None:
        # Only the order relative to the positives matters.
        return torch.searchsorted(reference, keys) + ids * (len(reference) + 1)
    # The bits of a float are in order like integers; those of negative ones, inverted.
    # Adding 0 turns -0 into +0.
    bits = keys.add_(0.0).view(torch.int32)
    return (ids << 32) + (bits ^ ((bits >> 31) & 0x7FFFFFFF))


class _Solver:
    """Algorithm 1 on the sequences of all rankings at once.

    Sequences are numbered through all rankings, and so are positives and the negatives
    that are not dropped: an entry that two rankings share appears twice.
    """

    def __init__(
        self,
        scores: Tensor,
        positives: Tensor,
        exists: Optional[Tensor],
        rankings: Sequence[Ranking],
        margin: float = 0.0,
    ) -> None:
        scores = scores.detach().contiguous()
        self.views = [View(scores, positives, exists, of, margin) for of in rankings]
        self.sizes = [view.num_sequences for view in self.views]
        lambds = [representable(of.lambd, scores.dtype) for of in rankings]
        self.lambd = self.spread(scores, lambds)
        self.scores = torch.cat([view.scores_of_positives for view in self.views])
        self.positives = torch.cat([view.positives for view in self.views])
        first = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        self.ids = torch.cat([view.ids + at for view, at in zip(self.views, first)])
        self.places = torch.arange(len(self.ids), device=scores.device)
        self.counts = torch.bincount(self.ids, minlength=sum(self.sizes))
        # A sequence with k positives has k + 1 gaps.
        numbers = torch.arange(len(self.counts), device=scores.device)
        self.last_gap = self.counts.cumsum(0) + numbers
        self.first_gaps = _take(self.last_gap - self.counts, self.ids)
        self.num_gaps = len(self.ids) + len(numbers)
        self.bin_negatives(numbers)

    def spread(self, like: Tensor, values: Iterable[float]) -> Tensor:
        """Give each sequence the value of its ranking, (S,)."""
        pairs = zip(self.sizes, values)
        return torch.cat([like.new_full((size,), value) for size, value in pairs])

    def bin_negatives(self, numbers: Tensor) -> None:
        """Find the negatives that are not dropped and their cells."""
        finite = self.scores.nan_to_num(0.0, 1e30, -1e30)
        if not len(finite):
            finite = finite.new_zeros(1)
        self.low, self.high = finite.min(), finite.max()
        unit = 1 / (self.low - self.high).clamp(max=-1e-30)  # negative: from the top
        entries, cells, bins, num_cells = [], [], [], 0
        for view in self.views:
            index = view.relevant_negatives()
            count = view.num_bins(len(index))
            cell = self.bin_numbers(view.scores_of(index, 1), unit * (count - 1))
            cell.add_(view.sequence_of(index).int(), alpha=count).add_(num_cells)
            entries.append(index)
            cells.append(cell)
            bins.append(count)
            num_cells += count * view.num_sequences
        self.entries, self.cell = torch.cat(entries), torch.cat(cells)
        self.histogram = torch.bincount(self.cell, minlength=num_cells)
        count_of = self.spread(numbers, bins)
        self.sequence = numbers.repeat_interleave(count_of, output_size=num_cells)
        self.first_cells = _take(count_of.cumsum(0) - count_of, self.ids)
        self.scales = _take(unit * (count_of - 1).to(unit.dtype), self.ids)

    def bin_numbers(self, scores: Tensor, scale: Tensor) -> Tensor:
        """Return the bins of scores, int32, 0 = highest; the scores are overwritten."""
        # Every step keeps the order, also where it rounds. (nan_to_num: whoever
        # switched the check for NaN off shall at least not crash.)
        scores.clamp_(self.low, self.high).sub_(self.high).mul_(scale)
        return scores.nan_to_num_(0.0).int()

    def place(self, scores: Tensor, searched: Optional[Tensor] = None) -> _Placed:
        """Place the positives, given their scores, and the negatives among them.

        Negatives in the cells ``searched`` are searched for in any case.
        """
        # Sort the positives.
        single = scores.dtype == torch.float32
        reference = None if single else torch.sort(-scores).values
        keys, order = torch.sort(_order_keys(self.ids, scores, reference), stable=True)
        gap = torch.empty_like(order).scatter_(0, order, self.places).add_(self.ids)
        among = gap - self.first_gaps + 1
        # A table has the gaps of the negatives in cells without a positive.
        cell = self.bin_numbers(scores.clone(), self.scales) + self.first_cells
        table = torch.bincount(cell, minlength=len(self.sequence))
        gaps = table.cumsum(0) + self.sequence
        # Search the others.
        searched = table > 0 if searched is None else searched | (table > 0)
        near = true_indices(_take(searched, self.cell))
        ids = _take(self.sequence, _take(self.cell, near))
        near_scores = self.views[0].scores_of(_take(self.entries, near), 1)
        near_keys = _order_keys(ids, near_scores, reference)
        near_gap = torch.searchsorted(keys, near_keys).add_(ids)
        # Count the negatives from the top of the sequence to each positive.
        inside = torch.bincount(near_gap, minlength=self.num_gaps)
        overall = among + _sums(inside, self.first_gaps, gap)
        unsearched = self.histogram.masked_fill(searched, 0)
        overall += _sums(unsearched, self.first_cells, cell)
        return _Placed(gap, among, overall, gaps, searched, near, near_gap)

    def average_precision(self, placed: _Placed) -> Tensor:
        """AP of each sequence, (S,); NaN without positives."""
        # In float64: a sum of a million terms in float32 is wrong in the fourth digit.
        precision = placed.among.double() / placed.overall.double()
        total = precision.new_zeros(len(self.counts))
        return total.index_add_(0, self.ids, precision) / self.counts

    def passage(self, before: _Placed, after: _Placed) -> Tuple[Tensor, ...]:
        """Put the gaps of the negatives, before and after, into tables.

        These have a place for each cell and then one for each negative that was
        searched for in the end. Returns both, the sequence of each place and the place
        (m,) of each negative, which replaces its cell.
        """
        cell = _take(self.cell, after.near)
        old = _take(before.gaps, cell)
        old.masked_scatter_(_take(before.searched, cell), before.near_gap)
        num_cells = len(self.sequence)
        own = torch.arange(num_cells, num_cells + len(cell), device=cell.device)
        return (
            torch.cat([before.gaps, old]),
            torch.cat([after.gaps, after.near_gap]),
            torch.cat([self.sequence, _take(self.sequence, cell)]),
            self.cell.index_copy_(0, after.near, own.int()),
        )

    def move_together(self, before: _Placed) -> Tuple[Tensor, ...]:
        """Algorithm 1 on the ranking of a sequence: all positives move at once.

        Returns, as :meth:`move_singly` does, the gradient of ``1 - AP`` for positives
        (P,) and for the places of :meth:`passage`, and their sequences and negatives.
        """
        # lambd * dL / d(rank / n), as n * rk+ / (P * rk^2). In floating point: the
        # product in the denominator can exceed int64.
        dtype = self.scores.dtype
        lengths = torch.cat([view.lengths() for view in self.views])
        step = lengths.to(dtype) * self.lambd
        rank = before.overall.to(dtype)
        rise = _take(step, self.ids) * before.among.to(dtype)
        rise /= _take(self.counts.to(dtype), self.ids) * rank * rank
        rise.clamp_(max=torch.finfo(dtype).max)  # -inf + inf has no rank
        after = self.place(self.scores + rise, before.searched)
        rewards = (after.overall - before.overall).to(dtype) / _take(step, self.ids)
        old, new, sequence, place = self.passage(before, after)
        return rewards, (new - old).to(dtype) / _take(step, sequence), sequence, place

    def move_singly(self, before: _Placed) -> Tuple[Tensor, ...]:
        """Algorithm 1 on the rank of each positive among the negatives, on its own."""
        dtype = self.scores.dtype
        top = self.lambd == float('inf')
        after, now = before, before.among
        if any(view.ranking.lambd < float('inf') for view in self.views):
            rise = _take(self.lambd, self.ids)
            after = self.place(self.scores + rise, before.searched)
            # Each has moved alone: its rank among the positives is the old one.
            moved = after.overall - after.among + before.among
            now = torch.where(_take(top, self.ids), now, moved)
        old, new, sequence, place = self.passage(before, after)
        # At the top, all negatives stand below all positives of their sequence.
        new.clamp_(min=_take(self.last_gap * top, sequence))
        among, rank = before.among.to(dtype), before.overall.to(dtype)
        gain = (among / now.to(dtype) - among / rank).clamp_(min=0)
        gain /= _take(self.counts.to(dtype), self.ids)
        # Each negative that a positive has passed bears an equal part of its gain.
        part = gain / (before.overall - now).clamp(min=1).to(dtype)
        above = torch.zeros(self.num_gaps, dtype=torch.double, device=part.device)
        above = above.index_copy_(0, before.gap + 1, part.double()).cumsum_(0)
        values = (_take(above, new) - _take(above, old)).to(dtype)
        return gain.neg(), values, sequence, place


class _SequenceAPLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, solver: _Solver, together: bool) -> Tensor:
        before = solver.place(solver.scores)
        if ctx.needs_input_grad[0]:
            move = solver.move_together if together else solver.move_singly
            positives = solver.positives, solver.ids
            ctx.save_for_backward(*positives, solver.entries, *move(before))
        ctx.shape = scores.shape
        loss = 1 - solver.average_precision(before)
        return torch.where(solver.counts > 0, loss, 0.0).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        positives, ids, entries, rewards, values, sequence, place = ctx.saved_tensors
        result = grad.new_zeros(ctx.shape)
        flat = result.view(-1)
        flat.index_add_(0, positives, rewards * _take(grad, ids))
        flat.index_add_(0, entries, _take(_take(grad, sequence) * values, place))
        return result, None, None


def sequence_ap_loss(
    scores: Tensor,
    positives: Tensor,
    exists: Optional[Tensor],
    rankings: Sequence[Ranking],
    margin: float = 0.0,
    together: bool = True,
) -> List[Tuple[Tensor, Tensor]]:
    """``1 - AP`` of each sequence of each ranking, with the blackbox gradient.

    ``scores`` (N, C) are float32 or float64, ``positives`` (P,) flat indices,
    ascending. ``exists`` (N, C) or (N, 1) is False where an entry is in no sequence, or
    ``None``; positives must exist. With ``together`` all positives of a sequence are
    perturbed at once. Returns for each ranking the losses (S,), and (S,) True where
    there is a positive.
    """
    solver = _Solver(scores, positives, exists, rankings, margin)
    losses = _SequenceAPLoss.apply(scores, solver, together).split(solver.sizes)
    return list(zip(losses, (solver.counts > 0).split(solver.sizes)))


def sequence_average_precision(
    scores: Tensor, positives: Tensor, exists: Optional[Tensor], ranking: Ranking
) -> Tensor:
    """Exact AP of each sequence of a ranking, (S,); NaN without positives."""
    solver = _Solver(scores, positives, exists, [ranking])
    return solver.average_precision(solver.place(solver.scores)).to(scores.dtype)
