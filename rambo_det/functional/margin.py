"""The margin between positives and negatives of a matrix ranked in chunks."""

from typing import Any, List, Optional, Sequence

import torch
from torch import Tensor

# Entries of a chunk: few enough for the cache, many enough that calls cost little.
# PyTorch shares an operation on more than 2^15 entries among threads, which wait for
# each other; where other processes use the processors, that takes longer than the work.
# Of the entries of a chunk, two thirds may matter before that happens.
CHUNK = 3 * 2**14
# How many random shifts are drawn at most. More entries share them.
DRAWS = 2**18


def plus(scores: Tensor, shift: Any) -> Tensor:
    """Return the sum of the scores of a chunk and a shift, in one thread."""
    try:
        other = shift.numpy() if isinstance(shift, Tensor) else shift
        return torch.from_numpy(scores.numpy() + other)
    except (RuntimeError, TypeError):  # without NumPy, or not on a CPU
        return scores + shift


class Shift:
    """How far negatives are raised and positives lowered before ranking.

    It is half the margin or, with noise, half the margin times the ``|N(0, 1)|`` of
    each entry. Up to ``DRAWS`` entries have a draw of their own. In a larger matrix
    each chunk takes a slice of so many draws, which begins at a random place.

    Args:
        margin: α >= 0.
        noise: Whether shifts are random.
        generator: Random generator for them.
    """

    def __init__(
        self,
        margin: float = 0.0,
        noise: bool = False,
        generator: Optional[torch.Generator] = None,
    ) -> None:
        self.half, self.generator = margin / 2, generator
        self.noise = noise and margin > 0
        self._places: Optional[List[int]] = None

    def draw(self, scores: Tensor, chunks: Sequence[slice]) -> None:
        """Draw the shifts of a flat matrix that is processed in these chunks."""
        if not self.noise or not chunks:
            return
        largest = max(chunk.stop - chunk.start for chunk in chunks)
        size = min(len(scores), max(DRAWS, 2 * largest))
        self._draws = self._normal(scores, size)
        if size < len(scores):
            places = scores.new_empty(len(chunks), dtype=torch.int64)
            places.random_(size - largest + 1, generator=self.generator)
            self._places = places.tolist()

    def _normal(self, like: Tensor, count: int) -> Tensor:
        draws = like.new_empty(count).normal_(generator=self.generator)
        return draws.abs_().mul_(self.half)

    def of_positives(self, index: Tensor) -> Any:
        """Return the shifts of positives (flat indices), or one number for all."""
        if not self.noise or not len(index):
            return self.half
        if self._places is not None:  # the draws of chunks are for negatives
            return self._normal(self._draws, len(index))
        return self._draws.index_select(0, index)

    def of_chunk(self, number: int, entries: slice) -> Any:
        """Return the shifts of the entries of a chunk, or one number for all."""
        if not self.noise:
            return self.half
        if self._places is None:
            return self._draws[entries]
        place = self._places[number]
        return self._draws[place : place + entries.stop - entries.start]

    def matrix(self, scores: Tensor, positives: Tensor) -> Tensor:
        """Return what to add to each entry of a matrix, (N, C).

        ``positives`` are flat indices: these entries are lowered, others raised.
        """
        result = torch.empty_like(scores, memory_format=torch.contiguous_format)
        flat = result.view(-1)
        cuts = [*range(0, len(flat), CHUNK), len(flat)]
        chunks = [slice(*of) for of in zip(cuts, cuts[1:])]
        self.draw(flat, chunks)
        for number, chunk in enumerate(chunks):
            flat[chunk] = self.of_chunk(number, chunk)
        flat[positives] = -torch.as_tensor(self.of_positives(positives)).to(flat)
        return result
