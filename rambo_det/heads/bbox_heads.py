"""RoI heads: the sampled proposals of an image are ranked against each other."""

from typing import Any, Dict, List, Optional

import torch
from mmdet.models.roi_heads.bbox_heads import (
    ConvFCBBoxHead,
    DIIHead,
    DoubleConvFCBBoxHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
)
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor

from ..losses import RaMBOLoss
from .binding import complete_loss_config, rank_nothing


class RaMBOBBoxHeadMixin:
    """Give the loss of a RoI head the image of each proposal.

    Put it before any subclass of mmdet's ``BBoxHead``. The head works with other
    losses as the stock head does.
    """

    loss_cls: Any

    def loss(
        self,
        cls_score: Optional[Tensor],
        bbox_pred: Optional[Tensor],
        rois: Tensor,
        *args: Any,
        **kw: Any,
    ) -> Dict[str, Any]:
        """Compute the losses; arguments and result are those of ``BBoxHead.loss``.

        The first column of ``rois`` (N, 5) is the index of the image in the batch.
        Without proposals there is a classification loss too, unlike in the stock head.
        """
        compute = super().loss  # type: ignore[misc]
        if not isinstance(self.loss_cls, RaMBOLoss) or cls_score is None:
            return compute(cls_score, bbox_pred, rois, *args, **kw)
        if not len(rois):
            losses = compute(cls_score, bbox_pred, rois, *args, **kw)
            columns = cls_score.size(1)
            losses['loss_cls'] = rank_nothing(self.loss_cls, cls_score, columns)
            return losses
        images = rois[:, 0].long()
        with self.loss_cls.images(images, int(images.max()) + 1):
            return compute(cls_score, bbox_pred, rois, *args, **kw)

    def refine_bboxes(
        self,
        sampling_results: List[Any],
        bbox_results: Dict[str, Any],
        batch_img_metas: List[Dict[str, Any]],
    ) -> Any:
        """Return the boxes of the next stage; arguments are those of the stock head.

        That returns ``None`` if there are none, at which a cascade leaves out the other
        stages. Theirs are losses for which other processes wait, so here it is an empty
        list of boxes for each image.
        """
        refine = super().refine_bboxes  # type: ignore[misc]
        results = refine(sampling_results, bbox_results, batch_img_metas)
        if results is None and isinstance(self.loss_cls, RaMBOLoss):
            none = bbox_results['rois'].new_zeros((0, 4))
            return [InstanceData(bboxes=none) for _ in batch_img_metas]
        return results


@MODELS.register_module()
class RaMBOConvFCBBoxHead(RaMBOBBoxHeadMixin, ConvFCBBoxHead):
    """mmdet's ``ConvFCBBoxHead`` for :class:`~rambo_det.losses.RaMBOLoss`."""


@MODELS.register_module()
class RaMBOShared2FCBBoxHead(RaMBOBBoxHeadMixin, Shared2FCBBoxHead):
    """mmdet's ``Shared2FCBBoxHead`` for :class:`~rambo_det.losses.RaMBOLoss`."""


@MODELS.register_module()
class RaMBOShared4Conv1FCBBoxHead(RaMBOBBoxHeadMixin, Shared4Conv1FCBBoxHead):
    """mmdet's ``Shared4Conv1FCBBoxHead`` for :class:`~rambo_det.losses.RaMBOLoss`."""


@MODELS.register_module()
class RaMBODoubleConvFCBBoxHead(RaMBOBBoxHeadMixin, DoubleConvFCBBoxHead):
    """mmdet's ``DoubleConvFCBBoxHead`` for :class:`~rambo_det.losses.RaMBOLoss`.

    The stock head always has a background column; this one asks the loss.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.custom_cls_channels:
            columns = self.loss_cls.get_cls_channels(self.num_classes)
            self.fc_cls = torch.nn.Linear(self.fc_out_channels, columns)


@MODELS.register_module()
class RaMBODIIHead(DIIHead):
    """mmdet's ``DIIHead`` (Sparse R-CNN) for :class:`~rambo_det.losses.RaMBOLoss`.

    Each stage ranks its own proposals and has its own loss and memory. The matching
    cost of the stock detector takes sigmoids of one column per class, so that
    ``scores='logits'`` is the default here. The head works with other losses as the
    stock head does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if 'loss_cls' in kwargs:
            kwargs['loss_cls'] = complete_loss_config(
                type(self), kwargs['loss_cls'], background=True
            )
        super().__init__(*args, **kwargs)

    def loss_and_target(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        sampling_results: List[Any],
        *args: Any,
        **kw: Any,
    ) -> Dict[str, Any]:
        """Compute the losses; arguments and result are those of the stock head.

        ``cls_score`` (N, C) holds all proposals of the first image, then those of the
        second.
        """
        compute = super().loss_and_target
        args = (cls_score, bbox_pred, sampling_results, *args)
        if not isinstance(self.loss_cls, RaMBOLoss):
            return compute(*args, **kw)
        if not len(cls_score):
            result = compute(*args, **kw)
            loss = rank_nothing(self.loss_cls, cls_score, cls_score.size(-1))
            result['loss_bbox']['loss_cls'] = loss
            return result
        counts = [len(r.pos_priors) + len(r.neg_priors) for r in sampling_results]
        images = torch.arange(len(counts), device=cls_score.device)
        index = images.repeat_interleave(images.new_tensor(counts))
        with self.loss_cls.images(index, len(counts)):
            result = compute(*args, **kw)
        result['loss_bbox'].update(self.loss_cls.get_accuracy(cls_score, index))
        return result
