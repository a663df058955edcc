"""Heads that tell :class:`~rambo_det.losses.RaMBOLoss` which rows belong together."""

from .bbox_heads import (
    RaMBOBBoxHeadMixin,
    RaMBOConvFCBBoxHead,
    RaMBODIIHead,
    RaMBODoubleConvFCBBoxHead,
    RaMBOShared2FCBBoxHead,
    RaMBOShared4Conv1FCBBoxHead,
)
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
    RaMBODeformableDETRHead,
    RaMBODETRHead,
    RaMBODINOHead,
    RaMBOQueryHeadMixin,
)

__all__ = [
    'RaMBOATSSHead',
    'RaMBOBBoxHeadMixin',
    'RaMBOConvFCBBoxHead',
    'RaMBODDODHead',
    'RaMBODETRHead',
    'RaMBODIIHead',
    'RaMBODINOHead',
    'RaMBODeformableDETRHead',
    'RaMBODenseHeadMixin',
    'RaMBODoubleConvFCBBoxHead',
    'RaMBOFCOSHead',
    'RaMBOGFLHead',
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
