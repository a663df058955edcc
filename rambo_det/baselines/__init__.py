"""Losses of other papers and variants of ours, to be trained and timed beside RaMBO.

``import rambo_det`` leaves them out. A config asks for them with ``custom_imports =
dict(imports=['rambo_det.baselines'], allow_failed_imports=False)``, as those in
``configs/voc_subset`` do. Without mmdet the losses alone are there.
"""

from importlib.util import find_spec

from .losses import (
    ap_loss,
    bucketed_ap_loss,
    bucketed_rank_sort_loss,
    literal_loss,
    map_histogram_loss,
    positive_index,
    rank_sort_loss,
)

__all__ = [
    'ap_loss',
    'bucketed_ap_loss',
    'bucketed_rank_sort_loss',
    'literal_loss',
    'map_histogram_loss',
    'positive_index',
    'rank_sort_loss',
]

if find_spec('mmdet') is not None:
    from .autocast import AutocastRaMBOShared2FCBBoxHead
    from .heads import RivalLoss, RivalShared2FCBBoxHead

    __all__ += ['AutocastRaMBOShared2FCBBoxHead', 'RivalLoss', 'RivalShared2FCBBoxHead']
