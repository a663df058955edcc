"""Average precision and its blackbox gradient by counting, for CPUs.

Algorithm 1 moves only positives, so only positives are sorted. A ranking depends on a
negative through two numbers:

- its *gap*: how many positives, of all sequences together, are at or below it;
- its *kind*: its group (such as its image) and its column (its class). It tells to
  which sequence of each ranking the entry belongs.

Negatives of the same gap and kind are alike. A table with a row for each kind and a
column for each gap counts them, and its running sums give the ranks of the positives in
every ranking. A second table of that shape holds the gradients. Negatives below all
positives of their sequences change no rank and have no gradient: one comparison drops
them.

Most gaps need no search. The range of the positives is cut into bins, and a negative in
a bin without a positive has the gap of its bin. Bins save time and never change a
result. The matrix is processed in chunks that fit into a processor's cache.
``docs/algorithm.md`` derives all this with an example.

Order everywhere: score descending, then negatives before positives, then index.
"""

from itertools import accumulate
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import representable
from .chunks import Chunks, Negatives, reaching
from .lines import ALL, Levels, Line
from .margin import Shift
from .past import Past
from .sequences import Kinds, Ranking


class _Ordered:
    """The P positives of all sequences in the order of their scores.

    Args:
        scores: (P,) their scores.
        first: (P,) the order of those with equal scores; ``None`` for that given.

    Attributes:
        order: (P,) indices of the positives, the lowest first.
        ascending: (P,) their scores in this order.
        below: (P,) how many positives are below each, in the order they were given.
        gaps: The number of gaps, P + 1.
    """

    def __init__(self, scores: Tensor, first: Optional[Tensor] = None) -> None:
        if first is not None:
            scores = scores.index_select(0, first)
        descending, order = scores.sort(descending=True, stable=True)
        if first is not None:
            order = first.index_select(0, order)
        self.order, self.ascending = order.flip(0), descending.flip(0)
        self.gaps = len(order) + 1
        self.numbers = torch.arange(self.gaps, device=order.device)
        self.below = torch.empty_like(order)
        self.below.scatter_(0, self.order, self.numbers[:-1])
        # Bins of equal width over the range of the positives, and a few above it.
        finite = self.ascending.nan_to_num(0.0).clamp_(-1e30, 1e30)
        if not len(finite):
            finite = finite.new_zeros(1)
        self.low, high = finite[0].item(), finite.max().item()
        wanted = min(64 * len(finite), 2**16)
        least = max(abs(self.low), abs(high), 1e-24) * 1e-6  # what float32 can tell
        width = max((high - self.low) / wanted, least)
        self.top, self.scale = high + 2 * width, 1 / width
        filled = torch.bincount(self._bins(finite), minlength=wanted + 4)
        if len(order) and not self.ascending[-1] <= high:
            # Positives beyond the range may be anywhere above it.
            filled[int(self._bins(finite[-1:])) :] = 1
        # The number P + 1, which no gap has, marks a bin with a positive.
        self.gap_of_bin = filled.cumsum(0).masked_fill_(filled > 0, self.gaps).int()

    def _bins(self, scores: Tensor) -> Tensor:
        """Return the bins of scores, int32, 0 = lowest."""
        # Every step keeps the order, also where it rounds.
        return scores.clamp(self.low, self.top).sub_(self.low).mul_(self.scale).int()

    def cells(self, negatives: Negatives) -> Tensor:
        """Return the place of each negative in the flat table, (m,), int32.

        That is ``kind * gaps + gap``.
        """
        gaps = self.gap_of_bin.index_select(0, self._bins(negatives.scores))
        near = reaching(gaps, self.gaps)
        scores = negatives.scores.index_select(0, near)
        found = torch.bucketize(scores, self.ascending, right=True, out_int32=True)
        return gaps.index_copy_(0, near, found).add_(negatives.kinds, alpha=self.gaps)

    def sums(self, values: Tensor, rows: Tensor, size: int) -> Tensor:
        """Sum the values (P,) of the positives below each gap, (size, gaps).

        Each positive counts in the row of the result that ``rows`` (P,) names.
        """
        table = values.new_zeros((size, self.gaps))
        rows = rows.index_select(0, self.order)
        table[rows, self.numbers[1:]] = values.index_select(0, self.order)
        return table.cumsum_(1)


