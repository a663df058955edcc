"""Checks of what a head hands to RaMBOLoss; messages name what came."""

from typing import Optional, Tuple

import torch
from torch import Tensor

IGNORED = -1


def check_shapes(
    pred: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    index: Optional[Tensor],
    has_background: bool,
) -> None:
    """Check shapes and types.

    Args:
        pred: Logits, expected of shape (N, C), or (N, C + 1) with a background column.
        target: Labels, expected of shape (N,).
        weight: Weights, expected of shape (N,), if any.
        index: The image of each row, expected of shape (N,), if known.
        has_background: Whether there is a background column.

    Raises:
        TypeError: If ``pred`` or ``target`` has the wrong type.
        ValueError: If a shape is not as expected.
    """
    if not pred.is_floating_point():
        raise TypeError(f'RaMBOLoss: pred must be floating point, got {pred.dtype}')
    if pred.dim() != 2 or pred.size(1) < 1 + has_background:
        raise ValueError(
            'RaMBOLoss: pred must have shape (N, C)'
            + (' with C + 1 columns for softmax' if has_background else '')
            + f', got {tuple(pred.shape)}'
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(
            f'RaMBOLoss: target must hold integer labels, got {target.dtype}'
        )
    given = (('target', target), ('weight', weight), ('the image index', index))
    for name, value in given:
        if value is not None and value.shape != pred.shape[:1]:
            raise ValueError(
                f'RaMBOLoss: {name} must have shape ({pred.size(0)},), one value '
                f'per row of pred {tuple(pred.shape)}, got {tuple(value.shape)}'
            )


def check_reduction(reduction_override: Optional[str]) -> None:
    """Raise unless the reduction is one that a ranking can have."""
    if reduction_override not in (None, 'mean', 'sum'):
        raise ValueError(
            f'RaMBOLoss: reduction_override={reduction_override!r} is not '
            "possible: a ranking has no loss per row. Use None, 'mean' or 'sum' "
            '(the same here)'
        )


def check_values(
    pred: Tensor, labels: Tensor, ignored: Optional[Tensor], num_classes: int
) -> bool:
    """Look for NaN and bad labels, with one device synchronisation.

    Args:
        pred: Logits of shape (N, C) or (N, C + 1).
        labels: Labels of shape (N,).
        ignored: Which rows are ignored, (N,), if any may be.
        num_classes: C.

    Returns:
        Whether any row is ignored.

    Raises:
        ValueError: If a row that is not ignored has NaN, before or after the softmax,
            or a label out of range.
    """
    pred = pred.detach()
    softmax = pred.size(1) > num_classes
    wrong = (labels < 0) | (labels > num_classes)
    # The sum is NaN if an entry is; it may be for others' sake (inf - inf), so a
    # closer look follows. One synchronisation for all three answers. Infinite logits
    # can be ranked, but a softmax turns them into NaN.
    total = pred.sum(dtype=torch.float32)
    suspicious = ~total.isfinite() if softmax else total.isnan()
    none = wrong.new_zeros(())
    flags = torch.stack(
        [suspicious, wrong.any(), none if ignored is None else ignored.any()]
    ).tolist()
    if not (flags[0] or flags[1]):
        return bool(flags[2])
    infinite = softmax and not bool(pred.isnan().any())
    nan = (pred.softmax(dim=1) if softmax else pred).isnan()
    if ignored is not None:
        nan, wrong = nan & ~ignored.unsqueeze(1), wrong & ~ignored
    if bool(wrong.any()):
        raise ValueError(
            'RaMBOLoss: target must hold labels 0..C-1 (foreground) and C '
            f'(background) with C = {num_classes} columns of pred, got '
            f'{labels[wrong].unique().tolist()}; check num_classes of the head and '
            'the classes of the data set'
        )
    if bool(nan.any()):
        what = 'infinite logits, NaN after the softmax' if infinite else 'NaN'
        raise ValueError(
            f'RaMBOLoss: pred contains {what} ({int(nan.sum())} of {nan.numel()} '
            'entries), which has no rank: training has diverged. Lower the '
            'learning rate, clip gradients, or look for zero-area boxes in the data'
        )
    return bool(flags[2])


def ranked_labels(
    pred: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    has_background: bool,
    look: bool,
) -> Tuple[Tensor, bool]:
    """Return the labels to rank by: int64, and ``IGNORED`` in rows of weight 0.

    Args:
        pred: Logits of shape (N, C), or (N, C + 1) with a background column.
        target: Labels of shape (N,).
        weight: Weights of shape (N,), if any.
        has_background: Whether there is a background column.
        look: Whether to look for NaN and bad labels, see :func:`check_values`.

    Returns:
        The labels of shape (N,), and whether any row may be ignored.

    Raises:
        ValueError: If a row that is not ignored has NaN or a label out of range.
    """
    labels = target.long()
    ignored = None if weight is None else weight == 0
    any_ignored = True
    if look:
        num_classes = pred.size(1) - has_background
        any_ignored = check_values(pred, labels, ignored, num_classes)
    if ignored is not None:
        labels = labels.masked_fill(ignored, IGNORED)
    return labels, any_ignored
