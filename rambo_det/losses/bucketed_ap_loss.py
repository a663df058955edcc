"""Bucketed AP Loss."""

from typing import Any, Optional

from mmdet.registry import MODELS
from torch import Tensor

from ..functional import peers
from .peer_loss import PeerLoss


@MODELS.register_module()
class BucketedAPLoss(PeerLoss):
    """Bucketed AP Loss: negatives between two positives have their mean score.

    Yavuz et al., *Bucketed Ranking-based Losses for Efficient Training of Object
    Detectors*, ECCV 2024 (arXiv 2407.14204); see
    :func:`~rambo_det.functional.peers.bucketed_ap_loss`. The arguments are those of
    :class:`~rambo_det.losses.peer_loss.PeerLoss`; ``delta`` defaults to 1.
    """

    def __init__(self, delta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(delta, **kwargs)

    def rank(self, pred: Tensor, labels: Tensor, quality: Optional[Tensor]) -> Tensor:
        """Return the loss; see :meth:`PeerLoss.rank`."""
        return peers.bucketed_ap_loss(pred, labels, self.delta)
