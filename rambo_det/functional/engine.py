"""Average precision and its blackbox gradient, for many sequences at once.

Only the positives of a sequence are perturbed, and a negative's rank changes only by
the positives that pass it. So it is enough to sort the positives, and to find by binary
search how many of them lie above each negative before and after the perturbation.
Negatives below every positive of their sequence have no part in either and are dropped
by one comparison.

Order everywhere: score descending, then negatives before positives, then index. The
code sorts *keys*, negated scores, ascending.
"""

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Sequences(NamedTuple):
    """Which entries of a score matrix make up which sequences.

    Attributes:
        positives: (P,) flat indices of the positives, ascending.
        negatives: (m,) flat indices of the negatives that rank above at least one
            positive of their sequence.
        positive_ids: (P,) sequence of each positive.
        negative_ids: (m,) sequence of each of these negatives.
        lengths: (S,) number of entries of each sequence, dropped ones included.
        counts: (S,) number of positives of each sequence.
    """

    positives: Tensor
    negatives: Tensor
    positive_ids: Tensor
    negative_ids: Tensor
    lengths: Tensor
    counts: Tensor


class _Ranks(NamedTuple):
    """Ranks of the positives, in the order of their indices, and of the negatives.

    Attributes:
        overall: (P,) rank among all entries of the sequence, 1 = highest.
        among_positives: (P,) rank among the positives of the sequence.
        above: (m,) number of positives above each negative.
    """

    overall: Tensor
    among_positives: Tensor
    above: Tensor


def build_sequences(
    scores: Tensor,
    positives: Tensor,
    exists: Optional[Tensor],
    row_group: Optional[Tensor],
    num_groups: int,
    per_column: bool,
) -> Sequences:
    """Split a score matrix into sequences and drop what cannot matter.

    Args:
        scores: (N, C) float tensor, detached.
        positives: (P,) flat indices of the positives, ascending.
        exists: bool tensor that broadcasts to (N, C), False where an entry is in no
            sequence; ``None`` means all exist. Positives must exist.
        row_group: (N,) int64 group 0..num_groups-1 of each row; ``None`` puts all rows
            in group 0.
        num_groups: Number of groups.
        per_column: Whether each column of a group is a sequence of its own (sequence
            ``group * C + column``), or all of its entries are one (sequence ``group``).

    Returns:
        The sequences, ``num_groups * C`` or ``num_groups`` of them.
    """
    num_rows, num_cols = scores.shape
    num_sequences = num_groups * num_cols if per_column else num_groups

    def sequence_of(index: Tensor) -> Tensor:
        if row_group is None:
            return index % num_cols if per_column else torch.zeros_like(index)
        group = row_group[torch.div(index, num_cols, rounding_mode='floor')]
        return group * num_cols + index % num_cols if per_column else group

    positive_ids = sequence_of(positives)
    positive_scores = scores.reshape(-1)[positives]
    floor = scores.new_full((num_sequences,), float('inf'))
    floor.scatter_reduce_(0, positive_ids, positive_scores, 'amin')
    # One row of thresholds per group, and per row of scores where there are groups.
    floor = floor.view(num_groups, -1)
    floor = floor if row_group is None else floor[row_group]
    relevant = (scores >= floor).contiguous()
    if exists is not None:
        relevant &= exists
    relevant.view(-1)[positives] = False
    negatives = relevant.view(-1).nonzero().squeeze(1)

    width = 1 if per_column else num_cols
    if exists is None:
        per_row = torch.full((num_rows, 1), width, device=scores.device)
    elif exists.size(1) == 1:
        per_row = exists.long() * width
    elif per_column:
        per_row = exists.long()
    else:
        per_row = exists.sum(1, keepdim=True)
    if row_group is None:
        lengths = per_row.sum(0, keepdim=True)
    else:
        lengths = per_row.new_zeros((num_groups, per_row.size(1)))
        lengths.index_add_(0, row_group, per_row)
    if per_column:
        lengths = lengths.expand(-1, num_cols)
    return Sequences(
        positives,
        negatives,
        positive_ids,
        sequence_of(negatives),
        lengths.reshape(-1),
        torch.bincount(positive_ids, minlength=num_sequences),
    )


