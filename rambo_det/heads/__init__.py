"""Heads that tell :class:`~rambo_det.losses.RaMBOLoss` which rows belong together."""

from . import owners  # noqa: F401
from .bbox_heads import (
    RaMBOBBoxHeadMixin,
    RaMBOConvFCBBoxHead,
    RaMBODIIHead,
    RaMBODoubleConvFCBBoxHead,
    RaMBOShared2FCBBoxHead,
    RaMBOShared4Conv1FCBBoxHead,
)
from .binding import RaMBOHeadMixin
from .dense_heads import (
    RaMBOATSSHead,
    RaMBODDODHead,
    RaMBODenseHeadMixin,
    RaMBOFCOSHead,
    RaMBOGFLHead,
    RaMBONASFCOSHead,
    RaMBORetinaHead,
    RaMBORPNHead,
    RaMBORTMDetHead,
    RaMBORTMDetSepBNHead,
    RaMBOYOLOFHead,
)
from .query_heads import (
    RaMBOConditionalDETRHead,
    RaMBODABDETRHead,
    RaMBODeformableDETRHead,
    RaMBODETRHead,
    RaMBODINOHead,
    RaMBOQueryHeadMixin,
)

__all__ = [
    'RaMBOATSSHead',
    'RaMBOBBoxHeadMixin',
    'RaMBOConditionalDETRHead',
    'RaMBOConvFCBBoxHead',
    'RaMBODABDETRHead',
    'RaMBODDODHead',
    'RaMBODETRHead',
    'RaMBODIIHead',
    'RaMBODINOHead',
    'RaMBODeformableDETRHead',
    'RaMBODenseHeadMixin',
    'RaMBODoubleConvFCBBoxHead',
    'RaMBOFCOSHead',
    'RaMBOGFLHead',
    'RaMBOHeadMixin',
    'RaMBONASFCOSHead',
    'RaMBOQueryHeadMixin',
    'RaMBORPNHead',
    'RaMBORTMDetHead',
    'RaMBORTMDetSepBNHead',
    'RaMBORetinaHead',
    'RaMBOShared2FCBBoxHead',
    'RaMBOShared4Conv1FCBBoxHead',
    'RaMBOYOLOFHead',
]
