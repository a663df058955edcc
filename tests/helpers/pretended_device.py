"""A pretended accelerator: its tensors say that they are on it, and the CPU computes.

It shows without an accelerator what code would do there: how many operators it
launches, where the host waits for the device, where number formats or operators are
used that not every device has. An operation on tensors of both the device and the host
is an error, as it is there. It says nothing about time.

The device cannot be removed from a process: import this only in one of its own. It uses
PyTorch's Python back end, which not every version has.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = 'pretended'
# The results have sizes or values that the host has to know.
WAITING = {
    '_local_scalar_dense',
    '_unique2',
    'bincount',
    'equal',
    'histc',
    'is_nonzero',
    'masked_select',
    'nonzero',
    'unique_consecutive',
    'unique_dim',
}
# What CUDA refuses under torch.use_deterministic_algorithms(True); the cumulative sum
# of floating-point numbers alone.
REFUSED = {'cumsum', 'cumsum_', 'histc', 'kthvalue', 'put_'}


@dataclass
class Usage:
    """What was done on the device; each counter by operator and line of the package."""

    launches: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    doubles: Counter = field(default_factory=Counter)  # float64 tensors
    refused: Counter = field(default_factory=Counter)  # in deterministic mode


_watching = []


@contextmanager
def watch(package, usage):
    """Count in ``usage`` what the code of a package does, and PyTorch on its behalf.

    Calls of other libraries are not counted, also where the package made them.
    """
    _watching.append((package, usage))
    try:
        yield
    finally:
        _watching.pop()


def to_device(value):
    """Put all tensors in a nested structure on the device."""
    return tree_map(
        lambda x: OnDevice(x.detach()) if isinstance(x, torch.Tensor) else x, value
    )


def to_host(value):
    """Bring all tensors in a nested structure back."""
    return tree_map(_held, value)


class OnDevice(torch.Tensor):
    """A tensor on the device, which holds the one on the host that computes."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f'{NAME}:0',
        )
        made.held = held
        return made

    def __repr__(self):
        return f'OnDevice({self.held})'

    def tolist(self):
        _note('waits', 'tolist')
        return self.held.tolist()

    def numpy(self, *_, **__):
        raise TypeError(f'a tensor on the {NAME} device is no array; copy it first')

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Lets calls without a tensor, such as ``torch.zeros``, find the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


def _held(value):
    return value.held if isinstance(value, OnDevice) else value


def _note(kind, what):
    """Count something for who watches, unless another library does it."""
    if not _watching:
        return
    package, usage = _watching[-1]
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        module = frame.f_globals.get('__name__', '').partition('.')[0]
        if module == package:
            place = f'{file.name}:{frame.f_lineno}'
            break
        if 'site-packages' in file.parts and module != 'torch':
            return
        frame = frame.f_back
    else:
        place = 'no line of the package'  # such as a backward pass
    getattr(usage, kind)[f'{what} at {place}'] += 1


def _call(func, args, kwargs):
    """Compute on the host, with a look at what the device would do."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, OnDevice)]
    target = kwargs.get('device')
    here = bool(ours) if target is None else torch.device(target).type == NAME
    if target is not None:
        kwargs = dict(kwargs, device='cpu')
    if ours or here:
        _look(func._schema.name.split('::')[1], func, args, kwargs, tensors, ours, here)
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not here:
        return result
    # Operators that work in place return what they were given.
    given = {id(t.held): t for t in ours}

    def wrap(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice):
            return value
        if value.dtype == torch.float64:
            _note('doubles', str(func))
        return given[id(value)] if id(value) in given else OnDevice(value)

    return tree_map(wrap, result)


def _look(name, func, args, kwargs, tensors, ours, here):
    """Count what an operator does on the device; raise if it mixes devices."""
    copies = name in ('_to_copy', 'copy', 'copy_')
    others = [t for t in tensors if not isinstance(t, OnDevice)]
    if ours and not copies and any(t.dim() for t in others):
        shapes = [tuple(t.shape) for t in others]
        raise RuntimeError(f'{func} mixes the {NAME} device and the host: {shapes}')
    _note('launches', str(func))
    masks = name in ('index', 'index_put', 'index_put_') and any(
        getattr(i, 'dtype', None) in (torch.bool, torch.uint8) for i in args[1]
    )
    unsized = name == 'repeat_interleave' and kwargs.get('output_size') is None
    crosses = copies and (bool(others) or not here)
    if masks or unsized or crosses or name in WAITING:
        _note('waits', str(func))
    exact = 'cumsum' in name and not any(t.is_floating_point() for t in ours)
    if name in REFUSED and not exact:
        _note('refused', str(func))


backend_registration._setup_privateuseone_for_python_backend(NAME)
_Factories().__enter__()
