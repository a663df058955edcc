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


class Ranking(NamedTuple):
    """What is ranked against what in a score matrix (N, C).

    Attributes:
        lambd: λ of Algorithm 1.
        per_class: Whether each column is a sequence of its own (number ``group * C +
            column``), or all columns together are one (number ``group``).
        groups: (N,) int64 group 0..num_groups-1 of each row, such as its image: rows
            meet only within their group. ``None`` puts all rows in one.
        num_groups: Number of groups.
        num_rows: How many rows take part, the first ones; ``None`` means all.
    """

    lambd: float
    per_class: bool
    groups: Optional[Tensor] = None
    num_groups: int = 1
    num_rows: Optional[int] = None


class _Placed(NamedTuple):
    """The positives of a problem, sorted and binned.

    Attributes:
        keys: (P,) negated scores, ascending over all sequences.
        places: (P,) ``sequence * (P + 1) + place in keys``, ascending; ``None`` where
            there is one sequence.
        among: (P,) rank among the positives of the sequence, 1 = highest.
        cell: (P,) cell, see :class:`_Negatives`.
        above: (cells,) number of positives of the sequence in higher bins.
        shared: (cells,) whether there is a positive in the cell.
    """

    keys: Tensor
    places: Optional[Tensor]
    among: Tensor
    cell: Tensor
    above: Tensor
    shared: Tensor


class _Negatives(NamedTuple):
    """The negatives that may rank above a positive of their sequence.

    Attributes:
        entries: (m,) flat indices into the score matrix.
        cell: (m,) number ``sequence * bins + bin``.
        histogram: (sequences, bins) number of negatives.
    """

    entries: Tensor
    cell: Tensor
    histogram: Tensor


def _true_indices(mask: Tensor) -> Tensor:
    """Indices of the True entries of a 1-D mask."""
    if mask.device.type == 'cpu':
        try:  # NumPy does it several times faster than PyTorch, which can do without
            return torch.from_numpy(mask.numpy().nonzero()[0])
        except RuntimeError:
            pass
    return mask.nonzero().squeeze(1)


