"""Losses registered in mmdet's ``MODELS``."""

from .arguments import WITH_BACKGROUND
from .rambo_loss import SCHEDULED, RaMBOLoss

__all__ = ['SCHEDULED', 'WITH_BACKGROUND', 'RaMBOLoss']
