"""Losses that are timed beside ours and cannot be trained with.

Written from the papers and checked in ``tests/tools/test_benchmark_loss.py`` against
their definitions. They take the logits (N, C) of a classifier without a background
column and labels (N,), C for background, and return a scalar.

- The literal form of RaMBO: Rolínek et al., CVPR 2020 (arXiv 1912.03500), composed as
  in the authors' martius-lab/blackbox-backprop: every rank by two argsorts.
- The histograms of mAPLoss: the authors' jiayisong/mAPLoss (2025), ``maploss_head.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rambo_det.functional.sequences import positive_indices


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
    targets.view(-1)[positive_indices(labels, logits.size(1))] = 1
    scores = logits - margin * (targets - 0.5)
    class_wise = _literal_term(scores.t(), targets.t(), lambd)
    pooled = _literal_term(scores.reshape(1, -1), targets.reshape(1, -1), lambd)
    return (1 - pooled_weight) * class_wise + pooled_weight * pooled


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
    classes, last = logits.size(1), bins - 1
    flat, positives = logits.reshape(-1), positive_indices(labels, classes)
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