class _Problem:
    """One ranking of a score matrix: its sequences and their positives."""

    def __init__(
        self,
        scores: Tensor,
        positives: Tensor,
        exists: Optional[Tensor],
        ranking: Ranking,
        margin: float,
    ) -> None:
        self.scores = scores
        self.flat = scores.view(-1)
        self.positives = positives
        self.exists = exists
        self.ranking = ranking
        self.margin = margin
        self.num_cols = scores.size(1)
        self.num_sequences = ranking.num_groups * (
            self.num_cols if ranking.per_class else 1
        )
        ids = self.sequence_of(positives)
        self.ids = torch.zeros_like(positives) if ids is None else ids
        self.scores_of_positives = self.flat.index_select(0, positives) - margin / 2
        self.counts = torch.bincount(self.ids, minlength=self.num_sequences)
        self.start = self.counts.cumsum(0) - self.counts
        self.lengths = self._lengths()

    def sequence_of(self, index: Tensor) -> Optional[Tensor]:
        """Return the sequence of flat indices, or ``None`` if there is only one."""
        groups, num_cols = self.ranking.groups, self.num_cols
        if self.num_sequences == 1:
            return None
        if groups is None:
            return index % num_cols
        group = groups.index_select(
            0, torch.div(index, num_cols, rounding_mode='floor')
        )
        return group * num_cols + index % num_cols if self.ranking.per_class else group

    def scores_of(self, negatives: Tensor) -> Tensor:
        """Return the scores of negatives, margin applied, as a new tensor."""
        scores = self.flat.index_select(0, negatives)
        return scores.add_(self.margin / 2) if self.margin else scores

    def _lengths(self) -> Tensor:
        """Return the number of entries of each sequence, (S,)."""
        groups, exists = self.ranking.groups, self.exists
        per_class, num_rows = self.ranking.per_class, len(self.scores)
        width = 1 if per_class else self.num_cols
        if exists is None and groups is None:
            size = (self.num_sequences,)
            return torch.full(size, num_rows * width, device=self.flat.device)
        if exists is None:
            per_row = torch.full((num_rows, 1), width, device=self.flat.device)
        elif exists.size(1) == 1:
            per_row = exists * width
        else:
            per_row = exists.long() if per_class else exists.sum(1, keepdim=True)
        if groups is None:
            lengths = per_row.sum(0, keepdim=True)
        else:
            lengths = per_row.new_zeros((self.ranking.num_groups, per_row.size(1)))
            lengths.index_add_(0, groups, per_row)
        return lengths.expand(-1, self.num_cols if per_class else 1).reshape(-1)

    def relevant_negatives(self) -> Tensor:
        """Return flat indices of the negatives not below all positives of theirs."""
        floor = self.flat.new_full((self.num_sequences,), float('inf'))
        floor.scatter_reduce_(0, self.ids, self.scores_of_positives, 'amin')
        if self.margin:
            # Below what x + margin / 2 >= floor demands, however that rounds: one
            # negative too many does no harm.
            slack = 4 * torch.finfo(floor.dtype).eps
            floor = floor - self.margin / 2 - (floor.abs() + self.margin) * slack
            floor = floor.nan_to_num(float('inf'), float('inf'), float('-inf'))
        floor = floor.view(self.ranking.num_groups, -1)
        if self.ranking.groups is not None:
            floor = floor[self.ranking.groups]
        relevant = self.scores >= (floor.view(()) if floor.numel() == 1 else floor)
        if self.exists is not None:
            relevant &= self.exists
        relevant = relevant.view(-1)
        relevant[self.positives] = False
        return _true_indices(relevant)

    def choose_bins(self, num_negatives: int) -> None:
        """Choose the number of bins per sequence and the scores they cover."""
        # Few negatives should share a bin with a positive, but filling the tables
        # must cost less than it saves.
        wanted = min(64 * self.positives.numel(), num_negatives // 4, 2**18)
        self.bins = 1
        while 2 * self.bins * self.num_sequences <= wanted:
            self.bins *= 2
        finite = self.scores_of_positives.nan_to_num(0.0, 1e30, -1e30)
        self.low = finite.min() if len(finite) else self.flat.new_zeros(())
        high = finite.max() if len(finite) else self.low
        self.scale = self.bins / (high - self.low).clamp(min=1e-30)

    def cells(self, scores: Tensor, ids: Optional[Tensor]) -> Tensor:
        """Return the cells of scores, which are overwritten."""
        # Every step keeps the order, also where it rounds. (nan_to_num: whoever
        # switched the check for NaN off shall at least not crash.)
        scores.sub_(self.low).mul_(self.scale).clamp_(0, self.bins - 1)
        cell = scores.nan_to_num_(0.0).int()
        return cell if ids is None else ids * self.bins + cell

    def bin_negatives(self) -> _Negatives:
        """Find the relevant negatives and count them by cell."""
        index = self.relevant_negatives()
        self.choose_bins(index.numel())
        cell = self.cells(self.scores_of(index), self.sequence_of(index))
        histogram = torch.bincount(cell, minlength=self.num_sequences * self.bins)
        return _Negatives(index, cell, histogram.view(self.num_sequences, -1))

    def place(self, scores: Tensor) -> _Placed:
        """Sort and bin the positives, given their scores."""
        num_positives = scores.numel()
        order = torch.argsort(-scores, stable=True)
        keys = -scores.index_select(0, order)
        places = None
        if self.num_sequences > 1:
            ids = self.ids.index_select(0, order)
            by_sequence = torch.argsort(ids, stable=True)
            places = ids.index_select(0, by_sequence) * (num_positives + 1)
            places += by_sequence
            order = order.index_select(0, by_sequence)
        index = torch.arange(num_positives, device=order.device)
        among = torch.empty_like(order).scatter_(0, order, index)
        among -= self.start.index_select(0, self.ids) - 1
        cell = self.cells(scores.clone(), self.ids if self.num_sequences > 1 else None)
        table = torch.bincount(cell, minlength=self.num_sequences * self.bins)
        table = table.view(self.num_sequences, -1)
        above = self.counts.unsqueeze(1) - table.cumsum(1)
        return _Placed(keys, places, among, cell, above.view(-1), (table > 0).view(-1))

    def search(self, placed: _Placed, negatives: Tensor) -> Tensor:
        """Return how many positives of its sequence lie above each negative."""
        above = torch.searchsorted(placed.keys, -self.scores_of(negatives))
        ids = self.sequence_of(negatives)
        if placed.places is None or ids is None:
            return above
        # From the place among all positives to the one within the own sequence: a
        # second search, on integers that combine sequence and place.
        stride = placed.keys.numel() + 1
        within = torch.searchsorted(placed.places, ids * stride + above)
        return within - self.start.index_select(0, ids)

    def overall(
        self,
        placed: _Placed,
        histogram: Tensor,
        searched: Tensor,
        above: Tensor,
        by_table: Tensor,
    ) -> Tensor:
        """Return the rank of each positive among all entries of its sequence.

        Args:
            placed: The positives.
            histogram: (S, bins) number of negatives.
            searched: (s,) negatives that were searched for.
            above: (s,) number of positives above each of them.
            by_table: (cells,) whether the negatives of a cell were not searched for.
        """
        counted = histogram * by_table.view_as(histogram)
        higher = counted.sum(1, keepdim=True) - counted.cumsum(1)
        # The searched ones by gap between positives; a sequence with k positives has
        # k + 1 gaps, so its first gap is number start + (sequence number).
        ids = self.sequence_of(searched)
        num_gaps = self.positives.numel() + self.num_sequences
        first = self.start + torch.arange(self.num_sequences, device=above.device)
        gap = above if ids is None else above + first.index_select(0, ids)
        gaps = torch.bincount(gap, minlength=num_gaps).cumsum(0)
        first = first.index_select(0, self.ids)
        earlier = torch.cat([gaps.new_zeros(1), gaps]).index_select(0, first)
        not_below = gaps.index_select(0, first + placed.among - 1) - earlier
        return placed.among + higher.view(-1).index_select(0, placed.cell) + not_below

    def mean_precision(self, among: Tensor, overall: Tensor) -> Tensor:
        """Mean of ``rk+ / rk`` over the positives, (S,); NaN without positives."""
        precision = among.to(self.flat.dtype) / overall.to(self.flat.dtype)
        total = precision.new_zeros(self.num_sequences)
        return total.index_add_(0, self.ids, precision) / self.counts

    def solve(self, lambd: Optional[float]) -> Tuple[Tensor, Tensor, Tensor]:
        """Compute AP and the gradient of ``1 - AP``.

        Args:
            lambd: λ of Algorithm 1; ``None`` for AP without a gradient.

        Returns:
            Tuple of the AP of each sequence, (S,), and the flat indices and the values
            of the gradient.
        """
        negatives = self.bin_negatives()
        before = self.place(self.scores_of_positives)
        searched = negatives.entries.index_select(
            0, _true_indices(before.shared.index_select(0, negatives.cell))
        )
        above = self.search(before, searched)
        histogram = negatives.histogram
        overall = self.overall(before, histogram, searched, above, ~before.shared)
        average_precision = self.mean_precision(before.among, overall)
        if lambd is None:
            return average_precision, negatives.entries[:0], self.flat[:0]

        # lambd * dL / d(rank / n), as n * rk+ / (P * rk^2). In floating point: the
        # product in the denominator can exceed int64.
        dtype = self.flat.dtype
        length = self.lengths.to(dtype)
        rank = overall.to(dtype)
        rise = lambd * length.index_select(0, self.ids) * before.among.to(dtype)
        rise /= self.counts.to(dtype).index_select(0, self.ids) * rank * rank
        after = self.place(self.scores_of_positives + rise)

        shared = before.shared | after.shared
        near = _true_indices(shared.index_select(0, negatives.cell))
        searched = negatives.entries.index_select(0, near)
        cell = negatives.cell.index_select(0, near)
        # Where they were not searched for before, the table knows.
        above_before = before.above.index_select(0, cell)
        above_before.masked_scatter_(before.shared.index_select(0, cell), above)
        above = self.search(after, searched)
        climbed = overall - self.overall(after, histogram, searched, above, ~shared)
        passed_by = above - above_before

        step = lambd * length
        table = (after.above - before.above).to(dtype).view(self.num_sequences, -1)
        table = (table / step.unsqueeze(1)).view(-1)
        values = table.index_select(0, negatives.cell)
        ids = self.sequence_of(searched)
        divisor = step if ids is None else step.index_select(0, ids)
        values.index_copy_(0, near, passed_by.to(dtype) / divisor)
        rewards = -climbed.to(dtype) / step.index_select(0, self.ids)
        index = torch.cat([self.positives, negatives.entries])
        return average_precision, index, torch.cat([rewards, values])


def _problems(
    scores: Tensor,
    positives: Tensor,
    exists: Optional[Tensor],
    rankings: Sequence[Ranking],
    margin: float,
) -> List[_Problem]:
    scores = scores.detach().contiguous()
    result = []
    for ranking in rankings:
        rows = len(scores) if ranking.num_rows is None else ranking.num_rows
        part = positives
        if rows < len(scores):
            part = positives[positives < rows * scores.size(1)]
        known = None if exists is None else exists[:rows]
        result.append(_Problem(scores[:rows], part, known, ranking, margin))
    return result


class _SequenceAPLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, problems: List[_Problem]
    ) -> Tuple[Tensor, ...]:
        losses, saved = [], []
        for problem in problems:
            lambd = problem.ranking.lambd if ctx.needs_input_grad[0] else None
            average_precision, index, values = problem.solve(lambd)
            losses.append(torch.where(problem.counts > 0, 1 - average_precision, 0.0))
            ids = problem.sequence_of(index)
            saved += [index, values, *([] if ids is None else [ids])]
        ctx.save_for_backward(*saved)
        ctx.has_ids = [problem.num_sequences > 1 for problem in problems]
        ctx.shape = scores.shape
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Tensor, None]:
        saved = iter(ctx.saved_tensors)
        result = grads[0].new_zeros(ctx.shape)
        flat = result.view(-1)
        for grad, has_ids in zip(grads, ctx.has_ids):
            index, values = next(saved), next(saved)
            weight = grad.index_select(0, next(saved)) if has_ids else grad
            flat.index_add_(0, index, values * weight)
        return result, None


