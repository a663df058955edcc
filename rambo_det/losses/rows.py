"""The rows of one call of a ranking loss, checked; messages name what came."""

from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .ranking_loss import RankingLoss

IGNORED = -1

Images = Union[Tensor, Tuple[Tensor, int]]


class Rows(NamedTuple):
    """What a call ranks."""

    pred: Tensor  # logits (N, C), or (N, C + 1) with a background column
    labels: Tensor  # (N,) int64, IGNORED in rows of weight 0
    any_ignored: bool  # whether a row may be ignored
    any_positive: Optional[bool]  # whether a row is foreground; None if nobody looked
    images: Optional[Tuple[Tensor, int]]  # (N,) image of each row, and their number

    def harmless(self) -> 'Rows':
        """Return the rows without the NaN or inf that ignored ones may hold."""
        if not self.any_ignored:
            return self
        ignored = (self.labels < 0).unsqueeze(1)
        return self._replace(pred=self.pred.masked_fill(ignored, 0.0))


class Ranked(nn.Module):
    """Hands on what is ranked: the place for forward hooks that look at it.

    The gradient of the scores is that of the ranking alone, without the auxiliary loss.
    """

    def forward(self, scores: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor]:
        """Return scores (N, C) and labels (N,), negative in ignored rows."""
        return scores, labels


class Owner(NamedTuple):
    """What a loss knows of a head that holds it."""

    head: str  # the name of its class
    num_classes: int
    dense: bool = False  # dense heads keep all columns of the test scores
    refusal: Optional[str] = None  # why calls cannot be ranked that tell no images
    bound: Optional[str] = None  # the head that binds the loss in its stead


def hard_labels(target: Any, name: str = 'RaMBOLoss') -> Tensor:
    """Return the labels of a target ``(labels, quality)``; a tensor as it is."""
    if isinstance(target, (tuple, list)) and len(target) == 2:
        target = target[0]
    if not isinstance(target, Tensor):
        raise TypeError(
            f'{name}: target must be a tensor of labels, or (labels, quality) as '
            f'GFL and RTMDet give it, got {type(target).__name__}'
        )
    return target


def check_rows(
    loss: 'RankingLoss',
    pred: Tensor,
    target: Any,
    weight: Optional[Tensor],
    images: Optional[Images],
    objects: Optional[Tensor],
    count_images: bool = False,
) -> Rows:
    """Check what a head hands to the loss; see ``RaMBOLoss.forward`` for arguments.

    Values are only looked at if the loss checks them, and the number of images only
    counted with ``count_images``, as both may wait for the device, once together.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes or values do not fit.
        RuntimeError: If a head has to tell the images of its rows and does not.
    """
    name, has_background = loss.name, loss.has_background
    labels = hard_labels(target, name)
    index, num_images = images if isinstance(images, tuple) else (images, None)
    _check_shapes(name, pred, labels, weight, index, has_background)
    if images is None:
        for owner in loss.owners:
            if owner.refusal is not None:
                raise RuntimeError(f'{name}: {owner.refusal}')
    check_columns(loss, pred.size(1), loss.owners)
    labels = labels.long()
    ignored = None if weight is None else weight == 0
    any_ignored, any_positive = ignored is not None, None
    if loss.check_values:
        num_classes = pred.size(1) - has_background
        any_ignored, any_positive, last = _look(
            name, pred, labels, ignored, index, num_images, objects, num_classes
        )
        num_images = last + 1 if num_images is None else num_images
    if ignored is not None:
        labels = labels.masked_fill(ignored, IGNORED)
    if index is None:
        return Rows(pred, labels, any_ignored, any_positive, None)
    if num_images is None:
        num_images = int(index.max()) + 1 if count_images and len(index) else 1
    return Rows(
        pred, labels, any_ignored, any_positive, (index.long(), max(num_images, 1))
    )


def check_reduction(name: str, reduction_override: Optional[str]) -> None:
    """Raise unless the reduction is one that a ranking can have."""
    if reduction_override not in (None, 'mean', 'sum'):
        raise ValueError(
            f'{name}: reduction_override={reduction_override!r} is not '
            "possible: a ranking has no loss per row. Use None, 'mean' or 'sum' "
            '(the same here). OHEM samplers, PISA and PAA need a loss per row: use '
            'another sampler, or another loss'
        )


