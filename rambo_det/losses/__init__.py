"""Losses registered in mmdet's ``MODELS``."""

from .rambo_loss import SCHEDULED, RaMBOLoss

__all__ = ['SCHEDULED', 'RaMBOLoss']
