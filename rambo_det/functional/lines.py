"""The positives of all sequences, and what moving them does to the loss.

Both solvers find where positives stand among negatives. What follows from it for the
positives alone is here: in ``Line`` for AP, in ``RecallLine`` for recall.

With thresholds t = 0..K-1, AP is the mean of K ones over the same scores. A positive
of level l is a positive at t <= l and a negative at the others. The order is the same
at all thresholds: score descending, then negatives, then positives, lower levels first,
then index. So a positive has one rank, and only its rank among those that reach t, and
the number of these, depend on t.

Shares of a loss are fixed-point integers, so that sums are exact and the same in every
run, and no number of higher precision is needed.
"""

from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Levels(NamedTuple):
    """What positives reach.

    Attributes:
        of_rows: (N,) int64 level -1..K-1 of each row with a positive; ``None`` if
            all reach everything.
        thresholds: Their number K.
        over_all: Whether the loss of a threshold is divided by the number of all
            positives of the sequence, and not of those that reach it.
    """

    of_rows: Optional[Tensor] = None
    thresholds: int = 1
    over_all: bool = False


ALL = Levels()


@lru_cache(maxsize=8)
def _thresholds(count: int, device: torch.device) -> Tensor:
    """Return 0, 1, … (count, 1)."""
    return torch.arange(count, device=device).unsqueeze(1)


