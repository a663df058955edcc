"""Score matrices that are gone through in chunks which fit into a processor's cache."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .margin import CHUNK, Shift
from .sequences import Kinds, Ranking, Segment


def reaching(values: Tensor, floor: Any) -> Tensor:
    """Indices of the values that are not below a floor; NaN always is."""
    try:  # NumPy does it several times faster than PyTorch, which can do without
        bound = floor.numpy() if isinstance(floor, Tensor) else floor
        return torch.from_numpy((values.numpy() >= bound).nonzero()[0])
    except (RuntimeError, TypeError):
        return (values >= floor).nonzero().squeeze(1)


class Negatives(NamedTuple):
    """Negatives that matter."""

    scores: Tensor  # (m,) margin applied
    kinds: Tensor  # (m,) int32


class _Source(NamedTuple):
    """A score matrix; the rows of several follow each other."""

    first: int  # the number of its first row
    scores: Tensor  # flat
    exists: Optional[Tensor]  # (rows, C) or (rows, 1)
    shift: Optional[Shift]  # None if the scores have their margin


class _Chunk(NamedTuple):
    """Rows of one segment and matrix."""

    segment: Segment
    source: _Source
    rows: slice
    entries: slice  # of the flat matrix
    positives: slice  # which of the positives are among them


class Chunks:
    """The entries of a score matrix (N, C), and of past ones whose rows follow.

    Args:
        scores: The matrix.
        exists: (N, C) or (N, 1), False where an entry does not exist; ``None`` for all.
        past: The same of past matrices, which have their margin.
        positives: (P,) flat indices of the positives of all, ascending.
        rankings: What is ranked.
        shift: The margin of ``scores``.

    Attributes:
        kinds: The kinds of the entries.
        own: How many chunks are of ``scores``: the first.
        kind_of_positives: (P,)
        scores_of_positives: (P,), margin applied.
        exists: As above, for all rows.
    """

    def __init__(
        self,
        scores: Tensor,
        exists: Optional[Tensor],
        past: Sequence[Tuple[Tensor, Optional[Tensor]]],
        positives: Tensor,
        rankings: Sequence[Ranking],
        shift: Shift,
    ) -> None:
        self._columns, self._positives, rows = scores.size(1), positives, 0
        self._sources: List[_Source] = []
        for part, present in [(scores, exists), *past]:
            flat = part.detach().contiguous().view(-1)
            of = None if self._sources else shift
            self._sources.append(_Source(rows, flat, present, of))
            rows += part.size(0)
        self.exists = self._exists()
        self.kinds = Kinds(rows, self._columns, rankings, scores.device)
        self.kind_of_positives = self.kinds.of_entries(positives)
        self._chunks = self._cut(rows)
        own = [of.entries for of in self._chunks if of.source is self._sources[0]]
        self.own = len(own)
        shift.draw(self._sources[0].scores, own)
        self.scores_of_positives = self._scores()
        self._known: Dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def entries(self, number: int) -> slice:
        """Return where the entries of a chunk are in its flat matrix."""
        return self._chunks[number].entries

    def _cut(self, rows: int) -> List[_Chunk]:
        """Cut the rows into chunks, each of one segment and one matrix."""
        step, columns = max(1, CHUNK // max(self._columns, 1)), self._columns
        ends = [*(of.first for of in self._sources[1:]), rows]
        found = []
        for segment in self.kinds.segments:
            for source, end in zip(self._sources, ends):
                first, end = max(segment.first, source.first), min(segment.end, end)
                cuts = [*range(first, end, step), end]
                edges = self._positives.new_tensor(cuts) * columns
                places = torch.searchsorted(self._positives, edges).tolist()
                entries = (edges - source.first * columns).tolist()
                spans = [map(slice, of, of[1:]) for of in (cuts, entries, places)]
                found += [_Chunk(segment, source, *of) for of in zip(*spans)]
        return sorted(found, key=lambda of: of.rows.start)

    def _exists(self) -> Optional[Tensor]:
        """Return which entries exist in all matrices; ``None`` for all."""
        if all(of.exists is None for of in self._sources):
            return None
        found = []
        for of in self._sources:
            rows = len(of.scores) // max(self._columns, 1)
            every = of.scores.new_ones((rows, 1), dtype=torch.bool)
            found.append(every if of.exists is None else of.exists)
        return torch.cat(found)

    def _scores(self) -> Tensor:
        """Return the scores of the positives, margin applied, (P,)."""
        starts = [of.first * self._columns for of in self._sources[1:]]
        edges = self._positives.new_tensor(starts)
        cuts = torch.searchsorted(self._positives, edges).tolist()
        found = []
        for source, index in zip(self._sources, self._positives.tensor_split(cuts)):
            index = index - source.first * self._columns
            found.append(source.scores.index_select(0, index))
            if source.shift is not None:
                found[-1] -= source.shift.of_positives(index)
        return torch.cat(found)

    def past_positives(self) -> Negatives:
        """Return the past positives, which are also among the negatives.

        That is since past scores are only read, and not copied to cut them out.
        """
        past = self._positives >= len(self._sources[0].scores)
        past &= self.kind_of_positives < self.kinds.count
        past &= ~self.scores_of_positives.isnan()
        index = past.nonzero().squeeze(1)
        kinds = self.kind_of_positives[index].int()
        return Negatives(self.scores_of_positives[index], kinds)

    def _floor(self, segment: Segment, kinds: Tensor, floors: Tensor) -> Any:
        """Return the floors of entries of given kinds; one number if they are alike."""
        known = self._known.get(segment.first_kind, kinds[:0])
        if isinstance(known, Tensor) and len(known) < len(kinds):
            size = segment.num_groups * self.kinds.width
            low, high = floors[segment.first_kind :][:size].aminmax()
            known = low.item() if low == high else floors.index_select(0, kinds)
            if segment.groups is None or low == high:  # else rows differ
                self._known[segment.first_kind] = known
        return known[: len(kinds)] if isinstance(known, Tensor) else known

    def negatives(self, number: int, floors: Tensor) -> Tuple[Tensor, Negatives]:
        """Find the negatives of a chunk that are not below the floor of their kind.

        Args:
            number: The number of the chunk.
            floors: (kinds,) scores, always the same.

        Returns:
            Their indices in the chunk, int64, and what they are.
        """
        segment, source, rows, entries, positives = self._chunks[number]
        scores = source.scores[entries]
        if source.shift is not None:
            scores = scores + source.shift.of_chunk(number, entries)
            own = self._positives[positives] - rows.start * self._columns
            scores.index_fill_(0, own, float('nan'))
        if source.exists is not None:
            first, end = (row - source.first for row in (rows.start, rows.stop))
            missing = ~source.exists[first:end].expand(-1, self._columns)
            scores = scores.masked_fill(missing.reshape(-1), float('nan'))
        kinds = self.kinds.of_rows(segment, rows)
        index = reaching(scores, self._floor(segment, kinds, floors))
        return index, Negatives(
            scores.index_select(0, index), kinds.index_select(0, index)
        )
