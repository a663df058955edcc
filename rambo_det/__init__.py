"""rambo_det: train mmdetection detectors directly for Average Precision.

Importing the package registers ``RaMBOLoss``, the losses that it is compared with, and
the ``RaMBO…`` heads in mmdet's registry where mmdet is installed. Without it,
:mod:`rambo_det.functional` still is complete: it needs PyTorch alone.
"""

from importlib.util import find_spec

from . import functional
from .version import __version__

__all__ = ['__version__', 'functional']

# Looking for mmdet rather than catching ImportError: a broken installation (a missing
# mmcv, say) must be reported, not silently leave the registry empty.
if find_spec('mmdet') is not None:
    from .mmpretrain_import import import_mmpretrain

    import_mmpretrain()
    from . import heads, hooks, registry
    from .checkpoint import check_what_mmengine_loads
    from .explanations import explain_errors
    from .heads import *  # noqa: F403
    from .hooks import *  # noqa: F403
    from .losses import (
        APLoss,
        BucketedAPLoss,
        BucketedRankSortLoss,
        RaMBOLoss,
        RaMBORetrievalLoss,
        RankSortLoss,
        RoIFocalLoss,
    )
    from .own_data import OwnDataRunner

    check_what_mmengine_loads()
    explain_errors()
    __all__ += [
        'APLoss',
        'BucketedAPLoss',
        'BucketedRankSortLoss',
        'OwnDataRunner',
        'RaMBOLoss',
        'RaMBORetrievalLoss',
        'RankSortLoss',
        'RoIFocalLoss',
        'registry',
        *heads.__all__,
        *hooks.__all__,
    ]
