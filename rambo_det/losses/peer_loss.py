"""What the losses of other papers have in common."""

from typing import Any, Optional

import torch
from torch import Tensor

from ..functional.checks import at_least_float32
from .arguments import INHERITED, number, refuse_unknown
from .ranking_loss import RankingLoss
from .rows import Images, check_reduction, check_rows


class PeerLoss(RankingLoss):
    """A ranking loss of another paper, for comparison: all rows of a call together.

    In distributed training each process ranks its own rows.

    Args:
        delta: δ, half the width of the soft step; 0 is a hard step.
        use_sigmoid: Read by mmdet's heads; True, as there is no background column.
        loss_weight: Factor on the loss. Defaults to 1.
        check_values: Whether to look for NaN and labels out of range in each step.

    Raises:
        TypeError: If an argument is unknown or has the wrong type.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        delta: float,
        use_sigmoid: bool = True,
        loss_weight: float = 1.0,
        check_values: bool = True,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(self.name, unknown)
        if use_sigmoid is not True:
            raise ValueError(
                f'{self.name}: use_sigmoid must be True, got {use_sigmoid!r}: the loss '
                f'ranks one column per class and no background. {INHERITED}'
            )
        self.use_sigmoid = use_sigmoid
        self.delta = number('delta', delta, loss=self.name)
        self.loss_weight = number('loss_weight', loss_weight, loss=self.name)
        self.check_values = bool(check_values)

    def extra_repr(self) -> str:
        """Show the settings in the printed model."""
        return f'delta={self.delta}, loss_weight={self.loss_weight}'

    def rank(self, pred: Tensor, labels: Tensor, quality: Optional[Tensor]) -> Tensor:
        """Return the loss of rows none of which is ignored.

        Args:
            pred (Tensor): Logits (N, C).
            labels (Tensor): Labels (N,), C for background.
            quality (Tensor, optional): Overlap of the box of each row that is
                foreground, (P,); where ``needs_quality``.
        """
        raise NotImplementedError

    @torch.compiler.disable  # its shapes change with every batch
    def forward(
        self,
        pred: Tensor,
        target: Any,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[float] = None,
        reduction_override: Optional[str] = None,
        *,
        images: Optional[Images] = None,
        objects: Optional[Tensor] = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            pred (Tensor): Logits of shape (N, C); half precision is ranked in float32.
            target (Tensor | tuple[Tensor, Tensor]): Labels of shape (N,): 0..C-1
                foreground, C background; or these and the overlap (N,) of the box of
                each row with its object, for losses that rank by it.
            weight (Tensor, optional): Shape (N,). Rows of weight 0 are ignored; other
                values make no difference in a ranking.
            avg_factor (float, optional): Ignored: the loss is a mean over the
                positives.
            reduction_override (str, optional): ``None``, 'mean' and 'sum' mean the
                same; 'none' raises, since a ranking has no loss per row.
            images (Tensor | tuple[Tensor, int], optional): The image of each row, as
                the bound heads give it. It is checked; all images are ranked together.
            objects (Tensor, optional): The labels of the ground truth, (G,). They are
                checked, since matching may turn one beyond the classes into background.

        Returns:
            Tensor: The loss, a scalar; 0 with zero gradient without positives.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If shapes do not fit, a label is out of range, ``pred``
                contains NaN, or ``reduction_override`` is 'none' or unknown.
            RuntimeError: If the head that calls has to tell the images and does not.
        """
        check_reduction(self.name, reduction_override)
        rows = check_rows(self, pred, target, weight, images, objects)
        pred, labels = at_least_float32(rows.pred), rows.labels
        quality = self._quality(target, labels, rows.pred)
        if rows.any_ignored:
            kept = labels >= 0
            pred, labels = pred[kept], labels[kept]
        return self.loss_weight * self.rank(pred, labels, quality)

    def _quality(self, target: Any, labels: Tensor, pred: Tensor) -> Optional[Tensor]:
        """Return the quality of each row that is foreground, (P,), checked."""
        if not self.needs_quality:
            return None
        if isinstance(target, Tensor):
            if not len(labels):
                return pred.new_zeros(0)
            raise TypeError(
                f'{self.name}: target must be (labels, quality), got labels alone: the '
                'loss sorts by the overlap of each box. RaMBO… heads of RoI heads with '
                'box deltas, RPN, RetinaNet, ATSS, GFL and RTMDet give it '
                '(docs/baselines.md); with others use APLoss'
            )
        quality = target[1]
        if not isinstance(quality, Tensor) or not quality.is_floating_point():
            got = getattr(quality, 'dtype', type(quality).__name__)
            raise TypeError(f'{self.name}: quality must be floating point, got {got}')
        if quality.shape != labels.shape:
            raise ValueError(
                f'{self.name}: quality must have shape ({len(labels)},), one value per '
                f'row of pred {tuple(pred.shape)}, got {tuple(quality.shape)}'
            )
        quality = quality[(labels >= 0) & (labels < pred.size(1))]
        if self.check_values and not bool(((quality >= 0) & (quality <= 1)).all()):
            raise ValueError(
                f'{self.name}: quality must be an overlap in [0, 1], got '
                f'{quality.min().item():g} to {quality.max().item():g} for positives'
            )
        return quality
