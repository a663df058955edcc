"""One ranking over all processes: the rows of a step, and how they come together."""

import itertools
import math
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Callable, ClassVar, Iterator, List, NamedTuple, Optional, Sequence

import torch
from mmengine.dist import all_gather, all_gather_object, get_rank
from mmengine.logging import MessageHub
from torch import Tensor

from ..functional import Ranking


class Received(NamedTuple):
    """What all processes have sent: the numbers of each, the parts of each column."""

    numbers: List[List[int]]
    columns: List[List[Tensor]]


_NUMBERS = 3  # that a header has room for
_A_MEAN = 'a mean'
Mean = Callable[[Tensor], Tensor]
_BUILT = itertools.count(1)


class _Header(NamedTuple):
    """What a process sends first, always of the same length."""

    failed: int
    rows: int
    agreed: int  # what has to be the same in all processes
    numbers: List[int]


class Exchange:
    """Brings the rows of all processes together.

    No process knows how many rows the others have. So each one first sends a header,
    which tells it, and then its columns, padded to the longest. Columns keep their
    types, so that every value arrives as it is.

    The header also says whose exchange this is, in which iteration of mmengine's
    training, how often it was expected, and what the columns are. If that is not the
    same in all processes, none of them goes on.

    Whatever processes wait for, it begins with a header. So one that fails tells all
    of them by sending one, without knowing in which exchange they are.

    Args:
        owner: What messages call the loss.
    """

    # Headers that this process has sent, and how often one told of a failure.
    sent: ClassVar[int] = 0
    failures: ClassVar[int] = 0

    def __init__(self, owner: str) -> None:
        self._owner = owner
        # The same in all processes, as they build the same model.
        self._number = next(_BUILT)
        self._calls = 0
        self._inside = self._awaited = False

    @contextmanager
    def expected(self, together: bool) -> Iterator[Optional[Mean]]:
        """Tell the other processes, if they wait, that this one raised before its call.

        A head enters it, and again the loss that the head calls.

        Args:
            together: Whether the others will wait for this process.

        Yields:
            What the head uses for mmdet's ``reduce_mean``, if others wait.
        """
        entered = together and not self._inside
        if entered:
            self._inside = self._awaited = True
            self._calls += 1
        try:
            yield self.mean if together else None
        except Exception:
            if entered and self._awaited:
                self.tell()
            raise
        finally:
            if entered:
                self._inside = self._awaited = False

    def __call__(self, numbers: Tensor, columns: Sequence[Tensor]) -> Received:
        """Send to all processes and return what they sent; all must call this.

        Args:
            numbers: int64 tensor (K,) with at most three numbers.
            columns: Tensors with one row for each of this process' rows, possibly none.

        Raises:
            RuntimeError: If another process raised, or does not do the same.
        """
        kinds = [f'{math.prod(c.shape[1:])} x {str(c.dtype)[6:]}' for c in columns]
        self._awaited = False  # from here on the others know
        rows = len(columns[0]) if columns else 0
        headers = self._agree(numbers, f'columns {", ".join(kinds) or "none"}', rows)
        counts = [header.rows for header in headers]
        return Received(
            [header.numbers for header in headers],
            [_all_rows(column, counts) for column in columns],
        )

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a number over all processes; all must call this.

        It is mmdet's ``reduce_mean``, in which a process that fails can be heard.
        """
        bits = value.detach().double().reshape(1).view(torch.int64)
        try:
            headers = self._agree(bits, _A_MEAN)
        except RuntimeError:
            self._awaited = False
            raise
        sent = torch.tensor([header.numbers[0] for header in headers])
        values = sent.view(torch.float64).tolist()
        return torch.full_like(value, math.fsum(values) / len(values))

    def tell(self) -> None:
        """Tell the other processes, which wait, that this one has failed."""
        Exchange.failures += 1
        with suppress(Exception):  # the first error says what was wrong
            self._send(torch.zeros(0, dtype=torch.int64), '', failed=True)

    def _agree(self, numbers: Tensor, what: str, rows: int = 0) -> List[_Header]:
        """Return the headers of all processes, unless one has failed or differs."""
        headers = self._send(numbers, self._describe(what), rows)
        failed = [str(rank) for rank, header in enumerate(headers) if header.failed]
        if failed:
            Exchange.failures += 1
            raise RuntimeError(
                f'{self._owner}: process {", ".join(failed)} stopped before it ranked, '
                'and without it there is no ranking over all processes. Its own error '
                'message says what was wrong'
            )
        if len({header.agreed for header in headers}) > 1:
            Exchange.failures += 1
            found = all_gather_object(self._describe(what))
            listed = ''.join(f'\n  process {i}: {each}' for i, each in enumerate(found))
            raise RuntimeError(
                f'{self._owner}: the processes do not rank the same together, so none '
                f'goes on:{listed}\nAll need the same model, classes and precision, '
                'and have to call every loss in every step, also without rows. For a '
                'head that does not, set gather=False in the loss'
            )
        return headers

    def _describe(self, what: str) -> str:
        """Say what has to be the same in all processes."""
        iteration = MessageHub.get_current_instance().runtime_info.get('iter')
        where = '' if iteration is None else f'iteration {iteration + 1}, '
        return f'{where}call {self._calls} of loss {self._number}, {what}'

    def _send(
        self, numbers: Tensor, text: str, rows: int = 0, failed: bool = False
    ) -> List[_Header]:
        """Send this process' header and return those of all."""
        Exchange.sent += 1
        digest = blake2b(text.encode(), digest_size=7).digest()
        agreed = int.from_bytes(digest, 'big')
        # Filled on the device, as copying to it would wait.
        parts = [numbers.new_full((1,), value) for value in (failed, rows)]
        parts.append(numbers.new_full((1 + _NUMBERS - len(numbers),), agreed))
        header = torch.cat([*parts, numbers])
        try:
            found = torch.stack(list(all_gather(header))).tolist()
        except RuntimeError as error:
            raise RuntimeError(
                f'{self._owner}: another process has ended, or did not come to this '
                f'one, which waits in {text or "an error"}: {error}. All have to call '
                'every loss in every step, also without rows'
            ) from error
        last = slice(-len(numbers), None)
        return [_Header(each[0], each[1], each[2], each[last]) for each in found]


