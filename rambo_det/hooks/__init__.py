"""Hooks registered in mmengine's ``HOOKS``."""

from .invalid_loss import InvalidLossHook
from .schedule import RaMBOScheduleHook

__all__ = ['InvalidLossHook', 'RaMBOScheduleHook']
