"""Average precision and its blackbox gradient, for many sequences at once.

Only the positives of a sequence are perturbed, and a negative's rank changes only by
the positives that pass it. So nothing but the positives is sorted; all that a ranking
needs of a negative is how many positives lie above it, before and after. Negatives
below every positive of their sequence have no part in either and are dropped by one
comparison.

Most of the others need no search: scores are cut into bins, in which a negative and a
positive of different bins are ordered by their bins alone. A table with the number of
positives above each bin answers for all negatives but the few that share a bin with a
positive; these are found among the positives by binary search. The bins save time and
never change a result. ``docs/algorithm.md`` derives all this with an example.

Order everywhere: score descending, then negatives before positives, then index.
"""

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import representable
from .sequences import Ranking, View, true_indices


class _Placed(NamedTuple):
    """The positives, sorted and binned.

    The positives of a sequence, highest first, leave a gap above each and one below the
    last; gaps are numbered through all sequences.
    """

    reference: Optional[Tensor]  # see _order_keys
    keys: Tensor  # (P,) order keys, ascending
    gap: Tensor  # (P,) number of the gap right above each positive
    among: Tensor  # (P,) rank among the positives of the sequence, 1 = highest
    cell: Tensor  # (P,) see _Negatives
    gaps: Tensor  # (cells,) gap into which the negatives of an unshared cell fall
    shared: Tensor  # (cells,) whether there is a positive in the cell


class _Negatives(NamedTuple):
    """The negatives that may rank above a positive of their sequence."""

    entries: Tensor  # (m,) flat indices into the score matrix
    cell: Tensor  # (m,) int32 number of the bin, through all sequences
    histogram: Tensor  # (cells,) number of negatives


