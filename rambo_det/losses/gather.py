"""One ranking over all processes: the rows of a step, and how they come together."""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.dist import all_gather, get_rank
from torch import Tensor

from ..functional import Ranking

# What a header begins with: whether the process failed, and its number of rows.
_FAILED, _ROWS, _FIXED = 0, 1, 2


class Received(NamedTuple):
    """What all processes have sent.

    Attributes:
        numbers: The numbers of each process.
        columns: For each column the parts of all processes, in their order.
    """

    numbers: List[List[int]]
    columns: List[List[Tensor]]


class Exchange:
    """Brings rows of all processes together, with one collective.

    Every process sends a message of bytes: a header of integers, then its columns. The
    messages of a collective must have one length, but processes have different numbers
    of rows, which nobody knows beforehand. So they are padded to the longest message
    that any process has had so far: the headers told all of them, so that they agree
    without asking. Only where one is longer than ever, as in the first step, does a
    second collective follow, in the new length. To exchange sizes first would take two
    in every step.

    Bytes keep every value as it is: labels beyond 2^24, scores of any precision.

    Args:
        count: How many numbers a process sends.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._room = 0  # for all columns, in bytes; the same in all processes

    def __call__(self, numbers: Tensor, columns: Sequence[Tensor]) -> Received:
        """Send to all processes and return what they sent; all must call this.

        Args:
            numbers: int64 tensor (count,).
            columns: Tensors with one row for each of this process' rows, possibly none;
                their types and the shapes of a row are the same in all processes.

        Raises:
            RuntimeError: If another process called :meth:`refuse` instead.
        """
        rows = len(columns[0]) if columns else 0
        widths = [c.shape[1:].numel() * c.element_size() for c in columns]
        header = torch.cat([numbers.new_tensor([0, rows]), numbers])
        body = torch.cat([_as_bytes(numbers[:0]), *map(_as_bytes, columns)])
        while True:
            headers, bodies = self._send(header, body)
            failed = [str(rank) for rank, h in enumerate(headers) if h[_FAILED]]
            if failed:
                raise RuntimeError(
                    f'RaMBOLoss: process {", ".join(failed)} stopped at what its head '
                    'gave to the loss, and without it there is no ranking over all '
                    'processes. What was wrong stands in its own error message'
                )
            needed = max(h[_ROWS] for h in headers) * sum(widths)
            if needed <= self._room:
                break
            self._room = needed
        parts: List[List[Tensor]] = [[] for _ in columns]
        for (_, count, *_), message in zip(headers, bodies):
            at = 0
            for part, column, width in zip(parts, columns, widths):
                # Copied, since a number has to begin at a multiple of its size.
                values = message[at : at + count * width].clone().view(column.dtype)
                part.append(values.view(count, *column.shape[1:]))
                at += count * width
        return Received([h[_FIXED:] for h in headers], parts)

    def refuse(self, device: torch.device) -> None:
        """Tell the other processes, which wait, that this one is about to raise.

        Args:
            device: Where its tensors are.
        """
        numbers = torch.zeros(self._count, dtype=torch.int64, device=device)
        header = torch.cat([numbers.new_tensor([1, 0]), numbers])
        self._send(header, _as_bytes(numbers[:0]))

    def _send(
        self, header: Tensor, body: Tensor
    ) -> Tuple[List[List[int]], Sequence[Tensor]]:
        """Return the headers and the columns, as bytes, of all processes."""
        body = body[: self._room]  # if this is not all of it, there is a next time
        padding = body.new_zeros(self._room - len(body))
        messages = all_gather(torch.cat([_as_bytes(header), body, padding]))
        size = header.numel() * header.element_size()
        headers = torch.stack([message[:size] for message in messages])
        return headers.view(torch.int64).tolist(), [m[size:] for m in messages]


def _as_bytes(values: Tensor) -> Tensor:
    """Return the bytes of a tensor, one-dimensional."""
    return values.detach().contiguous().view(-1).view(torch.uint8)


class Step(NamedTuple):
    """The rows that a step ranks: those of this process, or of all.

    Those of all stand in the same order in every process, the first process' first,
    without the ignored ones: all processes rank the same matrix. Only the scores of a
    process' own rows are connected to its graph.

    Attributes:
        scores: (N, C) scores.
        labels: (N,) labels, negative where a row is ignored.
        any_ignored: Whether one may be.
        first: The first of the own rows.
        kept: Which of its own rows the process ranks; ``None`` for all.
        processes: How many processes there are.
        present: For each ranking with groups, how many of its sequences have a
            positive, in all processes; ``None`` with one process.
        generator: Draws the same numbers in all processes; ``None`` for PyTorch's own.
    """

    scores: Tensor
    labels: Tensor
    any_ignored: bool
    first: int = 0
    kept: Optional[Tensor] = None
    processes: int = 1
    present: Optional[List[int]] = None
    generator: Optional[torch.Generator] = None

    def place(self, ranking: Ranking) -> Ranking:
        """Return a ranking of the own rows as one of the rows of the step.

        With groups, such as images, it stays one of the own rows, since those of other
        processes are in other groups. Without, it becomes one of all rows.
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

    def means(
        self, rankings: Sequence[Ranking], results: Sequence[Tuple[Tensor, Tensor]]
    ) -> List[Tensor]:
        """Return for each ranking the mean over the sequences that have a positive.

        The sequences are those of all processes. ``DistributedDataParallel`` averages
        the gradients of the processes, where the gradient of the loss over all rows is
        their sum: hence a factor on the gradient. The value has it only where it is the
        sum over a process' own sequences, so that the average of what the processes
        report is the loss over all rows.

        Args:
            rankings: What was ranked.
            results: For each sequence its loss, 0 without a positive, and whether there
                is one.
        """
        means = []
        for number, (ranking, (losses, present)) in enumerate(zip(rankings, results)):
            if self.present is not None and ranking.groups is not None:
                count = max(self.present[number], 1)
                means.append(losses.sum() * (self.processes / count))
                continue
            mean = losses.sum() / present.sum().clamp(min=1)
            if self.processes > 1:
                mean = mean.detach() + self.processes * (mean - mean.detach())
            means.append(mean)
        return means