def check_overlaps(
    loss: 'RankingLoss', target: Any, overlaps: Optional[Tensor]
) -> Tensor:
    """Return the overlap of each row, (N,), by default the quality in the target.

    Raises:
        RuntimeError: If there is none.
        TypeError: If it is not in floating point.
        ValueError: If there is not one for each row.
    """
    name, labels = loss.name, hard_labels(target, loss.name)
    if overlaps is None and not isinstance(target, Tensor):
        overlaps = target[1]
    if overlaps is None:
        bound = next((o.bound for o in loss.owners if o.bound is not None), None)
        cure = 'a head of this package' if bound is None else f'the head type={bound}'
        other = 'overlaps=None' if hasattr(loss, 'overlaps') else 'APLoss'
        raise RuntimeError(
            f'{name} needs the IoU of each predicted box with its object, which the '
            f'head does not tell. Use {cure}, or {other}. A head of your own gives '
            'overlaps=…'
        )
    if not isinstance(overlaps, Tensor) or not overlaps.is_floating_point():
        got = getattr(overlaps, 'dtype', type(overlaps).__name__)
        raise TypeError(
            f'{name}: overlaps must be a floating-point tensor of IoUs, got {got}'
        )
    if overlaps.shape != labels.shape:
        raise ValueError(
            f'{name}: overlaps must have shape {tuple(labels.shape)}, one value per '
            f'row of pred, got {tuple(overlaps.shape)}'
        )
    return overlaps


def _check_shapes(
    loss: str,
    pred: Tensor,
    labels: Tensor,
    weight: Optional[Tensor],
    index: Optional[Tensor],
    has_background: bool,
) -> None:
    """Check shapes and types."""
    columns = f'(N, C){" with C + 1 columns for softmax" * has_background}'
    check_matrix(loss, 'pred', pred, 'logits', columns, 1 + has_background)
    check_row_values(loss, 'target', labels, pred, 'pred', 'labels')
    if index is not None:
        what = 'numbers, the image of each row'
        check_row_values(loss, 'images', index, pred, 'pred', what)
    if weight is not None:
        check_row_values(loss, 'weight', weight, pred, 'pred')


