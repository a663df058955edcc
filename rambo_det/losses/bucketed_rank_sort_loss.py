"""Bucketed Rank & Sort Loss."""

from typing import Optional

from mmdet.registry import MODELS
from torch import Tensor

from ..functional import peers
from .rank_sort_loss import RankSortLoss


@MODELS.register_module()
class BucketedRankSortLoss(RankSortLoss):
    """Bucketed RS Loss: negatives between two positives have their mean score.

    Yavuz et al., *Bucketed Ranking-based Losses for Efficient Training of Object
    Detectors*, ECCV 2024 (arXiv 2407.14204); see
    :func:`~rambo_det.functional.peers.bucketed_rank_sort_loss`. Target and arguments
    are those of :class:`RankSortLoss`.
    """

    def rank(self, pred: Tensor, labels: Tensor, quality: Optional[Tensor]) -> Tensor:
        """Return the loss; see :meth:`PeerLoss.rank`."""
        assert quality is not None  # as needs_quality says
        return peers.bucketed_rank_sort_loss(pred, labels, quality, self.delta)