def running_sums(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, … integers of the last dimension (…, M), (…, M + 1).

    They may wrap around; their differences are right all the same.
    """
    return pad(values.cumsum(-1), (1, 0))


class Line:
    """The Q positives of all sequences, one sequence after the other, highest first.

    Without levels the dimension of the thresholds is left out of all shapes here.

    Args:
        sequence: (Q,) the sequence of each, ascending.
        edges: (S + 1,) the index of the first positive of each sequence, and the end.
        position: (Q,) 1, 2, … Q.
        level: (Q,) the level of each; ``None`` if all reach everything.
        levels: The thresholds.
        above: (Q,) how many negatives of its sequence are above each; or
        rank: (Q,) its rank in the sequence.

    Attributes:
        first: (Q,) the index of the first positive of the same sequence.
        present: (S,) whether a sequence has a positive.
        among: (K, Q) the rank of each among those of its sequence that reach t.
        number: (K, Q) what the loss of a sequence is divided by.
        unit: What fixed-point integers are divided by.
    """

    def __init__(
        self,
        sequence: Tensor,
        edges: Tensor,
        position: Tensor,
        level: Optional[Tensor],
        levels: Levels,
        above: Optional[Tensor] = None,
        rank: Optional[Tensor] = None,
    ) -> None:
        self.sequence, self.edges, self.position = sequence, edges, position
        self.level, self.levels = level, levels
        self.first = edges.index_select(0, sequence)
        counts = edges[1:] - edges[:-1]
        self.present = counts > 0
        self.count = counts.index_select(0, sequence)
        self.among, self.number = position - self.first, self.count
        if above is not None:
            rank = self.among + above
        assert rank is not None
        self.rank = rank
        if level is not None:
            self.among = self.sums[:, 1:] - self.before
            if not levels.over_all:
                end = self.first + self.count
                self.number = self.sums.index_select(1, end) - self.before
        self.number = self.number.clamp(min=1)
        # Sums of shares over a sequence and all thresholds are below 2^63.
        bits = 62 - levels.thresholds.bit_length()
        self.unit = 2.0**bits * levels.thresholds
        self.share = torch.full_like(rank, 1 << bits) // rank

    @cached_property
    def reaches(self) -> Optional[Tensor]:
        """Whether each is a positive at a threshold, (K, Q); ``None`` if all are."""
        if self.level is None:
            return None
        return self.level >= _thresholds(self.levels.thresholds, self.level.device)

    @cached_property
    def sums(self) -> Tensor:
        """How many before each, and in all, reach a threshold, (K, Q + 1)."""
        if self.reaches is None:
            return pad(self.position, (1, 0))
        return running_sums(self.reaches)

    @cached_property
    def before(self) -> Tensor:
        """How many in earlier sequences reach a threshold, (K, Q)."""
        return self.sums.index_select(-1, self.first)

    def _only_reaching(self, values: Tensor) -> Tensor:
        """Return values (K, Q), zero where a threshold is not reached."""
        return values if self.reaches is None else values * self.reaches

    def _of_others(self, values: Tensor) -> Tensor:
        """Return values (K, Q), zero where a threshold is reached."""
        assert self.reaches is not None
        return values.masked_fill(self.reaches, 0)

    def _over_all(self, values: Tensor) -> Tensor:
        """Sum values over the thresholds, (Q,)."""
        return values if self.level is None else values.sum(0)

    def _demoted(self, place: Tensor) -> Tensor:
        """Count those of a sequence before a place that do not reach t, (K, Q)."""
        before = self.sums.gather(1, place.expand_as(self.among)) - self.before
        return place - self.first - before

    @cached_property
    def losses_at_top(self) -> Tensor:
        """What each would lose of ``1 - AP`` if it moved to the top, (Q,), negative."""
        lacking = self.share * (self.among - self.rank)
        return self._over_all(self._only_reaching(lacking // self.number))

    def losses(self) -> Tensor:
        """``1 - AP`` of each sequence, 0 without positives, (S,), times ``unit``."""
        sums = running_sums(self.losses_at_top).index_select(0, self.edges)
        return sums[:-1] - sums[1:]

    def precisions(self) -> Tensor:
        """AP of each sequence, 0 without positives, (S,), times ``unit``."""
        precisions = self._over_all(self.share * self.among // self.number)
        sums = running_sums(precisions).index_select(0, self.edges)
        return sums[1:] - sums[:-1]

    def move_singly(
        self, above: Optional[Tensor] = None, place: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """Algorithm 1 on the rank of each positive among the negatives, on its own.

        Args:
            above: (Q,) how many negatives stay above each positive that has moved.
            place: (Q,) the index of the first positive that is below it then. ``None``,
                as ``above`` is, if all move to the top.

        Returns:
            The gradient of the positives, and what each adds to that of a negative that
            it has passed, (Q,), times ``unit``.
        """
        if above is None or place is None:
            rewards, parts = self.losses_at_top, self.share // self.number
        else:
            now = self.among + above
            if self.level is not None:
                now = (now + self._demoted(place)).clamp_(min=1)
            passed = (self.rank - now).clamp_(min=0)
            share = self.share * self.among // now
            gains = self._only_reaching(share * passed // self.number)
            rewards = -self._over_all(gains)
            parts = (share // self.number).mul_(passed > 0)
        parts = self._only_reaching(parts)
        if self.level is not None:
            # Of those below, the first ones up to here have passed.
            if place is None:
                last = self.first + self.count
            else:
                last = torch.searchsorted(place, self.position)
            sums = running_sums(parts)
            blame = sums.index_select(1, last) - sums[:, 1:]
            rewards = rewards + self._over_all(self._of_others(blame))
        return rewards, self._over_all(parts)

    def rise(self, step: Tensor) -> Tensor:
        """How far Algorithm 1 moves the positives, all at once, (K, Q).

        That is λ * dL / d(rank / n), with L the loss of one threshold.

        Args:
            step: (Q,) λ times the length n of the sequence.
        """
        rank = self.rank.to(step.dtype)
        rise = step * self.among / (self.number * rank * rank)
        rise.clamp_(max=torch.finfo(step.dtype).max)  # -inf + inf has no rank
        return self._only_reaching(rise)

    def jump(self, moved: Tensor, above: Tensor, place: Tensor) -> Tensor:
        """Return how many ranks each loses in a move of all, over thresholds, (Q,).

        Args:
            moved: (K, Q) their scores then; ties keep their order.
            above: (K, Q) how many negatives are above each then.
            place: (K, Q) the index of the first positive that was below that score.
        """
        order = moved.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, self.sequence[order].argsort(dim=-1, stable=True))
        among = self.position
        if self.reaches is not None:
            among = self.reaches.gather(1, order).cumsum(1)
        now = torch.empty_like(among).scatter_(-1, order, among) + above
        # So far with the positives of earlier sequences.
        if self.reaches is None:
            return now - self.first - self.rank
        # They are as many in the sums; what else differs from the place are demoted.
        now = now + (place - self.first) - self.sums.gather(1, place)
        jump = self._only_reaching(now - self.rank)
        # A demoted one loses a rank for each that passes it.
        position = self.position.expand_as(place).contiguous()
        passed = torch.searchsorted(self.of_reaching(place).sort(dim=1)[0], position)
        return (jump + self._of_others(passed - self.sums[:, :-1])).sum(0)

    def of_reaching(self, place: Tensor) -> Tensor:
        """Return places (K, Q), beyond all where a threshold is not reached."""
        if self.reaches is None:
            return place
        return torch.where(self.reaches, place, torch.iinfo(place.dtype).max)


class RecallLine(Line):
    """The line of a loss that is the mean of ``w(negatives above a positive)``.

    Args:
        weighting: The name of w, see :func:`~rambo_det.functional.recall_loss`.
        args: Those of :class:`Line`, without levels.
        kwargs: The same.
    """

    def __init__(self, weighting: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.twice = weighting == 'loglog'
        # Below 0 for what the sort solver has in the places of missing positives.
        self.above = (self.rank - self.among).clamp_(min=0)
        self.unit = 2.0**56  # w of 2^63 negatives is below 2^6

    def _weights(self, above: Tensor) -> Tensor:
        """Return w, over the number of positives, of numbers of negatives, (Q,)."""
        weights = above.double().log1p()
        weights = weights.log1p() if self.twice else weights
        return (weights * self.unit).long() // self.number

    @cached_property
    def losses_at_top(self) -> Tensor:
        """What each would lose if it moved to the top, (Q,), negative."""
        return -self._weights(self.above)

    def move_singly(
        self, above: Optional[Tensor] = None, place: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """Algorithm 1 on each positive on its own; see :meth:`Line.move_singly`."""
        rewards, passed = self.losses_at_top, self.above
        if above is not None:
            rewards = (rewards + self._weights(above.clamp(min=0))).clamp_(max=0)
            passed = passed - above
        return rewards, -rewards // passed.clamp(min=1)

    def rise(self, step: Tensor) -> Tensor:
        """How far Algorithm 1 moves the positives, all at once, (Q,)."""
        above = self.above.to(step.dtype)
        slope = 1 / (1 + above)  # w'
        if self.twice:
            slope = slope / (1 + above.log1p())
        rise = step * slope / self.number
        return rise.clamp_(max=torch.finfo(step.dtype).max)  # -inf + inf has no rank
