"""Short forms of other ranking losses.

Written from the papers and checked in ``tests/tools/test_benchmark_loss.py`` against
their definitions. All take the logits (N, C) of a classifier without a background
column and labels (N,), C for background, and return a scalar.

Sources:
- literal form of RaMBO: Rolínek et al., CVPR 2020 (arXiv 1912.03500), composed as in
  the authors' martius-lab/blackbox-backprop: every rank by two argsorts;
- AP Loss: Chen et al., *Towards Accurate One-Stage Object Detection with AP-Loss*, CVPR
  2019 (arXiv 1904.06373); the authors' code is cccorn/AP-loss;
- RS Loss: Oksuz et al., *Rank & Sort Loss for Object Detection and Instance
  Segmentation*, ICCV 2021 (arXiv 2107.11669); kemaloksuz/RankSortLoss;
- bucketed AP and RS Loss: Yavuz et al., *Bucketed Ranking-based Losses for Efficient
  Training of Object Detectors*, ECCV 2024 (arXiv 2407.14204); the authors' code is
  blisgard/BucketedRankingBasedLosses;
- mAPLoss: the authors' jiayisong/mAPLoss (2025), ``maploss_head.py``.
"""

from __future__ import annotations

import math
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
    """H of the papers: 0 below -δ, 1 above δ, linear between; works in place."""
    if not delta:
        return (difference >= 0).to(difference.dtype)
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
        before = _soft_step(scores - scores[i], delta)
        before[i] = 1  # the positive itself counts fully, not with H(0) = 0.5
        place = before.sum()
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


