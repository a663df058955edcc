"""Hooks registered in mmengine's ``HOOKS``."""

from .checkpoint import SafeCheckpointHook
from .monitor import RaMBOMonitorHook
from .resume import ExactResumeHook
from .schedule import RaMBOScheduleHook

__all__ = [
    'ExactResumeHook',
    'RaMBOMonitorHook',
    'RaMBOScheduleHook',
    'SafeCheckpointHook',
]
