"""Scores of a past step, which count in a ranking and have no gradient."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from .sequences import positive_indices


class Past:
    """The scores of a past step, which do not change any more.

    A ranking only asks how many of their negatives are above a score. For this the
    negatives of each column are sorted once, when it is first asked.

    Args:
        scores: (M, C) tensor of at least float32, margin applied, without gradient.
        labels: (M,) int64 tensor: 0..C-1 foreground, C or more background, negative for
            rows that do not exist.
        levels: (M,) int64 tensor, see ``detection_ap_loss``; ``None`` if positives are
            positives at all thresholds.
    """

    def __init__(
        self, scores: Tensor, labels: Tensor, levels: Optional[Tensor] = None
    ) -> None:
        self.scores, self.labels, self.levels = scores, labels, levels
        self._sorted: Optional[Tuple[Tensor, Tensor]] = None

    def to(self, like: Tensor) -> 'Past':
        """Return the step with the type and on the device of other scores."""
        scores, labels = self.scores.to(like), self.labels.to(like.device)
        levels = None if self.levels is None else self.levels.to(like.device)
        same = scores is self.scores and labels is self.labels
        return self if same else Past(scores, labels, levels)

    def __deepcopy__(self, memo: object) -> 'Past':
        levels = None if self.levels is None else self.levels.clone()
        copied = Past(self.scores.clone(), self.labels.clone(), levels)
        copied._sorted = self._sorted  # never changed
        return copied

    def reached(self, num_levels: int) -> Tensor:
        """Return the levels of the rows; without any, they reach everything, (M,)."""
        if self.levels is None:
            return torch.full_like(self.labels, num_levels - 1)
        return self.levels

    def positives(self) -> Tensor:
        """Return the flat indices of the positives, ascending."""
        return positive_indices(self.labels, self.scores.size(1))

    def _by_column(self) -> Tuple[Tensor, Tensor]:
        """Return the negatives of each column, ascending, and their numbers.

        These are (C, M), with -inf in the places of other entries, and (C, 1).
        """
        if self._sorted is None:
            rows, columns = self.scores.shape
            ordered = self.scores.t().clone(memory_format=torch.contiguous_format)
            missing = self.labels < 0
            ordered.masked_fill_(missing, float('-inf'))
            index = self.positives()
            row = torch.div(index, columns, rounding_mode='floor')
            ordered[self.labels[row], row] = float('-inf')
            count = (rows - missing.sum()).expand(columns)
            count = count - torch.bincount(self.labels[row], minlength=columns)
            try:  # NumPy is ten times faster, but PyTorch can be installed without it
                ordered.numpy().sort(axis=1)
            except (RuntimeError, TypeError):
                ordered = ordered.sort(dim=1).values
            self._sorted = ordered, count.unsqueeze(1)
        return self._sorted

    def above(self, scores: Tensor) -> Tensor:
        """Count the negatives of each column at or above each score, (C, K).

        Args:
            scores: (C, K) K scores for each column.
        """
        ordered, count = self._by_column()
        below = torch.searchsorted(ordered, scores.contiguous())
        return torch.minimum(ordered.size(1) - below, count)