def sequence_ap_loss(
    scores: Tensor,
    positives: Tensor,
    exists: Optional[Tensor],
    rankings: Sequence[Ranking],
    margin: float = 0.0,
) -> List[Tuple[Tensor, Tensor]]:
    """``1 - AP`` of each sequence of each ranking, with the blackbox gradient.

    Algorithm 1 runs with unit incoming gradient on each sequence; the result is
    multiplied by the incoming gradient in the backward pass. A sequence without
    positives has loss 0 and zero gradient.

    Args:
        scores: (N, C) tensor, float32 or float64.
        positives: (P,) flat indices of the positives, ascending.
        exists: bool tensor (N, C) or (N, 1), False where an entry is in no sequence;
            ``None`` means that all exist. Positives must exist.
        rankings: What is ranked.
        margin: Positives are lowered and negatives raised by half of it.

    Returns:
        For each ranking the losses (S,), and (S,) True where there is a positive.
    """
    problems = _problems(scores, positives, exists, rankings, margin)
    losses = _SequenceAPLoss.apply(scores, problems)
    return [(loss, p.counts > 0) for loss, p in zip(losses, problems)]


def sequence_average_precision(
    scores: Tensor, positives: Tensor, exists: Optional[Tensor], ranking: Ranking
) -> Tensor:
    """Exact AP of each sequence of a ranking, (S,); NaN without positives."""
    (problem,) = _problems(scores, positives, exists, [ranking], 0.0)
    return problem.solve(None)[0]
