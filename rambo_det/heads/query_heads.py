"""Query heads: each decoder layer ranks the queries of an image."""

from typing import Any, ClassVar, Dict

from mmdet.models.dense_heads import DeformableDETRHead, DETRHead, DINOHead
from mmdet.registry import MODELS
from torch import Tensor

from ..losses import RaMBOLoss
from .binding import complete_loss_config, image_major, rank_nothing


class RaMBOQueryHeadMixin:
    """Rank the queries of an image against each other, in each part on its own.

    A part is a decoder layer, the encoder's output or the denoising queries of a
    decoder layer. Put it before any subclass of mmdet's ``DETRHead``. The head works
    with other losses as the stock head does; ``bg_cls_weight`` mmdet reads in
    ``DETRHead`` itself alone.

    What the config of :class:`~rambo_det.losses.RaMBOLoss` leaves open becomes
    ``scores='logits'`` and ``memory=0``. All parts share the loss, so that a memory is
    refused.
    """

    # Whether the stock head can have a background column.
    background: ClassVar[bool] = False

    loss_cls: Any
    _parts_to_report = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if 'loss_cls' in kwargs:
            kwargs['loss_cls'] = complete_loss_config(
                type(self), kwargs['loss_cls'], self.background, memory=False
            )
        super().__init__(*args, **kwargs)
        self._reported: Dict[str, Tensor] = {}

    def loss_by_feat(
        self, all_layers_cls_scores: Tensor, *args: Any, **kwargs: Any
    ) -> Dict[str, Tensor]:
        """Compute the losses; arguments and result are those of the stock head.

        Besides the losses, the exact AP of the last decoder layer is reported.
        """
        # Decoder layers come first; the last one predicts at test time.
        self._parts_to_report = len(all_layers_cls_scores)
        compute = super().loss_by_feat  # type: ignore[misc]
        losses = compute(all_layers_cls_scores, *args, **kwargs)
        losses.update(self._reported)
        self._reported = {}
        return losses

    def loss_by_feat_single(self, cls_scores: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the losses of a part; ``cls_scores`` is (images, queries, C)."""
        compute = super().loss_by_feat_single  # type: ignore[misc]
        result = self._in_images(compute, cls_scores, *args, **kwargs)
        self._parts_to_report -= 1
        if self._parts_to_report == 0 and isinstance(self.loss_cls, RaMBOLoss):
            self._reported = self.loss_cls.get_accuracy(cls_scores, cls_scores)
        return result

    def _loss_dn_single(self, dn_cls_scores: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the losses of the denoising queries of a decoder layer."""
        compute = super()._loss_dn_single  # type: ignore[misc]
        return self._in_images(compute, dn_cls_scores, *args, **kwargs)

    def _in_images(
        self, compute: Any, cls_scores: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Call a method of the stock head, then rank what it gave to the loss.

        Afterwards, since the method brings numbers of all processes together before
        and after it calls the loss, and does not call it in a process that has no
        objects, and so no denoising queries: all have to do all this in one order.
        """
        if not isinstance(self.loss_cls, RaMBOLoss):
            return compute(cls_scores, *args, **kwargs)
        with self.loss_cls.deferred() as calls:
            _, *others = compute(cls_scores, *args, **kwargs)
        num_images, num_queries, columns = cls_scores.shape
        if not calls:
            return (rank_nothing(self.loss_cls, cls_scores, columns), *others)
        index = image_major(num_images, num_queries, cls_scores.device)
        return (self.loss_cls.joint(calls, index, num_images), *others)


@MODELS.register_module()
class RaMBODETRHead(RaMBOQueryHeadMixin, DETRHead):
    """mmdet's ``DETRHead`` for :class:`~rambo_det.losses.RaMBOLoss`."""

    background = True


@MODELS.register_module()
class RaMBODeformableDETRHead(RaMBOQueryHeadMixin, DeformableDETRHead):
    """mmdet's ``DeformableDETRHead`` for :class:`~rambo_det.losses.RaMBOLoss`."""


@MODELS.register_module()
class RaMBODINOHead(RaMBOQueryHeadMixin, DINOHead):
    """mmdet's ``DINOHead`` for :class:`~rambo_det.losses.RaMBOLoss`."""