def check_matrix(
    loss: str, name: str, value: Any, what: str, shape: str, columns: int = 1
) -> None:
    """Raise unless an argument is a floating-point matrix with so many columns."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f'{loss}: {name} must be a tensor of {what}, got {type(value).__name__}'
        )
    if not value.is_floating_point():
        raise TypeError(f'{loss}: {name} must be floating point, got {value.dtype}')
    if value.dim() != 2 or value.size(1) < columns:
        raise ValueError(
            f'{loss}: {name} must have shape {shape}, got {tuple(value.shape)}'
        )


def check_row_values(
    loss: str, name: str, value: Any, rows: Tensor, of: str, integers: str = ''
) -> None:
    """Raise unless there is a value, perhaps an integer, for each row of a matrix."""
    if integers and (
        not isinstance(value, Tensor)
        or value.is_floating_point()
        or value.dtype == torch.bool
    ):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f'{loss}: {name} must hold integer {integers}, got {got}')
    if value.shape != rows.shape[:1]:
        raise ValueError(
            f'{loss}: {name} must have shape ({rows.size(0)},), one value '
            f'per row of {of} {tuple(rows.shape)}, got {tuple(value.shape)}'
        )


def check_columns(loss: 'RankingLoss', columns: int, owners: Sequence[Owner]) -> None:
    """Raise if none of the heads that hold the loss has as many columns."""
    has_background = loss.has_background
    known = {owner.head: owner.num_classes for owner in owners}
    if not known or columns - has_background in known.values():
        return
    heads = ' and '.join(f'{head} has num_classes={n}' for head, n in known.items())
    owner = owners[0]
    cures = [] if owner.bound is None else [f'the head type={owner.bound}']
    if has_background:
        need = 'C + 1, the last for the background'
        cures.append("scores='logits', use_sigmoid=True in loss_cls")
    else:
        need = 'C, one per class: a background column would be ranked as a class'
        if owner.dense:
            cures.append('use_sigmoid=True in loss_cls, where stock heads look for it')
        elif loss.takes_background:
            cures.append("scores='log_softmax', use_sigmoid=False in loss_cls")
    cures = cures or ['a head that asks the loss for its columns']
    raise ValueError(
        f'{loss.name}: pred has {columns} columns, but {heads}, and the loss expects '
        f'{need}. Use {", or ".join(cures)} (docs/detectors.md)'
    )


@torch.no_grad()
def _look(
    name: str,
    pred: Tensor,
    labels: Tensor,
    ignored: Optional[Tensor],
    index: Optional[Tensor],
    num_images: Optional[int],
    objects: Optional[Tensor],
    num_classes: int,
) -> Tuple[bool, bool, int]:
    """Return whether any row is ignored or foreground, and the last image.

    All answers are read with one device synchronisation, if all is well.
    """
    # The sum is NaN if an entry is; it may be for others' sake (inf - inf), so a
    # closer look follows. Infinite logits can be ranked, but a softmax makes them NaN.
    total = pred.sum(dtype=torch.float32)
    infinite_too = pred.size(1) > num_classes
    asked = {'suspicious': (total * 0 if infinite_too else total).isnan()}
    if len(labels):
        known = labels
        if ignored is not None:
            asked['ignored'] = ignored.any()
            known = labels.masked_fill(ignored, num_classes)
        asked['lowest'], asked['highest'] = known.aminmax()
        if index is not None:
            asked['first'], asked['last'] = index.aminmax()
    if objects is not None and objects.numel():
        asked['largest'] = objects.max()
    found = dict(zip(asked, torch.stack(list(asked.values())).tolist()))
    largest, first, last = (found.get(k, 0) for k in ('largest', 'first', 'last'))
    lowest, highest = found.get('lowest', num_classes), found.get('highest', 0)
    if largest >= num_classes:
        raise ValueError(
            f'{name}: an object of the batch has label {largest}, but the '
            f'classifier has {num_classes} class{"es" * (num_classes > 1)} (labels '
            f'0..{num_classes - 1}), so that it would be taken for background. Set '
            'num_classes of the head to the number of classes in the data '
            "(metainfo['classes']); NumClassCheckHook compares them before training"
        )
    if first < 0 or (num_images is not None and last >= max(num_images, 1)):
        expected = '>= 0' if num_images is None else f'0..{num_images - 1}'
        raise ValueError(
            f'{name}: images must hold the image of each row, {expected}, got '
            f'{first} to {last}'
        )
    if found['suspicious'] or lowest < 0 or highest > num_classes:
        _name_what_is_wrong(name, pred, labels, ignored, num_classes)
    return bool(found.get('ignored', 0)), lowest < num_classes, last


def _name_what_is_wrong(
    name: str,
    pred: Tensor,
    labels: Tensor,
    ignored: Optional[Tensor],
    num_classes: int,
) -> None:
    """Raise if there is NaN or a bad label in a row that is not ignored."""
    wrong = (labels < 0) | (labels > num_classes)
    softmax = pred.size(1) > num_classes
    infinite = softmax and not bool(pred.isnan().any())
    nan = (pred.softmax(dim=1) if softmax else pred).isnan()
    if ignored is not None:
        nan, wrong = nan & ~ignored.unsqueeze(1), wrong & ~ignored
    if bool(wrong.any()):
        raise ValueError(
            f'{name}: target must hold labels 0..C-1 (foreground) and C '
            f'(background) with C = {num_classes} columns of pred, got '
            f'{labels[wrong].unique().tolist()}; check num_classes of the head and '
            'the classes of the data set'
        )
    if bool(nan.any()):
        what = 'infinite logits, NaN after the softmax' if infinite else 'NaN'
        raise ValueError(
            f'{name}: pred contains {what} ({int(nan.sum())} of {nan.numel()} '
            'entries), which has no rank: training has diverged. Lower the '
            'learning rate, clip gradients, or look for zero-area boxes in the data'
        )