class _Placed(NamedTuple):
    """Positives, and the negatives among them."""

    scores: Tensor  # (P,) of the positives; (K * P,) after a move of all
    positives: _Ordered
    cells: List[Tensor]  # for each chunk the places of its negatives in the table
    table: Tensor  # (kinds, gaps) number of negatives


class _Move(NamedTuple):
    """The gradient of the losses of one ranking, found by moving its positives.

    That of a negative is ``old`` at its gap before the move, less ``new`` at its gap
    after the move. All is to be divided by ``unit``.
    """

    rewards: Tensor  # (Q,) the gradient of the positives of the line
    old: Tensor  # (S + 1, gaps)
    unit: float
    new: Optional[Tensor] = None  # (S + 1, gaps); None where it is zero
    cells: Sequence[Tensor] = ()  # as in _Placed, after the move


class _Solver:
    """Algorithm 1 on rankings of a score matrix (N, C).

    Tables have a column for each gap. They have a row for each kind, or for each of the
    S sequences of a ranking and one more for entries that are in none of them.
    """

    def __init__(
        self,
        scores: Tensor,
        positives: Tensor,
        exists: Optional[Tensor],
        rankings: Sequence[Ranking],
        shift: Shift,
        past: Sequence[Past] = (),
        levels: Levels = ALL,
        new_line: Callable[..., Line] = Line,
    ) -> None:
        self.levels, self.new_line = levels, new_line
        self.dtype, self.count = scores.dtype, scores.numel()
        self.columns = scores.size(1)
        self.rankings, self.positives, self.past = rankings, positives, past
        rows = [len(scores), *(len(of.scores) for of in past)]
        self.kinds = Kinds.of(sum(rows), self.columns, rankings, scores.device)
        self.chunks = Chunks(scores, exists, positives, self.kinds, shift)
        self.exists = self._exists(exists, rows)
        index = [positives, *(of.positives() for of in past)]  # of each step
        found, every = [self.chunks.scores_of_positives], [positives]
        for first, of, own in zip(accumulate(rows), past, index[1:]):
            found.append(of.scores.reshape(-1).index_select(0, own))
            every.append(own + first * self.columns)
        self.scores = torch.cat(found)
        kind = self.kinds.of_entries(torch.cat(every))
        # For each ranking the sequence of each positive, (P,).
        self.own = [of.index_select(0, kind) for of in self.kinds.sequences]
        self.sizes = [of.num_sequences(self.columns) + 1 for of in rankings]
        self.floors = self._lowest()
        self.index: List[Tensor] = []  # of the negatives of each chunk
        self.negatives: List[Negatives] = []  # of each chunk, if positives will move
        self.moves = any(of.lambd < float('inf') for of in rankings)
        self.level = self._levels(index)
        ties = None if self.level is None else self.level.argsort(stable=True)
        self.before = self._place(self.scores, self._find, ties)
        # For each ranking the order of the positives in its line, (P,), and the line.
        self.orders: List[Tensor] = []
        self.lines: List[Line] = []
        descending, total = self.before.positives.order.flip(0), sum(rows)
        for number, own in enumerate(self.own):
            sequence, order = own, descending
            if self.sizes[number] > 2 or rankings[number].rows(total) != (0, total):
                sequence, order = own.index_select(0, descending).sort(stable=True)
                order = descending.index_select(0, order)
            self.orders.append(order)
            self.lines.append(self._line(number, sequence))

    def _exists(
        self, exists: Optional[Tensor], rows: Sequence[int]
    ) -> Optional[Tensor]:
        """Return which entries exist, past rows included; ``None`` for all."""
        if not self.past:
            return exists
        every = self.positives.new_ones((rows[0], 1), dtype=torch.bool)
        parts = [(of.labels >= 0).unsqueeze(1) for of in self.past]
        return torch.cat([every if exists is None else exists, *parts])

    def _levels(self, index: Sequence[Tensor]) -> Optional[Tensor]:
        """Return the level of each positive, (P,), given their indices in each step."""
        if self.levels.of_rows is None:
            return None
        count = self.levels.thresholds
        levels = [self.levels.of_rows, *(of.reached(count) for of in self.past)]
        rows = [torch.div(of, self.columns, rounding_mode='floor') for of in index]
        return torch.cat([of.index_select(0, row) for of, row in zip(levels, rows)])

    def _line(self, number: int, sequence: Tensor) -> Line:
        """Return the positives of a ranking, which are in these sequences, (P,)."""
        order = self.orders[number]
        bounds = torch.arange(self.sizes[number] + 1, device=order.device)
        edges = torch.searchsorted(sequence, bounds)
        position = torch.arange(1, len(order) + 1, device=order.device)
        above = self._above(self.before, number).index_select(0, order)
        level = None if self.level is None else self.level.index_select(0, order)
        return self.new_line(sequence, edges, position, level, self.levels, above)

    def _lowest(self) -> Tensor:
        """Return for each kind the lowest positive of all its sequences, (kinds,)."""
        floors = self.scores.new_full((self.kinds.count,), float('inf'))
        for own, of, size in zip(self.own, self.kinds.sequences, self.sizes):
            lowest = floors.new_full((size,), float('inf'))
            lowest.scatter_reduce_(0, own, self.scores, 'amin')[-1] = float('inf')
            floors = torch.minimum(floors, lowest.index_select(0, of[:-1]))
        return floors

    def _find(self, number: int) -> Negatives:
        """Find the negatives of a chunk that matter: above a positive or tied."""
        index, found = self.chunks.negatives(number, self.floors)
        self.index.append(index if len(self.chunks) == 1 else index.int())
        if self.moves:
            self.negatives.append(found)
        return found

    def _place(
        self,
        scores: Tensor,
        find: Callable[[int], Negatives],
        first: Optional[Tensor] = None,
    ) -> _Placed:
        """Sort the positives by these scores, and count the negatives among them.

        Args:
            scores: (P,) of the positives, or of several moves of them.
            find: Returns the negatives of a chunk.
            first: (P,) the order of positives with equal scores.
        """
        positives = _Ordered(scores, first)
        size = self.kinds.count * positives.gaps
        table = scores.new_zeros(size, dtype=torch.int32)
        one, cells = table.new_ones(1), []
        for number in range(len(self.chunks)):
            cells.append(positives.cells(find(number)))
            table.index_add_(0, cells[-1], one.expand_as(cells[-1]))
        table = table.view(self.kinds.count, positives.gaps)
        return _Placed(scores, positives, cells, table)

    def _above(self, placed: _Placed, number: int) -> Tensor:
        """Count the negatives above each positive in a ranking, (P,) or (K * P,)."""
        own, size = self.own[number], self.sizes[number]
        if len(own) < len(placed.scores):  # after a move of all
            own = own.repeat(self.levels.thresholds)
        negatives = placed.table.new_zeros((size, placed.positives.gaps))
        of = self.kinds.sequences[number][:-1]
        negatives = negatives.index_add_(0, of, placed.table).cumsum(1)
        above = negatives[:, -1].index_select(0, own)
        above = above - negatives[own, placed.positives.below]
        if len(own) and self.past and self.rankings[number].num_rows is None:
            above += self._past_above(placed.scores, own, number)
        return above

    def _past_above(self, scores: Tensor, own: Tensor, number: int) -> Tensor:
        """Count the past negatives above each positive in its sequence."""
        if not self.rankings[number].per_class:
            asked = scores.expand(self.columns, -1)
            return torch.stack([of.above(asked).sum(0) for of in self.past]).sum(0)
        # Ask for each column about its own positives only.
        order = own.argsort(stable=True)
        ordered = own.index_select(0, order)
        place = torch.arange(len(own), device=own.device)
        place = torch.empty_like(order).scatter_(
            0, order, place - torch.searchsorted(ordered, ordered)
        )
        asked = scores.new_zeros((self.columns, int(place.max()) + 1))
        asked[own, place] = scores
        return torch.stack([of.above(asked)[own, place] for of in self.past]).sum(0)

    def _move(self, rise: Any) -> _Placed:
        """Raise the positives, sort them again and count the negatives among them."""
        moved = (self.scores + rise).view(-1)
        return self._place(moved, lambda number: self.negatives[number])

    def _passed(self, moved: Tensor, number: int) -> Tensor:
        """Return the index in the line of the first positive below each move, (…, Q).

        Args:
            moved: (…, Q) scores of the positives of the line.
            number: The number of the ranking.
        """
        line, positives = self.lines[number], self.before.positives
        # The positives of a line by their sequence, then by how many are below each.
        start = (line.sequence + 1) * positives.gaps
        keys = start - positives.below.index_select(0, self.orders[number])
        below = torch.searchsorted(positives.ascending, moved)
        return torch.searchsorted(keys, start - below, right=True)

    def move_together(self, number: int) -> _Move:
        """Algorithm 1 on the ranking of a sequence: all positives move at once."""
        own, size, line = self.own[number], self.sizes[number], self.lines[number]
        of, order, count = (
            self.kinds.sequences[number],
            self.orders[number],
            self.levels.thresholds,
        )
        lengths = own.new_zeros(size).index_add_(0, of, self.kinds.lengths(self.exists))
        lambd = max(self.rankings[number].lambd, torch.finfo(self.dtype).tiny)
        step = (lengths.double() * lambd).masked_fill_(lengths == 0, 1.0)
        rise = line.rise(step.index_select(0, line.sequence)).to(self.dtype)
        rise.clamp_(max=torch.finfo(self.dtype).max)  # -inf + inf has no rank
        rises = torch.empty_like(rise).index_copy_(-1, order, rise)
        after = self._move(rises)
        moved = after.scores.view(rise.shape).index_select(-1, order)
        above = self._above(after, number).view(rise.shape).index_select(-1, order)
        jump = line.jump(moved, above, self._passed(moved, number))
        ones = torch.ones_like(own) if line.reaches is None else line.reaches.long()
        ones = torch.empty_like(ones).index_copy_(-1, order, ones)
        old = self.before.positives.sums(ones.view(count, -1).sum(0), own, size)
        new = after.positives.sums(ones.view(-1), own.repeat(count), size)
        step *= count
        old, new = (table / step.unsqueeze(1) for table in (old, new))
        jump = jump / step.index_select(0, line.sequence)
        return _Move(jump, old, 1.0, new, after.cells)

    def move_singly(self, number: int) -> _Move:
        """Algorithm 1 on the rank of each positive among the negatives, on its own."""
        own, size, line = self.own[number], self.sizes[number], self.lines[number]
        lambd, order = self.rankings[number].lambd, self.orders[number]
        after, above, passed = None, None, None
        if lambd < float('inf'):
            after = self._move(representable(lambd, self.dtype))
            # Each has moved alone: its rank among the positives is the old one.
            above = self._above(after, number).index_select(0, order)
            passed = self._passed(after.scores.index_select(0, order), number)
        rewards, parts = line.move_singly(above, passed)
        # Each negative that a positive has passed bears an equal part of its gain.
        part = torch.empty_like(parts).index_copy_(0, order, parts).double()
        old = self.before.positives.sums(part, own, size)
        if after is None:
            return _Move(rewards, old, line.unit)
        new = after.positives.sums(part, own, size)
        return _Move(rewards, old, line.unit, new, after.cells)

    def gradient(self, moves: Sequence[_Move], grads: Sequence[Tensor]) -> Tensor:
        """Return the gradient (N * C,), given that of the losses of each ranking."""
        rewards = torch.zeros_like(self.scores, dtype=torch.double)
        # One table sums what depends on the gap before the move alone. What depends on
        # both gaps stays in pairs of tables.
        still = rewards.new_zeros((self.kinds.count, self.before.positives.gaps))
        pairs = []
        for number, (move, grad) in enumerate(zip(moves, grads)):
            order, of = self.orders[number], self.kinds.sequences[number]
            factor = torch.cat([grad.double() / move.unit, rewards.new_zeros(1)])
            own = factor.index_select(0, self.lines[number].sequence)
            rewards.index_add_(0, order, move.rewards * own)
            factor = factor.index_select(0, of[:-1]).unsqueeze(1)
            old = move.old.index_select(0, of[:-1]).mul_(factor)
            if move.new is None:
                still += old
            else:
                new = move.new.index_select(0, of[:-1]).mul_(factor)
                pairs.append((old.view(-1), new.view(-1), move.cells))
        flat = still.view(-1).to(self.dtype)
        result = self.scores.new_zeros(self.count)
        for number, index in enumerate(self.index):
            cells = self.before.cells[number]
            values = flat.index_select(0, cells)
            for old, new, after in pairs:
                before = old.index_select(0, cells)
                values += before - new.index_select(0, after[number])
            part = result[self.chunks.entries(number)]
            part.scatter_(0, index.long(), values)
        own = rewards[: len(self.positives)].to(self.dtype)
        return result.index_copy_(0, self.positives, own)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, solver: _Solver, together: bool) -> Any:
        numbers = range(len(solver.rankings))
        if ctx.needs_input_grad[0]:
            move = solver.move_together if together else solver.move_singly
            ctx.solver, ctx.moves = solver, [move(number) for number in numbers]
            solver.negatives.clear()
        ctx.shape = scores.shape
        losses = [(of.losses().double() / of.unit)[:-1] for of in solver.lines]
        return tuple(loss.to(scores.dtype) for loss in losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Tensor, None, None]:
        return ctx.solver.gradient(ctx.moves, grads).view(ctx.shape), None, None


