"""Focal loss for RoI heads."""

from typing import Any, Optional

from mmdet.models.losses import FocalLoss
from mmdet.registry import MODELS
from torch import Tensor

from .ranking_loss import RankingLoss


@MODELS.register_module()
class RoIFocalLoss(FocalLoss):
    """mmdet's ``FocalLoss`` as its dense heads use it, for its RoI heads.

    Those give ``FocalLoss`` a background column, read its outputs as a softmax, and
    divide by the number of proposals. Here there is one column per class, the scores
    are sigmoids, and the loss is the mean over the positives. No ranking is made, so
    that mmdet's own heads do. The arguments are those of ``FocalLoss``.
    """

    custom_cls_channels = custom_activation = custom_accuracy = True
    has_background, owners = False, ()
    get_cls_channels = RankingLoss.get_cls_channels
    get_activation = RankingLoss.get_activation
    get_accuracy = RankingLoss.get_accuracy

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[float] = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the loss; ``avg_factor`` is ignored, the rest is as in mmdet."""
        positive = target < pred.size(1)
        if weight is not None:
            positive = positive & (weight > 0)
        count = positive.sum().clamp(min=1).item()
        return super().forward(pred, target, weight, avg_factor=count, **kwargs)
