"""Losses registered in mmdet's ``MODELS``: RaMBOLoss, and those of other papers."""

from .ap_loss import APLoss
from .arguments import INHERITED, WITH_BACKGROUND
from .bucketed_ap_loss import BucketedAPLoss
from .bucketed_rank_sort_loss import BucketedRankSortLoss
from .memory import Remembering
from .rambo_loss import SCHEDULED, RaMBOLoss
from .rank_sort_loss import RankSortLoss
from .ranking_loss import RankingLoss
from .retrieval_loss import RaMBORetrievalLoss, unit_vectors
from .roi_focal_loss import RoIFocalLoss
from .rows import Owner, check_columns, hard_labels

__all__ = [
    'INHERITED',
    'SCHEDULED',
    'WITH_BACKGROUND',
    'APLoss',
    'BucketedAPLoss',
    'BucketedRankSortLoss',
    'Owner',
    'RaMBOLoss',
    'RaMBORetrievalLoss',
    'RankSortLoss',
    'RankingLoss',
    'Remembering',
    'RoIFocalLoss',
    'check_columns',
    'hard_labels',
    'unit_vectors',
]