def suits(
    scores: Tensor,
    positives: Tensor,
    rankings: Sequence[Ranking],
    past: Sequence[Past] = (),
) -> bool:
    """Return whether the table solver can rank this, with tables of moderate size.

    It cannot if two rankings group rows differently, or if a ranking takes past rows
    and is grouped or does not take all rows.
    """
    if not can_rank(len(scores), rankings, past):
        return False
    groups = [of.num_groups for of in rankings if of.groups is not None]
    width = scores.size(1) if any(of.per_class for of in rankings) else 1
    cells = (1 + max(groups, default=0)) * width * (len(positives) + 1)
    return cells <= max(2 * scores.numel(), 2**14)


def can_rank(rows: int, rankings: Sequence[Ranking], past: Sequence[Past]) -> bool:
    """Return whether groups are the same, and past rows ungrouped and all or none."""
    for of in rankings:
        all_rows = of.num_rows is None and of.groups is None and of.first_row == 0
        if past and not all_rows and of.rows(rows + 1)[1] > rows:
            return False
    groups = [(of.groups, of[3:]) for of in rankings if of.groups is not None]
    return all(
        rest == others and (one is other or torch.equal(one, other))
        for (one, rest), (other, others) in zip(groups, groups[1:])
    )


def table_loss(
    scores: Tensor,
    positives: Tensor,
    exists: Optional[Tensor],
    rankings: Sequence[Ranking],
    shift: Shift,
    together: bool,
    past: Sequence[Past] = (),
    levels: Levels = ALL,
    new_line: Callable[..., Line] = Line,
) -> List[Tuple[Tensor, Tensor]]:
    """The loss of each sequence of each ranking, with the blackbox gradient.

    ``scores`` (N, C) are float32 or float64, ``positives`` (P,) flat indices,
    ascending. ``exists`` (N, C) or (N, 1) is False where an entry is in no sequence, or
    ``None``; positives must exist. With ``together`` all positives of a sequence are
    perturbed at once. The rows of ``past`` follow those of ``scores``, without gradient
    and with their own margin. ``new_line`` makes the line of a loss, by default
    that of ``1 - AP``. Returns for each ranking the losses (S,), and (S,) True where
    there is a positive.
    """
    solver = _Solver(scores, positives, exists, rankings, shift, past, levels, new_line)
    losses = _Loss.apply(scores, solver, together)
    return [(loss, of.present[:-1]) for loss, of in zip(losses, solver.lines)]


def table_average_precision(
    scores: Tensor, positives: Tensor, exists: Optional[Tensor], ranking: Ranking
) -> Tensor:
    """Exact AP of each sequence of a ranking, (S,); NaN without positives."""
    solver = _Solver(scores, positives, exists, [ranking], Shift())
    (line,) = solver.lines
    precisions = (line.precisions().double() / line.unit).to(scores.dtype)
    return precisions.masked_fill_(~line.present, float('nan'))[:-1]
