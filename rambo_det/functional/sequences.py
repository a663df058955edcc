"""The sequences of a score matrix: which entries are ranked against each other."""

from typing import NamedTuple, Optional

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


def true_indices(mask: Tensor) -> Tensor:
    """Indices of the True entries of a 1-D mask."""
    if mask.device.type == 'cpu':
        try:  # NumPy does it several times faster than PyTorch, which can do without
            return torch.from_numpy(mask.numpy().nonzero()[0])
        except RuntimeError:
            pass
    return mask.nonzero().squeeze(1)


class View:
    """One ranking of the score matrix: its sequences, positives and negatives."""

    def __init__(
        self,
        scores: Tensor,
        positives: Tensor,
        exists: Optional[Tensor],
        ranking: Ranking,
        margin: float,
    ) -> None:
        self.whole = scores.view(-1)
        self.num_cols = scores.size(1)
        self.offset = ranking.first_row * self.num_cols
        if ranking.num_rows is not None and ranking.num_rows < len(scores):
            part = slice(ranking.first_row, ranking.first_row + ranking.num_rows)
            scores, exists = scores[part], None if exists is None else exists[part]
            end = self.offset + scores.numel()
            positives = positives[(positives >= self.offset) & (positives < end)]
        self.scores, self.positives, self.exists = scores, positives, exists
        self.ranking, self.margin = ranking, margin
        columns = self.num_cols if ranking.per_class else 1
        self.num_sequences = ranking.num_groups * columns
        self.ids = self.sequence_of(positives).expand_as(positives)
        self.scores_of_positives = self.scores_of(positives, -1)

    def sequence_of(self, index: Tensor) -> Tensor:
        """Return the sequence of flat indices; a single 0 if there is only one."""
        groups, num_cols = self.ranking.groups, self.num_cols
        if self.num_sequences == 1:
            return index.new_zeros(())
        if groups is None:
            return index.fmod(num_cols)  # faster than %, and the same above 0
        row = torch.div(index - self.offset, num_cols, rounding_mode='floor')
        group = groups.index_select(0, row)
        own = index.fmod(num_cols).add_(group, alpha=num_cols)
        return own if self.ranking.per_class else group

    def scores_of(self, index: Tensor, sign: int) -> Tensor:
        """Return the scores of flat indices, margin applied, as a new tensor."""
        scores = self.whole.index_select(0, index)
        return scores.add_(sign * self.margin / 2) if self.margin else scores

    def lengths(self) -> Tensor:
        """Return the number of entries of each sequence, (S,)."""
        groups, per_class = self.ranking.groups, self.ranking.per_class
        count = self.exists
        if count is None:
            count = self.ids.new_ones((len(self.scores), 1))
        if not per_class:
            all_columns = count.size(1) == self.num_cols
            count = count.sum(1, keepdim=True) * (1 if all_columns else self.num_cols)
        if groups is None:
            count = count.sum(0, keepdim=True)
        else:
            total = self.ids.new_zeros((self.ranking.num_groups, count.size(1)))
            count = total.index_add_(0, groups, count.long())
        return count.expand(-1, self.num_cols if per_class else 1).reshape(-1)

    def relevant_negatives(self) -> Tensor:
        """Return flat indices of the negatives not below all positives of theirs."""
        floor = self.scores.new_full((self.num_sequences,), float('inf'))
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
        relevant = self.scores >= floor
        if self.exists is not None:
            relevant &= self.exists
        relevant = relevant.view(-1)
        relevant[self.positives - self.offset] = False
        return true_indices(relevant).add_(self.offset)

    def num_bins(self, num_negatives: int) -> int:
        """Return the number of bins per sequence."""
        # Few negatives should share a bin with a positive, but filling the tables
        # must cost less than it saves.
        wanted = min(64 * self.positives.numel(), num_negatives // 4, 2**18)
        return max(1, wanted // self.num_sequences)
