"""The sequences of a score matrix: which entries are ranked against each other."""

from functools import lru_cache
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor


class Ranking(NamedTuple):
    """What is ranked against what in a score matrix (N, C).

    Attributes:
        lambd: λ of Algorithm 1.
        per_class: Whether each column is a sequence of its own (number ``group * C +
            column``), or all columns together are one (number ``group``).
        groups: int64 group 0..num_groups-1 of each row that takes part, such as its
            image: rows meet only within their group. ``None`` puts all rows in one.
        num_groups: Number of groups.
        num_rows: How many rows take part; ``None`` means all.
        first_row: The first of them.
    """

    lambd: float
    per_class: bool
    groups: Optional[Tensor] = None
    num_groups: int = 1
    num_rows: Optional[int] = None
    first_row: int = 0

    def num_sequences(self, columns: int) -> int:
        """Return the number of sequences of a matrix with so many columns."""
        return self.num_groups * (columns if self.per_class else 1)

    def rows(self, count: int) -> Tuple[int, int]:
        """Return the first of ``count`` rows that takes part, and the end."""
        first, number = self.first_row, self.num_rows
        return first, count if number is None else first + number


def positive_indices(labels: Tensor, columns: int) -> Tensor:
    """Return the flat indices of the positives, ascending, in a matrix with labels.

    Each row has one at most, in the column that its label names.
    """
    rows = ((labels >= 0) & (labels < columns)).nonzero().squeeze(1)
    return rows * columns + labels[rows]


class Segment(NamedTuple):
    """A run of rows that the same rankings cover."""

    first: int
    end: int  # the row after the last
    groups: Optional[Tensor]  # (rows,) the group of each; None if all are in one
    num_groups: int
    first_kind: int  # kinds of a segment have consecutive numbers


class Kinds:
    """The kinds of entries of a score matrix (N, C).

    Entries of one kind are in the same sequence of every ranking. A kind is a segment
    of the rows, a group in it and a column, unless all rankings pool the columns. Kinds
    are numbered in this order. Rankings with groups that cover the same rows must have
    the same groups.

    Attributes:
        segments: The segments; rows of no ranking are in none.
        count: The number of kinds; entries of no ranking have it as their kind.
        sequences: For each ranking the sequence of each kind, (count + 1,). Kinds that
            the ranking does not cover have the number of its sequences.
    """

    def __init__(
        self, rows: int, columns: int, rankings: Sequence[Ranking], device: torch.device
    ) -> None:
        self.rows, self.columns = rows, columns
        self.width = columns if any(of.per_class for of in rankings) else 1
        self.column = torch.arange(columns, device=device).remainder_(self.width)
        self._tiles: Dict[int, Tensor] = {}
        self.segments: List[Segment] = []
        self.count = 0
        found: List[List[Tensor]] = [[] for _ in rankings]
        cuts = sorted({edge for of in rankings for edge in of.rows(rows)})
        for first, end in zip(cuts, cuts[1:]):
            inside = [
                begin <= first and end <= last
                for begin, last in (of.rows(rows) for of in rankings)
            ]
            groups, size = None, 1
            for of, covers in zip(rankings, inside):
                if covers and of.groups is not None:
                    groups = of.groups[first - of.first_row : end - of.first_row]
                    size = of.num_groups
            if any(inside):
                self.segments.append(Segment(first, end, groups, size, self.count))
                self.count += size * self.width
                for of, covers, sequences in zip(rankings, inside, found):
                    sequences.append(self._sequences(of, size, covers))
        self.sequences = [
            torch.cat([*sequences, self.column.new_tensor([of.num_sequences(columns)])])
            for of, sequences in zip(rankings, found)
        ]

    @classmethod
    def of(
        cls,
        rows: int,
        columns: int,
        rankings: Sequence[Ranking],
        device: torch.device,
    ) -> 'Kinds':
        """Return the kinds. Without groups they are kept for later calls."""
        ungrouped = all(ranking.groups is None for ranking in rankings)
        make = _known_kinds if ungrouped else cls
        return make(rows, columns, tuple(rankings), device)

    def _sequences(self, ranking: Ranking, size: int, covers: bool) -> Tensor:
        """Return the sequence in a ranking of each kind of a segment, flat.

        Args:
            ranking: The ranking.
            size: The number of groups of the segment.
            covers: Whether the ranking covers the segment.
        """
        shape = (size, self.width)
        if not covers:
            return self.column.new_full(
                shape, ranking.num_sequences(self.columns)
            ).view(-1)
        group = torch.arange(size, device=self.column.device).unsqueeze(1)
        if ranking.groups is None:
            group = torch.zeros_like(group)
        if ranking.per_class:
            group = group * self.columns + self.column
        return group.expand(shape).reshape(-1)

    def of_rows(self, segment: Segment, rows: slice) -> Tensor:
        """Return the kinds of all entries of some rows of a segment, flat, int32."""
        count = rows.stop - rows.start
        known = self._tiles.get(segment.first_kind, self.column[:0])
        if segment.groups is None and len(known) >= count * self.columns:
            return known[: count * self.columns]
        kinds = self.column.int() + segment.first_kind
        if segment.groups is None:
            self._tiles[segment.first_kind] = kinds = kinds.repeat(count)
            return kinds
        groups = segment.groups[rows.start - segment.first :][:count].int()
        return (kinds + groups.unsqueeze(1) * self.width).view(-1)

    def of_entries(self, index: Tensor) -> Tensor:
        """Return the kinds of entries, given as flat indices."""
        kinds = torch.full_like(index, self.count)
        row = torch.div(index, self.columns, rounding_mode='floor')
        column = self.column.index_select(0, index - row * self.columns)
        for each in self.segments:
            own = column + each.first_kind
            if each.groups is None and (each.first, each.end) == (0, self.rows):
                return own
            if each.groups is not None:
                place = (row - each.first).clamp(0, len(each.groups) - 1)
                own += each.groups.index_select(0, place) * self.width
            kinds = torch.where((row >= each.first) & (row < each.end), own, kinds)
        return kinds

    def lengths(self, exists: Optional[Tensor]) -> Tensor:
        """Return the number of entries of each kind, (count + 1,)."""
        found = []
        for each in self.segments:
            rows = self.column.new_ones((each.end - each.first, 1))
            if exists is not None:
                rows = exists[each.first : each.end].long()
            groups = (
                torch.zeros_like(rows[:, 0]) if each.groups is None else each.groups
            )
            total = rows.new_zeros((each.num_groups, rows.size(1)))
            total = total.index_add_(0, groups, rows).expand(-1, self.columns)
            found.append((total if self.width > 1 else total.sum(1)).reshape(-1))
        return torch.cat([*found, self.column.new_zeros(1)])


# In a training, sizes repeat. Without groups, kinds depend on nothing else.
_known_kinds = lru_cache(maxsize=8)(Kinds)
