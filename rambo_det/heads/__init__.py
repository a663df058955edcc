"""Heads that tell :class:`~rambo_det.losses.RaMBOLoss` which rows belong together."""

from . import bbox_heads, dense_heads, owners, query_heads  # noqa: F401
from .bbox_heads import *  # noqa: F403
from .binding import RaMBOHeadMixin
from .dense_heads import *  # noqa: F403
from .query_heads import *  # noqa: F403
from .reid_heads import UnitReIDHead

__all__ = [
    'RaMBOHeadMixin',
    'UnitReIDHead',
    *bbox_heads.__all__,
    *dense_heads.__all__,
    *query_heads.__all__,
]
