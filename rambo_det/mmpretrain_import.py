"""Lets mmdet's ReID models be used where there is no torchvision.

They need mmpretrain, which imports torchvision for transforms and metrics of other
tasks. The wheel of torchvision does not load beside a PyTorch for CPUs, and without it
mmdet takes mmpretrain for not installed.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_NAMES = [
    'torchvision',
    *(f'torchvision.{name}' for name in ('datasets', 'ops', 'transforms')),
    *(f'torchvision.transforms.{name}' for name in ('functional', 'transforms')),
    'torchvision.ops.boxes',
]


class _StandIn(ModuleType):
    """A module that has every name, and nothing behind it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return _StandIn(f'{self.__name__}.{name}')


def import_mmpretrain() -> None:
    """Import what mmdet asks of mmpretrain, with a stand-in if torchvision is missing.

    It is there for the time of the import only. To be called before ``mmdet.models`` is
    imported.
    """
    if find_spec('mmpretrain') is None or find_spec('torchvision') is not None:
        return
    sys.modules.update({name: _StandIn(name) for name in _NAMES})
    try:
        import_module('mmpretrain.evaluation.metrics')
        import_module('mmpretrain.models')
    except ImportError:  # mmdet says that it is missing, if anybody asks for it
        pass
    finally:
        for name in _NAMES:
            del sys.modules[name]
