"""Short forms of other ranking losses.

Written from the papers and checked in ``tests/test_benchmark_loss.py`` against their
definitions. All take the logits (N, C) of a classifier without a background column and
labels (N,), C for background, and return a scalar.

Sources:
- literal form of RaMBO: Rolínek et al., CVPR 2020 (arXiv 1912.03500), composed as in
  the authors' martius-lab/blackbox-backprop: every rank by two argsorts;
- AP Loss: Chen et al., *Towards Accurate One-Stage Object Detection with AP-Loss*, CVPR
  2019 (arXiv 1904.06373); the authors' code is cccorn/AP-loss;
- RS Loss: Oksuz et al., *Rank & Sort Loss for Object Detection and Instance
  Segmentation*, ICCV 2021 (arXiv 2107.11669); kemaloksuz/RankSortLoss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def positive_index(logits: Tensor, labels: Tensor) -> Tensor:
    """Flat indices of the positive entries, one per foreground row."""
    rows = (labels < logits.size(1)).nonzero().squeeze(1)
    return rows * logits.size(1) + labels[rows]


def _normalised_rank(scores: Tensor) -> Tensor:
    """Rank of each entry in its row, 1 = highest, divided by the row's length."""
    order = scores.argsort(dim=1, descending=True)
    return (order.argsort(dim=1) + 1).to(scores.dtype) / scores.size(1)


class _BlackboxRank(torch.autograd.Function):
    """Algorithm 1 of Rolínek et al., with whatever gradient comes in."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, lambd: float) -> Tensor:
        ranks = _normalised_rank(scores)
        ctx.lambd = lambd
        ctx.save_for_backward(scores, ranks)
        return ranks

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        scores, ranks = ctx.saved_tensors
        moved = _normalised_rank(scores + ctx.lambd * grads[0])
        return (moved - ranks) / ctx.lambd, None


def _literal_term(scores: Tensor, targets: Tensor, lambd: float) -> Tensor:
    """Mean of ``1 - AP`` over the rows with a positive: six argsorts in all."""
    ranks = _BlackboxRank.apply(scores, lambd)
    # Ranks are at most 1, so adding 2 puts the positives before everything else.
    among_positives = _normalised_rank(2 * targets - ranks.detach())
    count = targets.sum(1)
    precision = (among_positives / ranks * targets).sum(1) / count.clamp(min=1)
    return 1 - precision[count > 0].mean()


def literal_loss(
    logits: Tensor,
    labels: Tensor,
    lambd: float = 0.5,
    margin: float = 0.15,
    pooled_weight: float = 1 / 3,
) -> Tensor:
    """Class-wise and pooled AP as the reference composes them: twelve argsorts.

    The margin is fixed. Unlike in the reference, no ε biases AP, and no assertion
    costs time.
    """
    targets = torch.zeros_like(logits)
    targets.view(-1)[positive_index(logits, labels)] = 1
    scores = logits - margin * (targets - 0.5)
    class_wise = _literal_term(scores.t(), targets.t(), lambd)
    pooled = _literal_term(scores.reshape(1, -1), targets.reshape(1, -1), lambd)
    return (1 - pooled_weight) * class_wise + pooled_weight * pooled


class _GivenGradient(torch.autograd.Function):
    """A loss whose gradient was computed along with it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.shape = logits.shape
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gradient = ctx.saved_tensors[0] * grads[0]
        return gradient.view(ctx.shape), None, None


def _soft_step(difference: Tensor, delta: float) -> Tensor:
    """H of both papers: 0 below -δ, 1 above δ, linear between; works in place."""
    return difference.div_(2 * delta).add_(0.5).clamp_(0, 1)


def _relevant(flat: Tensor, positives: Tensor, delta: float) -> Tensor:
    """Flat indices of the negatives for which some positive has ``H > 0``."""
    relevant = flat >= flat[positives].min() - delta
    relevant[positives] = False
    return relevant.nonzero().squeeze(1)


def ap_loss(logits: Tensor, labels: Tensor, delta: float = 1.0) -> Tensor:
    """AP Loss: error-driven update on the interpolated AP of all entries together.

    With ``L_ij = H(s_j - s_i) / rank_i`` for positive i and negative j, the update of a
    score is the sum of the errors it causes minus the sum of those it suffers. From the
    lowest positive up, precision may not fall; a row is scaled where it would.
    """
    flat, positives = logits.detach().reshape(-1), positive_index(logits, labels)
    if not len(positives):
        return logits.sum() * 0
    negatives = _relevant(flat, positives, delta)
    scores, others = flat[positives], flat[negatives]
    gradient = torch.zeros_like(flat)
    errors, blame = torch.zeros_like(scores), torch.zeros_like(others)
    least = flat.new_ones(())
    for i in scores.argsort().tolist():
        # The positive itself counts fully, not with H(0) = 0.5.
        place = _soft_step(scores - scores[i], delta).sum() + 0.5
        above = _soft_step(others - scores[i], delta)
        wrong = above.sum()
        least = torch.minimum(least, wrong / (place + wrong))
        errors[i] = least
        blame += above.mul_(least / wrong.clamp(min=1e-10))
    gradient[positives], gradient[negatives] = -errors, blame
    return _GivenGradient.apply(logits, errors.mean(), gradient.div_(len(positives)))


def rank_sort_loss(
    logits: Tensor, labels: Tensor, quality: Tensor, delta: float = 0.5
) -> Tensor:
    """RS Loss: rank positives above negatives and sort them by quality.

    Args:
        logits: (N, C) tensor.
        labels: (N,) tensor.
        quality: (P,) IoU of each positive, in the order of the rows.
        delta: Half the width of the soft step.
    """
    flat, positives = logits.detach().reshape(-1), positive_index(logits, labels)
    if not len(positives):
        return logits.sum() * 0
    negatives = _relevant(flat, positives, delta)
    scores, others = flat[positives], flat[negatives]
    gradient = torch.zeros_like(flat)
    update, blame = torch.zeros_like(scores), torch.zeros_like(others)
    total, defect = flat.new_zeros(()), 1 - quality
    for i in range(len(positives)):
        before = _soft_step(scores - scores[i], delta)
        above = _soft_step(others - scores[i], delta)
        place, wrong = before.sum(), above.sum()
        rank = place + wrong
        # Those that may stay before i: of its quality or better.
        sorted_before = before * (quality >= quality[i])
        missorted = before - sorted_before
        current = (before * defect).sum() / place
        target = (sorted_before * defect).sum() / sorted_before.sum()
        ranking, sorting = wrong / rank, current - target
        update[i] -= ranking + sorting
        update += missorted * (sorting / missorted.sum().clamp(min=1e-10))
        blame += above.div_(rank)
        total += ranking + sorting
    gradient[positives], gradient[negatives] = update, blame
    count = len(positives)
    return _GivenGradient.apply(logits, total / count, gradient.div_(count))
