"""Hooks registered in mmengine's ``HOOKS``."""

from .checkpoint import SafeCheckpointHook
from .invalid_loss import InvalidLossHook
from .monitor import RaMBOMonitorHook
from .resume import ExactResumeHook
from .schedule import RaMBOScheduleHook

__all__ = [
    'ExactResumeHook',
    'InvalidLossHook',
    'RaMBOMonitorHook',
    'RaMBOScheduleHook',
    'SafeCheckpointHook',
]
