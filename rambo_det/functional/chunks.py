"""Score matrices, processed in chunks that fit into a processor's cache."""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .margin import CHUNK, Shift, plus
from .sequences import Kinds, Segment


def reaching(values: Tensor, floor: Any) -> Tensor:
    """Return the indices of the values at or above a floor; NaN never is."""
    try:  # NumPy is several times faster, but PyTorch can be installed without it
        bound = floor.numpy() if isinstance(floor, Tensor) else floor
        return torch.from_numpy((values.numpy() >= bound).nonzero()[0])
    except (RuntimeError, TypeError):
        return (values >= floor).nonzero().squeeze(1)


class Negatives(NamedTuple):
    """The m negatives of a chunk that are not below all positives of theirs."""

    scores: Tensor  # (m,) margin applied
    kinds: Tensor  # (m,) int32


class _Chunk(NamedTuple):
    """Rows of one segment."""

    segment: Segment
    rows: slice
    entries: slice  # of the flat matrix
    positives: slice  # which of the positives are among them


class Chunks:
    """The entries of a score matrix (N, C).

    Args:
        scores: The matrix.
        exists: (N, C) or (N, 1), False where an entry does not exist; ``None`` for all.
        positives: (P,) flat indices of the positives, ascending.
        kinds: The kinds of the entries.
        shift: The margin.

    Attributes:
        scores_of_positives: (P,), margin applied.
    """

    def __init__(
        self,
        scores: Tensor,
        exists: Optional[Tensor],
        positives: Tensor,
        kinds: Kinds,
        shift: Shift,
    ) -> None:
        self._columns, self._exists = scores.size(1), exists
        self._positives, self._kinds, self._shift = positives, kinds, shift
        self._scores = scores.detach().contiguous().view(-1)
        self._chunks = self._cut(len(scores))
        shift.draw(self._scores, [of.entries for of in self._chunks])
        own = self._scores.index_select(0, positives)
        self.scores_of_positives = own - shift.of_positives(positives)
        self._known: Dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def entries(self, number: int) -> slice:
        """Return where the entries of a chunk are in the flat matrix."""
        return self._chunks[number].entries

    def _cut(self, count: int) -> List[_Chunk]:
        """Cut the first ``count`` rows into chunks, each within one segment."""
        step, found = max(1, CHUNK // max(self._columns, 1)), []
        for segment in self._kinds.segments:
            end = min(segment.end, count)
            rows = [*range(segment.first, end, step), end]
            entries = [row * self._columns for row in rows]
            edges = self._positives.new_tensor(entries)
            places = torch.searchsorted(self._positives, edges).tolist()
            spans = [map(slice, of, of[1:]) for of in (rows, entries, places)]
            found += [_Chunk(segment, *of) for of in zip(*spans)]
        return found

    def _floor(self, segment: Segment, kinds: Tensor, floors: Tensor) -> Any:
        """Return the floor of each entry, or one number if all floors are equal.

        Args:
            segment: The segment of the entries.
            kinds: (M,) their kinds.
            floors: (kinds,) the floor of each kind.
        """
        known = self._known.get(segment.first_kind, kinds[:0])
        if isinstance(known, Tensor) and len(known) < len(kinds):
            size = segment.num_groups * self._kinds.width
            low, high = floors[segment.first_kind :][:size].aminmax()
            known = low.item() if low == high else floors.index_select(0, kinds)
            if segment.groups is None or low == high:  # else rows differ
                self._known[segment.first_kind] = known
        return known[: len(kinds)] if isinstance(known, Tensor) else known

    def negatives(self, number: int, floors: Tensor) -> Tuple[Tensor, Negatives]:
        """Find the negatives of a chunk that are not below the floor of their kind.

        Args:
            number: The number of the chunk.
            floors: (kinds,) lowest scores that matter; the same in all calls.

        Returns:
            Their indices in the chunk, (m,), int64, and their scores and kinds.
        """
        segment, rows, entries, positives = self._chunks[number]
        scores = plus(self._scores[entries], self._shift.of_chunk(number, entries))
        own = self._positives[positives] - entries.start
        scores.index_fill_(0, own, float('nan'))
        if self._exists is not None:
            missing = ~self._exists[rows]
            scores.view(len(missing), self._columns).masked_fill_(missing, float('nan'))
        kinds = self._kinds.of_rows(segment, rows)
        index = reaching(scores, self._floor(segment, kinds, floors))
        return index, Negatives(
            scores.index_select(0, index), kinds.index_select(0, index)
        )
