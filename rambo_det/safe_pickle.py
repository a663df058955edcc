"""Pickles of others: plain data come out of them, and nothing else can.

A pickle names the functions that rebuild its objects. PyTorch's safe loader allows
those of tensors. mmengine's checkpoints need a few more, for NumPy and for the history
of the log. They are not allowed themselves, since NumPy trusts a pickled dtype, or
array, so far that a crafted one reads and writes anywhere in memory. Stand-ins that
check what they get take their places.
"""

import codecs
import io
import math
import pickle
import reprlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar, Dict, Tuple, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

# Whether ``torch.load`` reads weights only if it is not told.
SAFE_BY_DEFAULT = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)
# What dtypes of numbers are called in pickles.
_NUMBERS = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')
# HistoryBuffer pickles its statistics methods as ``getattr(HistoryBuffer, name)``.
_HISTORY_METHODS = ('min', 'max', 'mean', 'current')


def _require(fine: object, what: str, got: object) -> None:
    if not fine:
        raise pickle.UnpicklingError(
            # Not all of it: what contains itself often would be printed for ever.
            f'refusing to load {what} {reprlib.repr(got):.200}: no plain data are '
            'stored like this'
        )


class _DType:
    """Stands in for ``numpy.dtype``: one of a number, its state checked."""

    def __init__(self, *args: Any) -> None:
        _require(args[:1] and args[0] in _NUMBERS, 'numpy.dtype', args)
        self.dtype = np.dtype(args[0])

    def __setstate__(self, state: Any) -> None:
        _require(isinstance(state, tuple) and len(state) > 1, 'the dtype', state)
        _require(state[1] in ('<', '>', '|', '='), 'the dtype', state)
        swapped = self.dtype.newbyteorder(state[1])
        _require(state == swapped.__reduce__()[2], 'the dtype', state)
        self.dtype = swapped


def _values(dtype: Any, shape: Tuple[int, ...], raw: Any) -> np.dtype:
    """Return the checked dtype of so many values in bytes."""
    _require(type(dtype) is _DType, 'values of the dtype', dtype)
    checked: np.dtype = dtype.dtype
    whole = type(raw) is bytes and math.prod(shape) * checked.itemsize == len(raw)
    _require(whole, f'as {shape} of {checked}', raw)
    _require(checked.kind != 'b' or set(raw) <= {0, 1}, 'as truth values', raw)
    return checked


class _Array(np.ndarray):
    """Stands in for ``numpy.ndarray``, and is saved as one."""

    def __new__(cls, *args: Any) -> '_Array':
        _require(not args, 'numpy.ndarray', args)
        return super().__new__(cls, (0,), 'i1')

    def __setstate__(self, state: Any) -> None:
        # Only once: others may look at the values by then.
        _require(not vars(self), 'once more the array', state)
        self.filled = True
        _require(isinstance(state, tuple) and len(state) == 5, 'the array', state)
        _, shape, dtype, fortran, raw = state
        sizes = isinstance(shape, tuple) and len(shape) <= 32
        sizes = sizes and all(type(size) is int and size >= 0 for size in shape)
        _require(sizes, 'an array of shape', shape)
        checked = _values(dtype, shape, raw)
        state = (1, shape, checked, bool(fortran), raw)
        super().__setstate__(state)

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return np.asarray(self).__reduce_ex__(protocol)


def _reconstruct(kind: Any, *_: Any) -> _Array:
    _require(kind is _Array, 'an array of', kind)
    return _Array()


def _scalar(dtype: Any, raw: Any) -> Any:
    return np.frombuffer(raw, _values(dtype, (), raw))[0]


class _History(HistoryBuffer):
    """Stands in for ``HistoryBuffer``, and becomes one."""

    def __new__(cls, *args: Any) -> '_History':
        _require(not args, 'HistoryBuffer', args)
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        _require(type(state) is dict, 'the HistoryBuffer', state)
        histories = [state.get(f'_{name}_history') for name in ('log', 'count')]
        fine = all(type(array) is _Array and array.ndim == 1 for array in histories)
        fine = fine and type(state.get('max_length')) is int
        _require(fine, 'the HistoryBuffer', state)
        # What else is in there are methods of the class, which need no loading.
        self._log_history, self._count_history = map(np.array, histories)
        self.max_length = state['max_length']
        self._set_default_statistics()
        self.__class__ = HistoryBuffer


def _getattr(owner: Any, name: Any) -> Any:
    """Stand in for ``getattr``, which would give a file any function."""
    fine = owner is _History and name in _HISTORY_METHODS
    _require(fine, 'getattr', (owner, name))
    return getattr(HistoryBuffer, name)


_STAND_INS: Dict[str, Any] = {
    'builtins.getattr': _getattr,
    f'{HistoryBuffer.__module__}.HistoryBuffer': _History,
    'numpy.dtype': _DType,
    'numpy.ndarray': _Array,
}
for _core in ('core', '_core'):  # NumPy 2 has renamed it; either reads the other's
    _STAND_INS[f'numpy.{_core}.multiarray.scalar'] = _scalar
    _STAND_INS[f'numpy.{_core}.multiarray._reconstruct'] = _reconstruct


def allow_mmengine_checkpoints() -> None:
    """Allow ``torch.load`` to read what mmengine stores in checkpoints.

    Since PyTorch 2.6 it reads weights only by default. mmengine 0.10 calls it that way
    on files that also hold its log history: resuming and testing stop with an
    ``UnpicklingError``. Does nothing with an older PyTorch, nor when called again.
    """
    if SAFE_BY_DEFAULT:
        named: Any = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
        torch.serialization.add_safe_globals(named)


def _storage(raw: Any) -> Any:
    """Stand in for the loader of a tensor's numbers, which would load any pickle."""
    return torch.load(io.BytesIO(raw), weights_only=True)


def _encode(text: Any, encoding: Any) -> bytes:
    """Stand in for ``codecs.encode``, of which bytes are made in old pickles."""
    _require(type(text) is str and encoding == 'latin1', 'bytes as', encoding)
    return codecs.encode(text, 'latin1')


_DATA: Dict[str, Any] = {
    **{name: _STAND_INS[name] for name in _STAND_INS if name.startswith('numpy')},
    'collections.OrderedDict': OrderedDict,
    'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
    'torch.storage._load_from_bytes': _storage,
    '_codecs.encode': _encode,
}


# The one in Python: its steps can be restricted, and a crafted file cannot make it
# reserve all memory.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _DATA.get(f'{module}.{name}')
        _require(known is not None, 'the function or class', f'{module}.{name}')
        return known

    def load_build(self) -> None:
        kind = type(self.stack[-2])  # type: ignore[attr-defined]
        _require(kind in (_Array, _DType), 'the state of', kind)
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[Any] = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.BUILD[0]] = load_build


def load_predictions(path: Union[str, Path]) -> Any:
    """Load what ``tools/test.py --out`` wrote: numbers, text, arrays and tensors.

    Raises:
        ValueError: If the file is damaged, or would have to run code to be loaded.
    """
    try:
        return _Unpickler(io.BytesIO(Path(path).read_bytes())).load()
    except OSError:
        raise
    except Exception as error:  # of any kind, as the bytes may say anything
        raise ValueError(
            f'{path} is not a file of tools/test.py --out, or damaged: {error}'
        ) from error
