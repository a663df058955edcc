"""Other losses in mmdet's RoI head, to be trained beside RaMBO under equal conditions.

The names under which they are registered are those of the recorded runs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.model import bias_init_with_prob
from torch import Tensor, nn

from ..heads import BoxAverageMixin
from .losses import ap_loss, positive_index, rank_sort_loss

LOSSES: dict[str, Callable[..., Tensor]] = dict(ap=ap_loss, rank_sort=rank_sort_loss)


@MODELS.register_module()
class RivalLoss(nn.Module):
    """A loss of sigmoids, one column per class, that mmdet's RoI heads accept.

    Args:
        name: 'ap', 'rank_sort', or 'focal', mmdet's own.
        loss_weight: Factor on the loss.
    """

    custom_cls_channels = custom_activation = custom_accuracy = True
    use_sigmoid = True

    def __init__(self, name: str, loss_weight: float = 1.0) -> None:
        super().__init__()
        if name != 'focal' and name not in LOSSES:
            raise ValueError(
                f"RivalLoss: name must be 'focal' or one of {tuple(LOSSES)}, got "
                f'{name!r}'
            )
        self.name, self.loss_weight = name, loss_weight
        self.focal = MODELS.build(dict(type='FocalLoss', use_sigmoid=True))
        self.quality: Tensor | None = None

    def get_cls_channels(self, num_classes: int) -> int:
        """Return the number of columns: one per class."""
        return num_classes

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Return the scores, with the empty background column that mmdet cuts off."""
        return nn.functional.pad(cls_score.sigmoid(), (0, 1))

    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return nothing: no accuracy is logged."""
        return {}

    def forward(
        self, pred: Tensor, target: Tensor, weight: Tensor, **kwargs: Any
    ) -> Tensor:
        """Rows of weight 0 are ignored."""
        rows = weight > 0
        pred, target = pred[rows], target[rows]
        positives = positive_index(pred, target)
        if self.name == 'focal':
            # As in dense heads, the mean over the positives.
            count = float(max(len(positives), 1))
            return self.loss_weight * self.focal(pred, target, avg_factor=count)
        compute = LOSSES[self.name]
        if self.name == 'rank_sort':
            compute = partial(compute, quality=self.quality)
        return self.loss_weight * compute(pred, target)


@MODELS.register_module()
class RivalShared2FCBBoxHead(BoxAverageMixin, Shared2FCBBoxHead):
    """mmdet's ``Shared2FCBBoxHead`` with what the rivals' losses ask for."""

    def init_weights(self) -> None:
        """Start from the scores of dense heads, 0.01."""
        super().init_weights()
        # Without it the background's 20 columns of 0.5 outweigh all else at first.
        nn.init.constant_(self.fc_cls.bias, bias_init_with_prob(0.01))

    def loss(  # type: ignore[override]
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Compute the losses; RS Loss sorts by the IoU of the predicted boxes."""
        rows = ((labels < self.num_classes) & (label_weights > 0)).nonzero().squeeze(1)
        deltas = bbox_pred.detach().view(len(labels), -1, 4)
        columns = 0 if self.reg_class_agnostic else labels[rows]
        boxes = [
            self.bbox_coder.decode(rois[rows, 1:], values)
            for values in (deltas[rows, columns], bbox_targets[rows])
        ]
        self.loss_cls.quality = bbox_overlaps(*boxes, is_aligned=True)
        return super().loss(
            cls_score,
            bbox_pred,
            rois,
            labels,
            label_weights,
            bbox_targets,
            *args,
            **kwargs,
        )
