"""Losses registered in mmdet's ``MODELS``."""

from .arguments import INHERITED, WITH_BACKGROUND
from .rambo_loss import SCHEDULED, RaMBOLoss
from .rows import Owner, check_columns, hard_labels

__all__ = [
    'INHERITED',
    'SCHEDULED',
    'WITH_BACKGROUND',
    'Owner',
    'RaMBOLoss',
    'check_columns',
    'hard_labels',
]
