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

from .binding import RaMBOHeadMixin, bind
from .telling import told_to_others

__all__ = [
    'BoxAverageMixin',
    'RaMBOBBoxHeadMixin',
    'RaMBOConvFCBBoxHead',
    'RaMBODIIHead',
    'RaMBODoubleConvFCBBoxHead',
    'RaMBOShared2FCBBoxHead',
    'RaMBOShared4Conv1FCBBoxHead',
]


class BoxAverageMixin:
    """Let the box loss of a RoI head keep its strength when more rows come.

    Put it before any subclass of mmdet's ``BBoxHead``.

    Args:
        box_avg (str): What the box loss, a sum over the positives, is divided by: the
            number of all 'rows', as in the stock head, or of the 'positives'.
    """

    num_classes: int

    def __init__(self, *args: Any, box_avg: str = 'rows', **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if box_avg not in ('rows', 'positives'):
            raise ValueError(
                f"{type(self).__name__}: box_avg must be 'rows' or 'positives', got "
                f'{box_avg!r}'
            )
        self.box_avg = box_avg

    def loss(
        self,
        cls_score: Optional[Tensor],
        bbox_pred: Optional[Tensor],
        rois: Tensor,
        labels: Tensor,
        *args: Any,
        **kw: Any,
    ) -> Dict[str, Any]:
        """Compute the losses; arguments and result are those of ``BBoxHead.loss``."""
        compute = super().loss  # type: ignore[misc]
        losses: Dict[str, Any] = compute(
            cls_score, bbox_pred, rois, labels, *args, **kw
        )
        if self.box_avg == 'positives' and 'loss_bbox' in losses:
            positives = ((labels >= 0) & (labels < self.num_classes)).sum()
            factor = len(labels) / positives.clamp(min=1)
            losses['loss_bbox'] = losses['loss_bbox'] * factor
        return losses


class RaMBOBBoxHeadMixin(RaMBOHeadMixin, BoxAverageMixin):
    """Give the loss of a RoI head the image of each proposal.

    Put it before any subclass of mmdet's ``BBoxHead``. The head works with other
    losses as the stock head does. Each stage of a cascade, or of Sparse R-CNN, ranks
    its own proposals, and has its own loss and memory.

    Args:
        box_avg (str): See :class:`BoxAverageMixin`. Sparse R-CNN always divides by the
            positives.
    """

    @told_to_others
    def loss_and_target(
        self, cls_score: Optional[Tensor], *args: Any, **kw: Any
    ) -> Dict[str, Any]:
        """Compute losses and targets; arguments and result are the stock head's."""
        compute = super().loss_and_target  # type: ignore[misc]
        if not self.ranks or cls_score is None:
            return compute(cls_score, *args, **kw)
        with self.recorded_calls() as calls:
            result = compute(cls_score, *args, **kw)
        # The sampling results, one for each image, are the only list. They know the
        # number of proposals, and of images, without asking the device.
        (found,) = (a for a in [*args, *kw.values()] if isinstance(a, list))
        counts = [len(r.pos_priors) + len(r.neg_priors) for r in found]
        images = [
            r.pos_gt_labels.new_full((n,), i)
            for i, (r, n) in enumerate(zip(found, counts))
        ]
        objects = torch.cat([r.pos_gt_labels for r in found])
        result['loss_bbox'].update(
            self.rank_calls(calls, cls_score, torch.cat(images), len(found), objects)
        )
        return result

    @told_to_others
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
        compute = super().loss
        if not self.ranks or cls_score is None:
            return compute(cls_score, bbox_pred, rois, *args, **kw)
        with self.recorded_calls() as calls:
            losses = compute(cls_score, bbox_pred, rois, *args, **kw)
        losses.update(self.rank_calls(calls, cls_score, rois[:, 0].long()))
        return losses

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
        if results is None and self.ranks:
            none = bbox_results['rois'].new_zeros((0, 4))
            return [InstanceData(bboxes=none) for _ in batch_img_metas]
        return results


RaMBOConvFCBBoxHead = bind(RaMBOBBoxHeadMixin, ConvFCBBoxHead)
RaMBOShared2FCBBoxHead = bind(RaMBOBBoxHeadMixin, Shared2FCBBoxHead)
RaMBOShared4Conv1FCBBoxHead = bind(RaMBOBBoxHeadMixin, Shared4Conv1FCBBoxHead)
RaMBODIIHead = bind(RaMBOBBoxHeadMixin, DIIHead, default_memory=0, box_loss='loss_iou')


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
