"""Let PyTorch's safe loader read the checkpoints that mmengine writes."""

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

# HistoryBuffer pickles its statistics methods as ``getattr(HistoryBuffer, name)``.
_HISTORY_METHODS = ('min', 'max', 'mean', 'current')


def _getattr(owner: type, name: str) -> object:
    """Stand in for ``getattr``, which would give a checkpoint any function."""
    if owner is not HistoryBuffer or name not in _HISTORY_METHODS:
        raise TypeError(
            f'refusing to load getattr({owner!r}, {name!r}) from a checkpoint: only '
            f'the methods {_HISTORY_METHODS} of HistoryBuffer are allowed'
        )
    return getattr(HistoryBuffer, name)


def allow_mmengine_checkpoints() -> None:
    """Allow-list the classes in mmengine's checkpoints for ``torch.load``.

    Since PyTorch 2.6 ``torch.load`` reads weights only by default. mmengine 0.10 calls
    it that way on files that also hold its log history: resuming and testing stop with
    an ``UnpicklingError``. Only data classes (NumPy arrays and scalars,
    ``HistoryBuffer``) are allowed. Does nothing with an older PyTorch, nor when it is
    called again.
    """
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6):
        return
    # NumPy 2 has moved these functions, so ask objects that they rebuild.
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    dtypes = (np.bool_, np.int32, np.int64, np.float32, np.float64)
    allowed = [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        *{type(np.dtype(dtype)) for dtype in dtypes},
        (_getattr, 'builtins.getattr'),
    ]
    # Files that were written with NumPy 1 can be read with NumPy 2, and the reverse.
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed.append((reconstruct, f'{module}._reconstruct'))
        allowed.append((scalar, f'{module}.scalar'))
    torch.serialization.add_safe_globals(allowed)