def _locate(seqs: Sequences, positive_keys: Tensor, negative_keys: Tensor) -> _Ranks:
    """Rank the entries of all sequences, given keys (negated scores)."""
    num_positives, num_sequences = positive_keys.numel(), seqs.counts.numel()
    start = seqs.counts.cumsum(0) - seqs.counts
    order = positive_keys.argsort(stable=True)
    above = torch.searchsorted(positive_keys[order], negative_keys)
    if num_sequences > 1:
        # From the place among all positives to the one within the own sequence: a
        # second binary search, on integers that combine sequence and place.
        ids = seqs.positive_ids[order]
        by_sequence = ids.argsort(stable=True)
        stride = num_positives + 1
        places = ids[by_sequence] * stride + by_sequence
        above = torch.searchsorted(places, seqs.negative_ids * stride + above)
        above = above - start[seqs.negative_ids]
        order = order[by_sequence]
    ids = seqs.positive_ids[order]
    index = torch.arange(num_positives, device=order.device)
    among_positives = index - start[ids] + 1
    # Histogram of the negatives over the gaps between positives. A sequence with k
    # positives has k + 1 gaps, so its first gap is number start + (sequence id).
    gaps = torch.bincount(
        start[seqs.negative_ids] + seqs.negative_ids + above,
        minlength=num_positives + num_sequences,
    ).cumsum(0)
    earlier = torch.cat([gaps.new_zeros(1), gaps])[start[ids] + ids]
    overall = among_positives + gaps[index + ids] - earlier
    back = torch.empty_like(order).scatter_(0, order, index)
    return _Ranks(overall[back], among_positives[back], above)


def _mean_precision(seqs: Sequences, ranks: _Ranks, dtype: torch.dtype) -> Tensor:
    """Mean over the positives of ``rk+ / rk``, (S,); NaN without positives."""
    precision = ranks.among_positives.to(dtype) / ranks.overall.to(dtype)
    total = precision.new_zeros(seqs.counts.numel())
    return total.index_add_(0, seqs.positive_ids, precision) / seqs.counts


def sequence_average_precision(scores: Tensor, seqs: Sequences) -> Tensor:
    """Exact AP of each sequence, (S,); NaN for a sequence without positives."""
    flat = scores.reshape(-1)
    ranks = _locate(seqs, -flat[seqs.positives], -flat[seqs.negatives])
    return _mean_precision(seqs, ranks, scores.dtype)


class _SequenceAPLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, seqs: Sequences, lambd: float) -> Tensor:
        flat = scores.reshape(-1)
        positive_keys, negative_keys = -flat[seqs.positives], -flat[seqs.negatives]
        before = _locate(seqs, positive_keys, negative_keys)
        average_precision = _mean_precision(seqs, before, scores.dtype)
        loss = torch.where(seqs.counts > 0, 1 - average_precision, 0.0)

        if ctx.needs_input_grad[0]:
            # lambd * dL/d(rank / n), as n * rk+ / (P * rk^2). In floating point:
            # the product in the denominator can exceed int64.
            length = seqs.lengths.to(scores.dtype)[seqs.positive_ids]
            count = seqs.counts.to(scores.dtype)[seqs.positive_ids]
            overall = before.overall.to(scores.dtype)
            rise = lambd * length * before.among_positives.to(scores.dtype)
            rise = rise / (count * overall * overall)
            after = _locate(seqs, positive_keys - rise, negative_keys)
            climbed = before.overall - after.overall
            passed_by = after.above - before.above
            index = torch.cat([seqs.positives, seqs.negatives])
            ids = torch.cat([seqs.positive_ids, seqs.negative_ids])
            change = torch.cat([-climbed, passed_by]).to(scores.dtype)
            gradient = change / (lambd * seqs.lengths.to(scores.dtype)[ids])
            ctx.save_for_backward(index, ids, gradient)
            ctx.shape = scores.shape
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Tensor, None, None]:
        index, ids, gradient = ctx.saved_tensors
        result = gradient.new_zeros(ctx.shape)
        result.view(-1)[index] = gradient * grads[0][ids]
        return result, None, None


def sequence_ap_loss(scores: Tensor, seqs: Sequences, lambd: float) -> Tensor:
    """``1 - AP`` of each sequence with the blackbox gradient, (S,).

    Algorithm 1 runs with unit incoming gradient on each sequence; the result is
    multiplied by the incoming gradient in the backward pass. A sequence without
    positives has loss 0 and zero gradient.
    """
    loss: Tensor = _SequenceAPLoss.apply(scores, seqs, lambd)
    return loss