def gather_step(
    exchange: Exchange,
    scores: Tensor,
    labels: Tensor,
    rankings: Sequence[Ranking],
    any_ignored: bool,
    noise: bool,
) -> Step:
    """Bring the rows of all processes together; all must call this.

    Scores are sent only if a ranking has no groups; the others need to know no more of
    the other processes than how many sequences these have.

    Random shifts are drawn after the rows have met, for all rows and for the memory,
    by generators with one seed, the first process'. Then all processes rank the same
    shifted scores, and the memory keeps scores without shifts.

    Args:
        exchange: Has sent the preceding steps, in all processes.
        scores: (N, C) scores of this process.
        labels: (N,) labels, negative where a row is ignored.
        rankings: Rankings of these rows.
        any_ignored: Whether a row may be ignored.
        noise: Whether random numbers will be drawn.
    """
    seed = int(torch.randint(2**62, ())) if noise else 0
    counts = [_count_present(labels, ranking, scores.size(1)) for ranking in rankings]
    numbers = torch.stack([labels.new_tensor(seed), *counts])
    kept = None
    columns: List[Tensor] = []
    if any(ranking.groups is None for ranking in rankings):
        if any_ignored:
            kept = (labels >= 0).nonzero().squeeze(1)
            scores, labels = scores.index_select(0, kept), labels.index_select(0, kept)
            any_ignored = False
        columns = [scores, labels]
    received = exchange(numbers, columns)
    (seed, *_), *_ = received.numbers
    _, *present = (sum(values) for values in zip(*received.numbers))
    step = Step(
        scores,
        labels,
        any_ignored,
        kept=kept,
        processes=len(received.numbers),
        present=present,
    )
    if not columns:
        return step
    all_scores, all_labels = received.columns
    rank = get_rank()
    all_scores[rank] = scores  # which has a gradient
    generator = None
    if noise:
        generator = torch.Generator(device=scores.device).manual_seed(seed)
    return step._replace(
        scores=torch.cat(all_scores),
        labels=torch.cat(all_labels),
        first=sum(map(len, all_labels[:rank])),
        generator=generator,
    )


def _count_present(labels: Tensor, ranking: Ranking, num_classes: int) -> Tensor:
    """Count the sequences with a positive of a ranking that has groups; else 0."""
    groups, size = ranking.groups, ranking.num_groups
    if groups is None:
        return labels.new_zeros(())
    if ranking.per_class:
        groups, size = groups * num_classes + labels, size * num_classes
    positive = (labels >= 0) & (labels < num_classes)
    # One place more, for all rows that are not positive.
    found = labels.new_zeros(size + 1)
    found.scatter_(0, torch.where(positive, groups, size), 1)
    return found[:-1].sum()
