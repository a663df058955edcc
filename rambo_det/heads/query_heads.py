"""Query heads: each decoder layer ranks the queries of an image."""

from typing import Any, Dict, List

from mmdet.models.dense_heads import (
    ConditionalDETRHead,
    DABDETRHead,
    DeformableDETRHead,
    DETRHead,
    DINOHead,
)
from torch import Tensor

from .binding import (
    RaMBOHeadMixin,
    bind,
    image_major,
    object_labels,
)
from .telling import told_to_others

__all__ = [
    'RaMBOConditionalDETRHead',
    'RaMBODABDETRHead',
    'RaMBODETRHead',
    'RaMBODINOHead',
    'RaMBODeformableDETRHead',
    'RaMBOQueryHeadMixin',
]


class RaMBOQueryHeadMixin(RaMBOHeadMixin):
    """Rank the queries of an image against each other, in each part on its own.

    A part is a decoder layer, the encoder's output or the denoising queries of a
    decoder layer. Put it before any subclass of mmdet's ``DETRHead``. The head works
    with other losses as the stock head does; ``bg_cls_weight`` mmdet reads in
    ``DETRHead`` itself alone.

    All parts share the loss, so that a memory is refused.
    """

    background = False
    takes_memory = False
    default_memory = 0
    box_loss = 'loss_iou'  # the boxes of all rows, in pixels

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reports: List[Dict[str, Tensor]] = []  # of the parts, in their order

    def loss_by_feat(
        self, all_layers_cls_scores: Tensor, *args: Any, **kwargs: Any
    ) -> Dict[str, Tensor]:
        """Compute the losses; arguments and result are those of the stock head.

        Besides the losses, the AP of the last decoder layer's ranking is reported.
        """
        compute = super().loss_by_feat  # type: ignore[misc]
        losses: Dict[str, Tensor] = compute(all_layers_cls_scores, *args, **kwargs)
        reports, self._reports = self._reports, []
        if self.ranks:
            # Decoder layers come first; the last one predicts at test time.
            losses.update(reports[len(all_layers_cls_scores) - 1])
        return losses

    def loss_by_feat_single(self, cls_scores: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the losses of a part; ``cls_scores`` is (images, queries, C)."""
        compute = super().loss_by_feat_single  # type: ignore[misc]
        return self._in_images(compute, cls_scores, *args, **kwargs)

    def _loss_dn_single(self, dn_cls_scores: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the losses of the denoising queries of a decoder layer."""
        compute = super()._loss_dn_single  # type: ignore[misc]
        return self._in_images(compute, dn_cls_scores, *args, **kwargs)

    @told_to_others
    def _in_images(
        self, compute: Any, cls_scores: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Call a method of the stock head, then rank what it gave to the loss.

        Afterwards, since the method brings numbers of all processes together before
        and after it calls the loss, and does not call it in a process that has no
        objects, and so no denoising queries: all have to do all this in one order.
        """
        if not self.ranks:
            return compute(cls_scores, *args, **kwargs)
        objects = object_labels([*args, *kwargs.values()])
        with self.recorded_calls(objects) as calls:
            _, *others = compute(cls_scores, *args, **kwargs)
        num_images, num_queries, _ = cls_scores.shape
        index = image_major(num_images, num_queries, cls_scores.device)
        ranked = self.rank_calls(calls, cls_scores, index, num_images, objects)
        self._reports.append(ranked)
        return (ranked.pop('loss_cls'), *others)


RaMBODETRHead = bind(RaMBOQueryHeadMixin, DETRHead, background=True)
RaMBOConditionalDETRHead = bind(RaMBOQueryHeadMixin, ConditionalDETRHead)
RaMBODABDETRHead = bind(RaMBOQueryHeadMixin, DABDETRHead)
RaMBODeformableDETRHead = bind(RaMBOQueryHeadMixin, DeformableDETRHead)
RaMBODINOHead = bind(RaMBOQueryHeadMixin, DINOHead)