def _all_rows(column: Tensor, counts: Sequence[int]) -> List[Tensor]:
    """Return the column of each process, which has so many rows, without gradient."""
    column = column.detach()
    if not any(counts):
        return [column for _ in counts]
    padded = column.new_zeros(max(counts), *column.shape[1:])
    padded[: len(column)] = column
    return [part[:count] for part, count in zip(all_gather(padded), counts)]


class Step(NamedTuple):
    """The rows that a step ranks: those of this process, or of all.

    The rows of all processes have the same order in each, the first process' first, and
    no ignored ones. Only the scores of its own rows are connected to a process' graph.
    """

    scores: Tensor  # (N, C)
    labels: Tensor  # (N,), negative where a row is ignored
    levels: Optional[Tensor]  # (N,), see ``detection_ap_loss``
    any_ignored: bool  # whether a row may be
    first: int = 0  # the first of the own rows
    kept: Optional[Tensor] = None  # which of them are ranked; None for all
    processes: int = 1
    # For each ranking with groups, how many sequences in all have a positive.
    present: Optional[List[int]] = None
    generator: Optional[torch.Generator] = None  # draws the same in all processes

    def place(self, ranking: Ranking) -> Ranking:
        """Return a ranking of the own rows as one of the rows of the step.

        Without groups it becomes a ranking of all rows. With groups, such as images, it
        remains one of the own rows, since other processes have other groups.
        """
        groups = ranking.groups
        if groups is None:
            rows = None if ranking.num_rows is None else len(self.labels)
            return ranking._replace(num_rows=rows)
        if self.kept is not None:
            groups = groups.index_select(0, self.kept)
        return ranking._replace(
            groups=groups, num_rows=len(groups), first_row=self.first
        )

    def over_all(
        self, rankings: List[Ranking], losses: List[Tensor], means: List[Tensor]
    ) -> List[Tensor]:
        """Turn the means over the own sequences into those over all processes'.

        The gradient of the loss over all rows is the sum over the processes, and
        ``DistributedDataParallel`` averages: hence the factor on it. The value has the
        factor too where the mean is over a process' own sequences: the average of what
        the processes report is the loss.
        """
        found = []
        for number, (ranking, own, mean) in enumerate(zip(rankings, losses, means)):
            if self.present is not None and ranking.groups is not None:
                mean = own.sum() * (self.processes / max(self.present[number], 1))
            elif self.processes > 1:
                mean = mean.detach() + self.processes * (mean - mean.detach())
            found.append(mean)
        return found


def gather_step(
    exchange: Exchange, own: Step, rankings: Sequence[Ranking], noise: bool
) -> Step:
    """Bring the own rows and those of all processes together; all must call this.

    Rows are sent only if a ranking has no groups. For a ranking with groups it is
    enough to know how many sequences the other processes have.

    With ``noise``, random shifts will be drawn for all rows and for the memory. The
    generator has the first process' seed: all processes rank the same shifted scores.
    """
    scores, labels, levels, any_ignored = own[:4]
    seed = int(torch.randint(2**62, ())) if noise else 0
    counts = [_count_present(labels, ranking, scores.size(1)) for ranking in rankings]
    numbers = torch.stack([labels.new_full((), seed), *counts])
    kept = None
    columns: List[Tensor] = []
    if any(ranking.groups is None for ranking in rankings):
        if any_ignored:
            kept = (labels >= 0).nonzero().squeeze(1)
            scores, labels = scores.index_select(0, kept), labels.index_select(0, kept)
            levels = None if levels is None else levels.index_select(0, kept)
            any_ignored = False
        columns = [scores, labels, *([] if levels is None else [levels])]
    received = exchange(numbers, columns)
    seeds, *found = zip(*received.numbers)
    present = [sum(counts) for counts in found]
    step = Step(scores, labels, levels, any_ignored, 0, kept, len(seeds), present)
    if not columns:
        return step
    all_scores, all_labels, *all_levels = received.columns
    rank = get_rank()
    all_scores[rank] = scores  # which has a gradient
    if noise:
        generator = torch.Generator(scores.device).manual_seed(seeds[0])
        step = step._replace(generator=generator)
    return step._replace(
        scores=torch.cat(all_scores),
        labels=torch.cat(all_labels),
        levels=torch.cat(all_levels[0]) if all_levels else None,
        first=sum(map(len, all_labels[:rank])),
    )


def _count_present(labels: Tensor, ranking: Ranking, num_classes: int) -> Tensor:
    """Count the sequences with a positive of a ranking that has groups; else 0."""
    groups, size = ranking.groups, ranking.num_groups
    if groups is None:
        return labels.new_zeros(())
    if ranking.per_class:
        groups, size = groups * num_classes + labels, size * num_classes
    positive = (labels >= 0) & (labels < num_classes)
    found = labels.new_zeros(size + 1)  # the last place is for all other rows
    found.scatter_(0, torch.where(positive, groups, size), 1)
    return found[:-1].sum()
