"""The positives of all sequences, and what moving them does to the loss.

Both solvers find where positives stand among negatives. What follows from it for the
positives alone is here.

With thresholds t = 0..K-1, AP is the mean of K ones over the same scores. A positive
of level l is a positive at t <= l and a negative at the others. The order is the same
at all thresholds: score descending, then negatives, then positives, lower levels first,
then index. So a positive has one rank, and only its rank among those that reach t, and
the number of these, depend on t.

Shares of a loss are fixed-point integers, so that sums are exact and the same in every
run, and no number of higher precision is needed.
"""

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Levels(NamedTuple):
    """What positives reach.

    Attributes:
        of_rows: (N,) int64 level -1..count-1 of each row, if it has a positive; ``None``
            if all reach everything.
        count: The number of thresholds K.
        over_all: Whether the loss of a threshold is divided by the number of all
            positives of the sequence, and not of those that reach it.
    """

    of_rows: Optional[Tensor] = None
    count: int = 1
    over_all: bool = False


def running_sums(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, … integers of the last dimension (…, M), (…, M + 1).

    They may wrap around; their differences are right all the same.
    """
    return pad(values.cumsum(-1), (1, 0))


class Move(NamedTuple):
    """The gradient of the losses, in units of the line's ``unit``.

    Attributes:
        rewards: (Q,) the gradient of positives.
        parts: (Q,) what each positive that has passed a negative adds to its gradient.
    """

    rewards: Tensor
    parts: Tensor


class Line:
    """The Q positives of all sequences, one sequence after the other, highest first.

    Args:
        sequence: (Q,) the sequence of each, ascending.
        rank: (Q,) its rank in the sequence.
        level: (Q,) its level; ``None`` if all reach everything.
        levels: The thresholds.

    Attributes:
        first: (Q,) the index of the first positive of the same sequence.
        end: (Q,) that after the last one.
        reaches: (K, Q) whether it is a positive at a threshold.
        among: (K, Q) its rank among those of the sequence that are.
        unit: What a fixed-point integer of this line is divided by.
    """

    def __init__(
        self, sequence: Tensor, rank: Tensor, level: Optional[Tensor], levels: Levels
    ) -> None:
        self.sequence, self.rank = sequence, rank
        self.first = torch.searchsorted(sequence, sequence)
        self.end = torch.searchsorted(sequence, sequence, right=True)
        self.index = torch.arange(len(sequence), device=sequence.device)
        if level is None:
            self.reaches = torch.ones_like(sequence, dtype=torch.bool).unsqueeze(0)
        else:
            thresholds = torch.arange(levels.count, device=sequence.device)
            self.reaches = level >= thresholds.unsqueeze(1)
        self.all_reach = level is None
        # How many before each reach a threshold, (K, Q + 1).
        self.sums = running_sums(self.reaches)
        self.before = self.sums.index_select(1, self.first)
        self.among = self.sums[:, 1:] - self.before
        number = self.sums.index_select(1, self.end) - self.before
        if levels.over_all:
            number = (self.end - self.first).expand_as(number)
        self.number = number.clamp(min=1)
        # Sums of shares over a sequence and all thresholds are below 2^63.
        bits = 62 - levels.count.bit_length()
        self.unit = 2.0**bits * levels.count
        self.share = (torch.ones_like(rank) << bits) // rank

    def mean(self, numerators: Tensor, edges: Tensor) -> Tensor:
        """Sum ``numerator / rank / number`` over each sequence and all thresholds.

        Args:
            numerators: (K, Q) integers up to the rank.
            edges: (S + 1,) the index of the first positive of each sequence, and Q.

        Returns:
            (S,), in units of ``unit``.
        """
        values = self.share * numerators // self.number
        sums = running_sums(self._of_reaching(values).sum(0)).index_select(0, edges)
        return sums[1:] - sums[:-1]

    def _of_reaching(self, values: Tensor) -> Tensor:
        """Return values (K, Q), zero where a threshold is not reached."""
        return values if self.all_reach else values * self.reaches

    def _demoted(self, place: Tensor) -> Tensor:
        """Count those of a sequence before a place that do not reach t, (K, Q)."""
        before = self.sums.gather(1, place.expand_as(self.reaches)) - self.before
        return place - self.first - before

    def move_singly(self, above: Optional[Tensor], place: Optional[Tensor]) -> Move:
        """Algorithm 1 on the rank of each positive among the negatives, on its own.

        Args:
            above: (Q,) how many negatives stay above each positive that has moved.
            place: (Q,) the index of the first positive that is below it then. ``None``
                if it has moved to the top, both.
        """
        now = self.among
        if above is not None and place is not None:
            now = now + above
            if not self.all_reach:
                now = now + self._demoted(place)
        passed = (self.rank - now).clamp_(min=0)
        share = self.share * self.among // now.clamp(min=1)
        gain = self._of_reaching(share * passed // self.number)
        parts = self._of_reaching(share // self.number * (passed > 0))
        rewards = -gain.sum(0)
        if not self.all_reach:
            # Of those below, the first ones up to here have passed.
            last = self.end
            if place is not None:
                last = torch.searchsorted(place, self.index, right=True)
            sums = running_sums(parts)
            blame = sums.index_select(1, last) - sums[:, 1:]
            rewards += (blame * ~self.reaches).sum(0)
        return Move(rewards, parts.sum(0))

    def rise(self, step: Tensor) -> Tensor:
        """How far Algorithm 1 moves the positives, all at once, (K, Q).

        That is λ * dL / d(rank / n), with L the loss of one threshold.

        Args:
            step: (Q,) λ times the length n of the sequence.
        """
        rank = self.rank.to(step.dtype)
        rise = step * self.among / (self.number * rank * rank)
        rise.clamp_(max=torch.finfo(step.dtype).max)  # -inf + inf has no rank
        return rise * self.reaches  # of finite numbers

    def jump(self, moved: Tensor, above: Tensor, place: Tensor) -> Tensor:
        """How many ranks the positives lose in a move of all, over all thresholds, (Q,).

        Args:
            moved: (K, Q) their scores then; ties keep their order.
            above: (K, Q) how many negatives are above each then.
            place: (K, Q) the index of the first positive that was below that score.
        """
        order = moved.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, self.sequence[order].argsort(dim=1, stable=True))
        among = self.reaches.gather(1, order).cumsum(1)
        among -= self.before.gather(1, order)
        now = torch.empty_like(among).scatter_(1, order, among) + above
        if self.all_reach:
            return (now - self.rank).sum(0)
        jump = (now + self._demoted(place) - self.rank) * self.reaches
        # A demoted one loses a rank for each that passes it.
        beyond = place.masked_fill(~self.reaches, len(self.index) + 1).sort(dim=1)[0]
        index = self.index.expand_as(place).contiguous()
        passed = torch.searchsorted(beyond, index, right=True) - self.sums[:, :-1]
        return (jump + passed * ~self.reaches).sum(0)
