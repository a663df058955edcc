"""Average precision and its blackbox gradient by sorting, for accelerators.

The entries of all rankings are sorted at once, by integers that hold the sequence, the
score, and whether the entry is a positive, and of which level. From then on almost all
is done with the positives alone, which are few: see ``lines.py``. What the moves cost a
negative is the difference of two running sums over them. The host never waits for the
device. ``docs/algorithm.md`` shows all this with an example.

Order everywhere: score descending, then negatives before positives, then index.
"""

from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .checks import representable
from .lines import ALL, Levels, Line, running_sums
from .sequences import Ranking


class _Integers:
    """Turns scores into integers of 32 bits: higher scores into lower ones."""

    def __init__(self, scores: Tensor) -> None:
        self._values: Optional[Tensor] = None
        if scores.dtype != torch.float32:
            self._values = torch.sort(0.0 - scores)[0]
            differs = self._values[1:] != self._values[:-1]
            self._places = pad(pad(differs, (1, 0))[: len(scores)].cumsum(0), (1, 0))
            self._places[:1] = -1

    def __call__(self, scores: Tensor) -> Tensor:
        """Return integers that are equal for equal scores.

        Others than the given ones become those of the next higher given one.
        """
        negated = 0.0 - scores  # makes +0 of both zeros
        if self._values is None:
            # The bits of floats are in order like integers; those of negative ones,
            # inverted.
            bits = negated.view(torch.int32)
            return bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return self._places[torch.searchsorted(self._values, negated, right=True)]


class _Solver:
    """The M entries of all rankings, one ranking after the other, and their order.

    Args:
        scores: (N, C).
        codes: (N, C) 0 for negatives, 1 for positives; with levels, l + 2.
        exists: (N, C) or (N, 1), False for entries that are in no sequence.
        rankings: What is ranked.
        one_per_row: Whether a row has one positive at most.
        levels: The thresholds.
        new_line: Makes the line of the loss.
    """

    def __init__(
        self,
        scores: Tensor,
        codes: Tensor,
        exists: Optional[Tensor],
        rankings: Sequence[Ranking],
        one_per_row: bool,
        levels: Levels,
        new_line: Callable[..., Line] = Line,
    ) -> None:
        self.levels = levels
        # A key is sequence * step + kinds * score + code, the score as an integer of 32
        # bits. So the keys of a sequence are within half a step of its multiple.
        lowest = 1 if levels.of_rows is None else 2  # the code of level 0
        self.bits = (levels.thresholds - 1 + lowest).bit_length()
        self.step = 1 << (32 + self.bits)
        missing = None if exists is None else ~exists
        widths = [scores.size(1) if r.per_class else 1 for r in rankings]
        sizes = [r.num_sequences(scores.size(1)) for r in rankings]
        # What does not exist has a sequence of its own. What could be a positive and is
        # none has another, beyond all entries.
        self.sizes, last = [*sizes, 1, 1], sum(sizes)
        if (last + 1) * self.step > 1 << 62:
            raise ValueError(
                f"solver='sort' ranks fewer than {(1 << 62) // self.step} sequences at "
                f'once, got {last}'
            )
        every = []
        for number, (ranking, width) in enumerate(zip(rankings, widths)):
            first = sum(sizes[:number])
            sequence = torch.arange(first, first + width, device=scores.device)
            if ranking.groups is not None:
                sequence = torch.add(sequence, ranking.groups[:, None], alpha=width)
            code = torch.add(_rows(codes, ranking), sequence, alpha=self.step)
            if missing is not None:
                code.masked_fill_(_rows(missing, ranking), last * self.step)
            every.append(code)
        self.rows = [len(code) for code in every]
        self.lambds = [representable(r.lambd, scores.dtype) for r in rankings]
        code = torch.cat(every).view(-1)
        self.scores = torch.cat([_rows(scores, r) for r in rankings]).view(-1)
        self.integers = _Integers(self.scores)
        keys = torch.add(code, self.integers(self.scores), alpha=1 << self.bits)
        self.keys, self.entry = torch.sort(keys, stable=True)
        code = code[self.entry]
        # The first place of each sequence; how many positives are before each place.
        bounds = torch.arange(
            -self.step // 2, (last + 2) * self.step, self.step, device=scores.device
        )
        self.edges = torch.searchsorted(self.keys, bounds)  # (S + 1,)
        kinds = (1 << self.bits) - 1
        kind = code & kinds
        self.above = running_sums(kind > 0 if kinds > 1 else kind)  # (M + 1,)
        # The places of the positives; M for those that could be and are not.
        most = min(sum(self.rows), len(code)) if one_per_row else len(code)
        position = torch.arange(1, most + 1, device=scores.device)
        self.place = torch.searchsorted(self.above[1:], position)
        code = pad(code, (0, 1), value=(last + 1) * self.step)[self.place]
        sequence = code // self.step
        self.start = self.edges[sequence]
        rank = self.place + 1 - self.start
        level = None if levels.of_rows is None else (code & kinds) - lowest
        self.line = new_line(
            sequence, self.above[self.edges], position, level, levels, rank=rank
        )

    @property
    def own(self) -> Tensor:
        """The scores of the positives, (Q,)."""
        return self.scores[self.entry[self.place.clamp(max=len(self.entry) - 1)]]

    def lambd(self) -> Tensor:
        """λ of each sequence, (S,)."""
        pairs = zip(self.sizes, [*self.lambds, 1.0, 1.0])
        return torch.cat([self.scores.new_full((n,), lambd) for n, lambd in pairs])

    def _reached(self, moved: Tensor) -> Tensor:
        """Count the entries down to the scores of positives that move, (…, Q)."""
        code = self.line.sequence * self.step + ((1 << self.bits) - 1)
        keys = torch.add(code, self.integers(moved), alpha=1 << self.bits)
        return torch.searchsorted(self.keys, keys, right=True)

    def _negatives(self, reached: Tensor, place: Tensor) -> Tensor:
        """Count the negatives among so many entries, ``place`` of them positives."""
        return reached - self.start - (place - self.line.first)

    def _restore(self, values: Tensor) -> Tensor:
        """Put values (M,) in the order of the entries."""
        return torch.empty_like(values).scatter_(0, self.entry, values)

    def move_together(self) -> Tuple[Tensor, float]:
        """Algorithm 1 on the ranking of a sequence: all positives move at once.

        Returns, as :meth:`move_singly` does, the gradient of ``1 - AP``, (M,), and what
        it is to be divided by.
        """
        line, dtype = self.line, self.scores.dtype
        step = self.edges.diff().to(dtype) * self.lambd()
        moved = self.own + line.rise(step[line.sequence])
        reached = self._reached(moved)
        place = self.above[reached]
        jump = line.jump(moved, self._negatives(reached, place), place)
        # A negative loses a rank for each that passes it.
        ends = torch.arange(len(self.above), device=reached.device)
        beyond = line.of_reaching(reached).view(-1).sort()[0]
        before = line.sums if line.reaches is None else line.sums.sum(0)
        ranks = torch.searchsorted(beyond, ends, right=True) - before[self.above]
        ranks.scatter_(0, self.place, jump)  # the last one is for those that are not
        sequence = (self.keys + self.step // 2) // self.step
        return self._restore(ranks[:-1] / step[sequence]), self.levels.thresholds

    def move_singly(self) -> Tuple[Tensor, float]:
        """Algorithm 1 on the rank of each positive among the negatives, on its own."""
        line, reached, place, above = self.line, self.start, None, None
        if min(self.lambds) < float('inf'):
            lambd = self.lambd()[line.sequence]
            reached = self._reached(self.own + lambd)
            reached = torch.where(lambd.isinf(), self.start, reached)
            place = self.above[reached]
            above = self._negatives(reached, place)
        rewards, parts = line.move_singly(above, place)
        # Of the positives below a negative, the first ones up to here have passed it.
        ends = torch.arange(len(self.above), device=reached.device)
        last = torch.searchsorted(reached, ends, right=True)
        sums = running_sums(parts)
        gradient = sums[last] - sums[self.above]
        gradient.scatter_(0, self.place, rewards)
        return self._restore(gradient[:-1].to(self.scores.dtype)), line.unit


def _rows(values: Tensor, ranking: Ranking) -> Tensor:
    """The rows that take part in a ranking."""
    count = ranking.num_rows
    if count is None or count >= len(values):
        return values
    return values.narrow(0, ranking.first_row, count)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, together: bool, *given: Any) -> Any:
        solver = _Solver(scores, *given)
        line = solver.line
        if ctx.needs_input_grad[0]:
            move = solver.move_together if together else solver.move_singly
            gradient, ctx.unit = move()
            gradient = gradient.view(sum(solver.rows), scores.size(1))
            ctx.save_for_backward(*gradient.split(solver.rows))
        ctx.shape, ctx.rankings = scores.shape, given[2]
        losses = (line.losses().to(scores.dtype) / line.unit).split(solver.sizes)[:-2]
        present = line.present.split(solver.sizes)[:-2]
        ctx.mark_non_differentiable(*present)
        ctx.set_materialize_grads(False)
        return (*losses, *present)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        result = ctx.saved_tensors[0].new_zeros(ctx.shape)
        for ranking, grad, gradient in zip(ctx.rankings, grads, ctx.saved_tensors):
            if grad is not None:
                if ranking.groups is not None:
                    width = ctx.shape[1] if ranking.per_class else 1
                    grad = grad.view(-1, width)[ranking.groups]
                of = _rows(result, ranking)
                of.addcmul_(gradient, grad, value=1 / ctx.unit)
        return (result, *[None] * 7)


