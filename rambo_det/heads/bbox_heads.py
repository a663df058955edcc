"""RoI heads: the sampled proposals of an image are ranked against each other."""

from typing import Any, Dict

from mmdet.models.roi_heads.bbox_heads import (
    ConvFCBBoxHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
)
from mmdet.registry import MODELS
from torch import Tensor

from ..losses import RaMBOLoss


class RaMBOBBoxHeadMixin:
    """Give the loss of a RoI head the image of each proposal.

    Put it before any subclass of mmdet's ``BBoxHead``. The head works with other
    losses as the stock head does.
    """

    loss_cls: Any

    def loss(
        self, cls_score: Tensor, bbox_pred: Tensor, rois: Tensor, *args: Any, **kw: Any
    ) -> Dict[str, Any]:
        """Compute the losses; arguments and result are those of ``BBoxHead.loss``.

        The first column of ``rois`` (N, 5) is the index of the image in the batch.
        """
        compute = super().loss  # type: ignore[misc]
        if not isinstance(self.loss_cls, RaMBOLoss) or not len(rois):
            return compute(cls_score, bbox_pred, rois, *args, **kw)
        images = rois[:, 0].long()
        with self.loss_cls.images(images, int(images.max()) + 1):
            return compute(cls_score, bbox_pred, rois, *args, **kw)


@MODELS.register_module()
class RaMBOConvFCBBoxHead(RaMBOBBoxHeadMixin, ConvFCBBoxHead):
    """mmdet's ``ConvFCBBoxHead`` for :class:`~rambo_det.losses.RaMBOLoss`."""


@MODELS.register_module()
class RaMBOShared2FCBBoxHead(RaMBOBBoxHeadMixin, Shared2FCBBoxHead):
    """mmdet's ``Shared2FCBBoxHead`` for :class:`~rambo_det.losses.RaMBOLoss`."""


@MODELS.register_module()
class RaMBOShared4Conv1FCBBoxHead(RaMBOBBoxHeadMixin, Shared4Conv1FCBBoxHead):
    """mmdet's ``Shared4Conv1FCBBoxHead`` for :class:`~rambo_det.losses.RaMBOLoss`."""
