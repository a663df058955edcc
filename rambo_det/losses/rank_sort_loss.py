"""Rank & Sort Loss."""

from typing import Any, Optional

from mmdet.registry import MODELS
from torch import Tensor

from ..functional import peers
from .peer_loss import PeerLoss


@MODELS.register_module()
class RankSortLoss(PeerLoss):
    """RS Loss: rank positives above negatives, and sort them by their overlap.

    Oksuz et al., *Rank & Sort Loss for Object Detection and Instance Segmentation*,
    ICCV 2021 (arXiv 2107.11669), equations 7 and 8; see
    :func:`~rambo_det.functional.peers.rank_sort_loss`. Its target is ``(labels,
    quality)``, which heads of this package give. The arguments are those of
    :class:`~rambo_det.losses.peer_loss.PeerLoss`; ``delta`` defaults to 0.5 as there.
    """

    needs_quality = True

    def __init__(self, delta: float = 0.5, **kwargs: Any) -> None:
        super().__init__(delta, **kwargs)

    def rank(self, pred: Tensor, labels: Tensor, quality: Optional[Tensor]) -> Tensor:
        """Return the loss; see :meth:`PeerLoss.rank`."""
        assert quality is not None  # as needs_quality says
        return peers.rank_sort_loss(pred, labels, quality, self.delta)