def sort_loss(
    scores: Tensor,
    codes: Tensor,
    exists: Optional[Tensor],
    rankings: Sequence[Ranking],
    together: bool,
    one_per_row: bool = False,
    levels: Levels = ALL,
    new_line: Callable[..., Line] = Line,
) -> List[Tuple[Tensor, Tensor]]:
    """The loss of each sequence of each ranking, with the blackbox gradient.

    ``scores`` (N, C) are float32 or float64, ``codes`` (N, C) 0 for negatives, 1 for
    positives; of positives with a level, it plus 2. ``exists`` (N, C) or (N, 1) is
    False where an entry is in no sequence, or ``None``. With ``together`` all positives
    of a sequence are perturbed at once. ``one_per_row`` promises that no row has more
    positives, which saves work. ``new_line`` makes the line of a loss, by default that
    of ``1 - AP``. Returns for each ranking the losses (S,), and (S,) True where there
    is a positive.
    """
    given = codes, exists, rankings, one_per_row, levels, new_line
    results = _Loss.apply(scores, together, *given)
    return list(zip(results, results[len(rankings) :]))


def sort_average_precision(
    scores: Tensor, positive: Tensor, exists: Optional[Tensor], ranking: Ranking
) -> Tensor:
    """Exact AP of each sequence of a ranking, (S,); NaN without positives."""
    scores = scores.detach()
    solver = _Solver(scores, positive, exists, [ranking], False, ALL)
    precision = solver.line.precisions().to(scores.dtype) / solver.line.unit
    precision.masked_fill_(~solver.line.present, float('nan'))
    return precision.split(solver.sizes)[0]