class _Gradient(NamedTuple):
    """The gradient of ``1 - AP`` of every sequence with respect to its scores."""

    rewards: Tensor  # (P,) of the positives
    entries: Tensor  # (m,) flat indices of negatives
    cell: Tensor  # (m,) their cells
    values: Tensor  # (cells,) of the negatives in a cell, but
    near: Tensor  # (s,) for the negatives with these numbers
    near_values: Tensor  # (s,) it is this
    sequence: Tensor  # (cells,) sequence of each cell


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
    """Algorithm 1 on the sequences of all views at once.

    Sequences are numbered through all views, and so are positives and negatives: an
    entry that two views rank appears twice.
    """

    def __init__(self, views: List[View], together: bool) -> None:
        self.views = views
        self.together = together
        self.flat = views[0].whole
        device = self.flat.device
        self.scores = torch.cat([view.scores_of_positives for view in views])
        self.positives = torch.cat([view.positives for view in views])
        self.sizes = [view.num_sequences for view in views]
        self.num_sequences = sum(self.sizes)
        starts = [sum(self.sizes[:number]) for number in range(len(views))]
        self.ids = torch.cat([view.ids + at for view, at in zip(views, starts)])
        self.counts = torch.bincount(self.ids, minlength=self.num_sequences)
        # A sequence with k positives has k + 1 gaps.
        self.numbers = torch.arange(self.num_sequences, device=device)
        self.up_to = self.counts.cumsum(0)
        self.first_gap = self.up_to - self.counts + self.numbers
        self.first_gaps = self.first_gap.index_select(0, self.ids)
        self.before_first = self.first_gaps - 1
        self.places = torch.arange(self.ids.numel(), device=device)

    def bin_negatives(self) -> _Negatives:
        """Cut the scores into bins; find the relevant negatives and bin them."""
        finite = self.scores.nan_to_num(0.0, 1e30, -1e30)
        if not len(finite):
            finite = self.flat.new_zeros(1)
        self.low, self.high = finite.min(), finite.max()
        entries, cells, bins, num_cells = [], [], [], 0
        unit = 1 / (self.high - self.low).clamp(min=1e-30)
        for view in self.views:
            index = view.relevant_negatives()
            count = view.num_bins(index.numel())
            cell = self.bin_numbers(view.scores_of(index, 1), unit * (count - 1))
            ids = view.sequence_of(index)
            cell += num_cells if ids is None else (ids * count).add_(num_cells)
            entries.append(index)
            cells.append(cell)
            bins.append(self.numbers.new_full((view.num_sequences,), count))
            num_cells += count * view.num_sequences
        per_sequence = torch.cat(bins)
        end = per_sequence.cumsum(0)
        self.num_cells = num_cells
        self.sequence = self.numbers.repeat_interleave(
            per_sequence, output_size=num_cells
        )
        self.gap_of_none = (self.first_gap + self.up_to).index_select(0, self.sequence)
        self.last_cells = (end - 1).index_select(0, self.ids)
        per_positive = per_sequence.index_select(0, self.ids)
        self.first_cells = self.last_cells + 1 - per_positive
        self.scales = unit * (per_positive - 1).to(unit.dtype)
        cell = torch.cat(cells)
        histogram = torch.bincount(cell, minlength=num_cells)
        return _Negatives(torch.cat(entries), cell, histogram)

    def bin_numbers(self, scores: Tensor, scale: Tensor) -> Tensor:
        """Return the bins of scores, int32; the scores are overwritten."""
        # Every step keeps the order, also where it rounds. (nan_to_num: whoever
        # switched the check for NaN off shall at least not crash.)
        scores.clamp_(self.low, self.high).sub_(self.low).mul_(scale)
        return scores.nan_to_num_(0.0).int()

    def place(self, scores: Tensor) -> _Placed:
        """Sort and bin the positives, given their scores."""
        reference = None
        if scores.dtype != torch.float32:
            reference = torch.sort(-scores).values
        keys = _order_keys(self.ids, scores, reference)
        keys, order = torch.sort(keys, stable=True)
        gap = torch.empty_like(order).scatter_(0, order, self.places).add_(self.ids)
        among = gap - self.before_first
        cell = self.bin_numbers(scores.clone(), self.scales) + self.first_cells
        table = torch.bincount(cell, minlength=self.num_cells)
        gaps = self.gap_of_none - table.cumsum(0)
        return _Placed(reference, keys, gap, among, cell, gaps, table > 0)

    def search(self, placed: _Placed, negatives: _Negatives, near: Tensor) -> Tensor:
        """Return the gaps into which the negatives number ``near`` fall."""
        entries = negatives.entries.index_select(0, near)
        cell = negatives.cell.index_select(0, near)
        ids = self.sequence.index_select(0, cell)
        scores = self.views[0].scores_of(entries, 1)
        keys = _order_keys(ids, scores, placed.reference)
        return torch.searchsorted(placed.keys, keys).add_(ids)

    def overall(
        self, placed: _Placed, histogram: Tensor, gap: Tensor, searched: Tensor
    ) -> Tensor:
        """Return the rank of each positive among all entries of its sequence.

        Where the negatives of a cell were ``searched`` for, their gaps are in ``gap``.
        """
        up_to = (histogram * ~searched).cumsum(0)
        rank = up_to.index_select(0, self.last_cells)
        rank -= up_to.index_select(0, placed.cell)
        num_gaps = self.ids.numel() + self.num_sequences
        before = torch.bincount(gap + 1, minlength=num_gaps + 1).cumsum(0)
        rank += before.index_select(0, placed.gap + 1)
        rank -= before.index_select(0, self.first_gaps)
        return rank.add_(placed.among)

    def mean_precision(self, among: Tensor, overall: Tensor) -> Tensor:
        """Mean of ``rk+ / rk`` over the positives, (S,); NaN without positives.

        It is float64: a sum of a million terms in float32 is wrong in the fourth digit.
        """
        precision = among.double() / overall.double()
        total = precision.new_zeros(self.num_sequences)
        return total.index_add_(0, self.ids, precision) / self.counts

    def solve(self, with_gradient: bool) -> Tuple[Tensor, Optional[_Gradient]]:
        """Compute the AP of each sequence, (S,), and the gradient of ``1 - AP``."""
        negatives = self.bin_negatives()
        before = self.place(self.scores)
        near = true_indices(before.shared.index_select(0, negatives.cell))
        gap = self.search(before, negatives, near)
        overall = self.overall(before, negatives.histogram, gap, before.shared)
        average_precision = self.mean_precision(before.among, overall)
        if not with_gradient:
            return average_precision, None
        compare = self.move_together if self.together else self.move_singly
        rewards, values, near, near_values = compare(
            negatives, before, near, gap, overall
        )
        return average_precision, _Gradient(
            rewards,
            negatives.entries,
            negatives.cell,
            values,
            near,
            near_values,
            self.sequence,
        )

    def gaps_after(
        self,
        negatives: _Negatives,
        before: _Placed,
        gap: Tensor,
        after: _Placed,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find where negatives stand among the positives before and after a move.

        Returns the numbers (s,) of the negatives that share a cell with a positive
        before or after, their gaps (s,) before and after, and the new ranks (P,).
        """
        shared = before.shared | after.shared
        near = true_indices(shared.index_select(0, negatives.cell))
        cell = negatives.cell.index_select(0, near)
        # Where they were not searched for before, the table knows.
        gap_before = before.gaps.index_select(0, cell)
        gap_before.masked_scatter_(before.shared.index_select(0, cell), gap)
        gap_after = self.search(after, negatives, near)
        overall = self.overall(after, negatives.histogram, gap_after, shared)
        return near, gap_before, gap_after, overall

    def lambd_of_sequences(self) -> Tensor:
        """Return λ of each sequence, (S,)."""
        dtype = self.flat.dtype
        return torch.cat(
            [
                self.flat.new_full(
                    (view.num_sequences,), representable(view.ranking.lambd, dtype)
                )
                for view in self.views
            ]
        )

    def move_together(
        self, negatives: _Negatives, before: _Placed, *found: Tensor
    ) -> Tuple[Tensor, ...]:
        """Algorithm 1 on the ranking of a sequence: all positives move at once.

        Takes the gaps of the negatives ``near``, which were searched for, and the ranks
        of the positives; returns ``rewards, values, near, near_values``.
        """
        # lambd * dL / d(rank / n), as n * rk+ / (P * rk^2). In floating point: the
        # product in the denominator can exceed int64.
        _, gap, overall = found
        dtype = self.flat.dtype
        lengths = torch.cat([view.lengths() for view in self.views])
        step = lengths.to(dtype) * self.lambd_of_sequences()
        steps = step.index_select(0, self.ids)
        rank = overall.to(dtype)
        rise = steps * before.among.to(dtype)
        rise /= self.counts.to(dtype).index_select(0, self.ids) * rank * rank
        rise.clamp_(max=torch.finfo(dtype).max)  # -inf + inf has no rank
        after = self.place(self.scores + rise)
        near, gap_before, gap_after, now = self.gaps_after(
            negatives, before, gap, after
        )
        rewards = (overall - now).to(dtype).neg_().div_(steps)
        step = step.index_select(0, self.sequence)  # of each cell
        values = (after.gaps - before.gaps).to(dtype) / step
        cell = negatives.cell.index_select(0, near)
        near_values = (gap_after - gap_before).to(dtype) / step.index_select(0, cell)
        return rewards, values, near, near_values

    def move_singly(
        self, negatives: _Negatives, before: _Placed, *found: Tensor
    ) -> Tuple[Tensor, ...]:
        """Algorithm 1 on the rank of each positive among the negatives, on its own."""
        near, gap, overall = found
        dtype = self.flat.dtype
        now, gap_before = before.among, gap
        # Above all negatives, which then stand below all positives of their sequence.
        gaps_after = (self.first_gap + self.counts).index_select(0, self.sequence)
        gap_after = gaps_after.index_select(0, negatives.cell.index_select(0, near))
        if any(view.ranking.lambd < float('inf') for view in self.views):
            lambd = self.lambd_of_sequences()
            after = self.place(self.scores + lambd.index_select(0, self.ids))
            top = lambd.isinf()
            near, gap_before, gap_after, rank = self.gaps_after(
                negatives, before, gap, after
            )
            cell = negatives.cell.index_select(0, near)
            tops = top.index_select(0, self.sequence)  # of each cell
            gap_after = torch.where(
                tops.index_select(0, cell), gaps_after.index_select(0, cell), gap_after
            )
            gaps_after = torch.where(tops, gaps_after, after.gaps)
            # Each has moved alone, so that its rank among the positives is the old one.
            moved = rank - after.among + before.among
            now = torch.where(top.index_select(0, self.ids), now, moved)
        among, rank = before.among.to(dtype), overall.to(dtype)
        gain = (among / now.to(dtype) - among / rank).clamp_(min=0)
        gain /= self.counts.to(dtype).index_select(0, self.ids)
        # Each negative that a positive has passed bears an equal part of its gain.
        part = (gain / (overall - now).clamp(min=1).to(dtype)).double()
        num_gaps = self.ids.numel() + self.num_sequences
        above = part.new_zeros(num_gaps + 1)
        above = above.index_copy_(0, before.gap + 1, part).cumsum_(0)

        def passed(old: Tensor, new: Tensor) -> Tensor:
            total = above.index_select(0, new) - above.index_select(0, old)
            return total.to(dtype)

        values = passed(before.gaps, gaps_after)
        return gain.neg(), values, near, passed(gap_before, gap_after)


class _SequenceAPLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, solver: _Solver) -> Tensor:
        average_precision, gradient = solver.solve(ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(solver.positives, solver.ids, *gradient)
        ctx.shape = scores.shape
        loss = torch.where(solver.counts > 0, 1 - average_precision, 0.0)
        return loss.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        positives, ids, *saved = ctx.saved_tensors
        gradient = _Gradient(*saved)
        result = grad.new_zeros(ctx.shape)
        flat = result.view(-1)
        flat.index_add_(0, positives, gradient.rewards * grad.index_select(0, ids))
        weight = grad.index_select(0, gradient.sequence)  # of each cell
        values = (weight * gradient.values).index_select(0, gradient.cell)
        weight = weight.index_select(0, gradient.cell.index_select(0, gradient.near))
        values.index_copy_(0, gradient.near, weight.mul_(gradient.near_values))
        flat.index_add_(0, gradient.entries, values)
        return result, None


def sequence_ap_loss(
    scores: Tensor,
    positives: Tensor,
    exists: Optional[Tensor],
    rankings: Sequence[Ranking],
    margin: float = 0.0,
    together: bool = True,
) -> List[Tuple[Tensor, Tensor]]:
    """``1 - AP`` of each sequence of each ranking, with the blackbox gradient.

    Args:
        scores: (N, C) tensor, float32 or float64.
        positives: (P,) flat indices of the positives, ascending.
        exists: bool tensor (N, C) or (N, 1), False where an entry is in no sequence;
            ``None`` means that all exist. Positives must exist.
        rankings: What is ranked.
        margin: Positives are lowered and negatives raised by half of it.
        together: Whether all positives of a sequence are perturbed at once.

    Returns:
        For each ranking the losses (S,), and (S,) True where there is a positive.
    """
    solver = _solver(scores, positives, exists, rankings, margin, together)
    losses = _SequenceAPLoss.apply(scores, solver).split(solver.sizes)
    return list(zip(losses, (solver.counts > 0).split(solver.sizes)))


def sequence_average_precision(
    scores: Tensor, positives: Tensor, exists: Optional[Tensor], ranking: Ranking
) -> Tensor:
    """Exact AP of each sequence of a ranking, (S,); NaN without positives."""
    solver = _solver(scores, positives, exists, [ranking], 0.0)
    return solver.solve(False)[0].to(scores.dtype)


def _solver(
    scores: Tensor,
    positives: Tensor,
    exists: Optional[Tensor],
    rankings: Sequence[Ranking],
    margin: float,
    together: bool = True,
) -> _Solver:
    scores = scores.detach().contiguous()
    views = [View(scores, positives, exists, ranking, margin) for ranking in rankings]
    return _Solver(views, together)