def _bucketed(
    logits: Tensor, labels: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranking errors with the negatives between two positives moved to their mean.

    Returns:
        Flat indices (P,) of the positives from the highest score down; H of their
        differences, (P, P), row i for positive i; their ranking errors (P,); and the
        flat gradient of the sum of these.
    """
    flat, positives = logits.detach().reshape(-1), positive_index(logits, labels)
    entries = (flat >= flat[positives].min() - delta).nonzero().squeeze(1)
    values, order = flat[entries].sort(descending=True)
    entries = entries[order]
    is_positive = torch.zeros_like(flat, dtype=torch.bool)
    is_positive[positives] = True
    is_positive = is_positive[entries]
    found, others = entries[is_positive], entries[~is_positive]
    # The bucket of a negative is the number of positives before it.
    bucket = is_positive.cumsum(0)[~is_positive]
    sizes = torch.bincount(bucket, minlength=len(found) + 1).to(flat)
    sums = torch.zeros_like(sizes).index_add_(0, bucket, values[~is_positive])
    means, scores = sums / sizes.clamp(min=1), values[is_positive].unsqueeze(1)
    above = _soft_step(means - scores, delta).mul_(sizes)
    before = _soft_step(scores.t() - scores, delta)
    wrong = above.sum(1)
    errors = wrong / (before.sum(1) + wrong)
    blame = (errors / wrong.clamp(min=1e-10)) @ above / sizes.clamp(min=1)
    gradient = torch.zeros_like(flat)
    gradient[found], gradient[others] = -errors, blame[bucket]
    return found, before, errors, gradient


def bucketed_ap_loss(logits: Tensor, labels: Tensor, delta: float = 1.0) -> Tensor:
    """Bucketed AP Loss, as in its authors' code.

    It is AP Loss without the interpolation, and with ``H(0)`` for the positive itself,
    where the negatives between two positives have their mean score.
    """
    if not len(positive_index(logits, labels)):
        return logits.sum() * 0
    _, _, errors, gradient = _bucketed(logits, labels, delta)
    return _GivenGradient.apply(logits, errors.mean(), gradient.div_(len(errors)))


def bucketed_rank_sort_loss(
    logits: Tensor, labels: Tensor, quality: Tensor, delta: float = 0.5
) -> Tensor:
    """Bucketed RS Loss: :func:`rank_sort_loss` with such negatives."""
    positives = positive_index(logits, labels)
    if not len(positives):
        return logits.sum() * 0
    found, before, ranking, gradient = _bucketed(logits, labels, delta)
    quality = quality[torch.searchsorted(positives, found)]
    defect = 1 - quality
    sorted_before = before * (quality >= quality.unsqueeze(1))
    missorted = before - sorted_before
    current = before @ defect / before.sum(1)
    sorting = current - sorted_before @ defect / sorted_before.sum(1)
    share = sorting / missorted.sum(1).clamp(min=1e-10)
    gradient[found] += share @ missorted - sorting
    loss = (ranking + sorting).mean()
    return _GivenGradient.apply(logits, loss, gradient.div_(len(found)))


class _ClampInward(torch.autograd.Function):
    """Clamp, with a gradient outside too where its step leads back inside."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, low: float, high: float) -> Tensor:
        ctx.bounds = low, high
        ctx.save_for_backward(values)
        return values.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (values,), (low, high), grad = ctx.saved_tensors, ctx.bounds, grads[0]
        outward = (values < low) & (grad > 0) | (values > high) & (grad < 0)
        return grad.masked_fill(outward, 0), None, None


def _shares(place: Tensor) -> tuple[Tensor, Tensor]:
    """The two bins beside each place (K,), and how much of it each gets, (K, 2)."""
    first = place.detach().floor()
    after = place - first
    bins = torch.stack([first, first + 1], 1).long()
    return bins, torch.stack([1 - after, after], 1)


def map_histogram_loss(
    logits: Tensor,
    labels: Tensor,
    quality: Tensor,
    bins: int = 200,
    limit: float = 5.0,
    progress: float = 0.5,
) -> Tensor:
    """1 - mAP over overlaps by mAPLoss' histograms of scores and overlaps.

    The Gaussians of earlier steps that mAPLoss adds to the histogram of the positives,
    its assignment, and the gradient of the boxes are left out.

    Args:
        logits: (N, C) tensor.
        labels: (N,) tensor.
        quality: (P,) IoU of each positive, in the order of the rows.
        bins: Bins of the scores, and of the overlaps.
        limit: Logits are counted in [-limit, limit].
        progress: Share of the training that is over. Higher overlaps weigh more then,
            and the mean over classes more than the AP of all classes together.
    """
    flat, positives = logits.reshape(-1), positive_index(logits, labels)
    classes, last = logits.size(1), bins - 1
    low, high = 1e-4, last - 1e-4
    # Places among the bins, the highest score and the highest overlap first.
    place = (limit - flat) * (last / (2 * limit))
    score_bins, score_shares = _shares(_ClampInward.apply(place[positives], low, high))
    iou_bins, iou_shares = _shares(((1 - quality) * last).clamp(low, high))
    cell = (positives % classes).view(-1, 1, 1) * bins + score_bins.unsqueeze(2)
    cell = cell * bins + iou_bins.unsqueeze(1)
    shares = score_shares.unsqueeze(2) * iou_shares.unsqueeze(1)
    hits = flat.new_zeros(classes * bins * bins)
    hits = hits.scatter_add(0, cell.reshape(-1), shares.reshape(-1))

    counted = place.detach() < high
    counted[positives] = False
    negatives = counted.nonzero().squeeze(1)
    place = place[negatives]
    # Above the highest bin the gradient stays.
    place = place + (low - place.detach()).clamp(min=0)
    cell, shares = _shares(place)
    cell = cell + (negatives % classes * bins).unsqueeze(1)
    misses = flat.new_zeros(classes * bins)
    misses = misses.scatter_add(0, cell.reshape(-1), shares.reshape(-1))

    step = hits.view(classes, bins, bins).cumsum(2)  # (class, score, least overlap)
    true = step.cumsum(1)
    total = misses.view(classes, bins).cumsum(1) + true[:, :, -1]
    overlap = 1 - torch.arange(bins, device=flat.device).to(flat) / last
    weight = (-10 * math.log(max(1 - progress, 1e-7)) * (overlap - 0.5)).sigmoid()
    weight = weight / weight.sum()

    def precision(true: Tensor, step: Tensor, total: Tensor) -> Tensor:
        parts = true * step / total.clamp(min=1e-12).unsqueeze(-1)
        return (parts @ weight).sum(1) / true[:, -1, -1].detach().clamp(min=1e-12)

    pooled = precision(*(x.sum(0, keepdim=True) for x in (true, step, total)))
    class_wise = precision(true, step, total).mean()
    return 1 - progress * class_wise - (1 - progress) * pooled.squeeze(0)
