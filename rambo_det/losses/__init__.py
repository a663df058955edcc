"""Losses registered in mmdet's ``MODELS``."""

from .rambo_loss import RaMBOLoss

__all__ = ['RaMBOLoss']
