"""Heads that tell :class:`~rambo_det.losses.RaMBOLoss` which rows belong together."""

from .bbox_heads import (
    RaMBOBBoxHeadMixin,
    RaMBOConvFCBBoxHead,
    RaMBOShared2FCBBoxHead,
    RaMBOShared4Conv1FCBBoxHead,
)

__all__ = [
    'RaMBOBBoxHeadMixin',
    'RaMBOConvFCBBoxHead',
    'RaMBOShared2FCBBoxHead',
    'RaMBOShared4Conv1FCBBoxHead',
]
