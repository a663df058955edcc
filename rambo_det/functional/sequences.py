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
        self.offset = ranking.first_row * scores.size(1)
        rows = len(scores) if ranking.num_rows is None else ranking.num_rows
        if rows < len(scores):
            part = slice(ranking.first_row, ranking.first_row + rows)
            scores, exists = scores[part], None if exists is None else exists[part]
            inside = positives < self.offset + scores.numel()
            if self.offset:
                inside &= positives >= self.offset
            positives = positives[inside]
        self.scores = scores
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
        self.scores_of_positives = self.scores_of(positives, -1)

    def sequence_of(self, index: Tensor) -> Optional[Tensor]:
        """Return the sequence of flat indices, or ``None`` if there is only one."""
        groups, num_cols = self.ranking.groups, self.num_cols
        if self.num_sequences == 1:
            return None
        if groups is None:
            return index % num_cols
        row = torch.div(index - self.offset, num_cols, rounding_mode='floor')
        group = groups.index_select(0, row)
        return group * num_cols + index % num_cols if self.ranking.per_class else group

    def scores_of(self, index: Tensor, sign: int) -> Tensor:
        """Return the scores of flat indices, margin applied, as a new tensor."""
        scores = self.whole.index_select(0, index)
        return scores.add_(sign * self.margin / 2) if self.margin else scores

    def lengths(self) -> Tensor:
        """Return the number of entries of each sequence, (S,)."""
        groups, exists = self.ranking.groups, self.exists
        per_class, num_rows = self.ranking.per_class, len(self.scores)
        width = 1 if per_class else self.num_cols
        device = self.scores.device
        if exists is None and groups is None:
            return torch.full((self.num_sequences,), num_rows * width, device=device)
        if exists is None:
            per_row = torch.full((num_rows, 1), width, device=device)
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
        relevant = self.scores >= (floor.view(()) if floor.numel() == 1 else floor)
        if self.exists is not None:
            relevant &= self.exists
        relevant = relevant.view(-1)
        relevant[self.positives - self.offset] = False
        return true_indices(relevant) + self.offset

    def num_bins(self, num_negatives: int) -> int:
        """Return the number of bins per sequence."""
        # Few negatives should share a bin with a positive, but filling the tables
        # must cost less than it saves.
        wanted = min(64 * self.positives.numel(), num_negatives // 4, 2**18)
        return max(1, wanted // self.num_sequences)
