"""Dense heads: all levels of an image are ranked together."""

from typing import Any, ClassVar, Dict, List, Optional

import torch
from mmdet.models.dense_heads import (
    ATSSHead,
    DDODHead,
    FCOSHead,
    GFLHead,
    NASFCOSHead,
    RetinaHead,
    RPNHead,
    RTMDetHead,
    RTMDetSepBNHead,
    YOLOFHead,
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
    'RaMBOATSSHead',
    'RaMBODDODHead',
    'RaMBODenseHeadMixin',
    'RaMBOFCOSHead',
    'RaMBOGFLHead',
    'RaMBONASFCOSHead',
    'RaMBORPNHead',
    'RaMBORTMDetHead',
    'RaMBORTMDetSepBNHead',
    'RaMBORetinaHead',
    'RaMBOYOLOFHead',
]


class RaMBODenseHeadMixin(RaMBOHeadMixin):
    """Rank the anchors or points of all levels of an image against each other.

    Put it before any subclass of mmdet's ``AnchorHead`` or ``AnchorFreeHead`` that
    calls ``loss_cls`` once per level or once per batch, levels one after the other and
    the rows of an image together in each. The head works with other losses as the
    stock head does. By default it has no memory.
    """

    background = False
    default_memory = 0  # it would hold every anchor of the last steps
    # Before the names of the losses and of the reported AP.
    prefix: ClassVar[str] = ''

    cls_out_channels: int

    @told_to_others
    def loss_by_feat(
        self, cls_scores: List[Tensor], *args: Any, **kwargs: Any
    ) -> Optional[Dict[str, Any]]:
        """Compute the losses; arguments and result are those of the stock head.

        ``cls_scores`` has a tensor (images, anchors * columns, H, W) for each level.
        Besides the losses, the AP of the ranking is reported.

        Raises:
            ValueError: If the stock head's rows are not those of the levels.
        """
        compute = super().loss_by_feat  # type: ignore[misc]
        if not self.ranks:
            return compute(cls_scores, *args, **kwargs)
        objects = object_labels([*args, *kwargs.values()])
        with self.recorded_calls(objects) as calls:
            losses = compute(cls_scores, *args, **kwargs)
        if losses is None:  # no anchor is in an image, at which mmdet stops
            return None
        index = self._images_of_rows(cls_scores, sum(len(c.pred) for c in calls))
        some = cls_scores[0]
        logits = some[:0].reshape(-1, self.cls_out_channels) if not calls else some
        ranked = self.rank_calls(calls, logits, index, len(some), objects)
        losses[f'loss_{self.prefix}cls'] = ranked.pop('loss_cls')
        losses.update({self.prefix + name: value for name, value in ranked.items()})
        return losses

    def _images_of_rows(self, cls_scores: List[Tensor], num_rows: int) -> Tensor:
        """Return the image of each row, (num_rows,): level by level, image by image."""
        num_images, columns = len(cls_scores[0]), self.cls_out_channels
        device = cls_scores[0].device
        if not num_rows:  # the head found nothing to rank
            return torch.zeros(0, dtype=torch.long, device=device)
        rows = [s.numel() // columns for s in cls_scores]
        if sum(rows) != num_rows or any(n % num_images for n in rows):
            raise ValueError(
                f'{type(self).__name__}: the stock head called its loss with '
                f'{num_rows} rows, but its levels have {sum(rows)} (columns {columns}, '
                f'shapes {[tuple(s.shape) for s in cls_scores]}), so which row belongs '
                'to which image is not known; this head cannot be bound by '
                'RaMBODenseHeadMixin'
            )
        return torch.cat(
            [image_major(num_images, n // num_images, device) for n in rows]
        )


RaMBORPNHead = bind(RaMBODenseHeadMixin, RPNHead, background=True, prefix='rpn_')
RaMBORetinaHead = bind(RaMBODenseHeadMixin, RetinaHead, background=True)
RaMBOATSSHead = bind(RaMBODenseHeadMixin, ATSSHead, background=True)
RaMBOFCOSHead = bind(RaMBODenseHeadMixin, FCOSHead, background=True)
RaMBONASFCOSHead = bind(RaMBODenseHeadMixin, NASFCOSHead, background=True)
# The stock head weights each level's loss by its number of positives; a ranking of all
# levels has no such weights.
# It assigns objects to boxes and to classes apart.
RaMBODDODHead = bind(RaMBODenseHeadMixin, DDODHead, box_loss=None)
# What is ranked is the class score with the implicit objectness in it.
# An anchor can have the boxes of several objects, or of none.
RaMBOYOLOFHead = bind(RaMBODenseHeadMixin, YOLOFHead, box_loss=None)
# The label is ranked; the quality that comes with it is the overlap of the box.
RaMBOGFLHead = bind(RaMBODenseHeadMixin, GFLHead)
RaMBORTMDetHead = bind(RaMBODenseHeadMixin, RTMDetHead, auxiliary=False)
RaMBORTMDetSepBNHead = bind(RaMBODenseHeadMixin, RTMDetSepBNHead, auxiliary=False)
