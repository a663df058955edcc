"""The runner of the configs in ``own_data``: what is set once is used everywhere.

mmengine merges ``--cfg-options`` and a child's values after a config has been
evaluated: what the config made of the old ones, like ``num_classes``, stays. Here it
follows, before anything is built.
"""

import copy
import os.path as osp
from typing import Any

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .explanations import one_string


def _replace(part: Any, key: str, old: Any, new: Any) -> None:
    """Give a key its new value, at any depth, where it has the old one."""
    if isinstance(part, (list, tuple)):
        for child in part:
            _replace(child, key, old, new)
    if isinstance(part, dict):
        if key in part and _plain(part[key]) == _plain(old):
            part[key] = copy.deepcopy(new)
        for child in part.values():
            _replace(child, key, old, new)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def follow_own_data(cfg: Config) -> Config:
    """Return a copy of a config whose parts have what stands at its top.

    ``data_root`` and ``classes`` go to each data set, the number of classes to each
    head, and ``image_scale`` to each resize. A part that was set to something else at
    its own place keeps that. Other configs than those of ``own_data`` stay as they are.

    Args:
        cfg: The config. Its ``own_data`` holds the values that its parts were made
            with.

    Raises:
        ValueError: If ``classes`` is a string, empty, or has a name twice.

    Example:
        >>> cfg = Config(dict(classes=('cat', 'dog'), own_data=dict(classes=('a',)),
        ...                   model=dict(head=dict(num_classes=1))))
        >>> follow_own_data(cfg).model
        {'head': {'num_classes': 2}}
    """
    cfg = copy.deepcopy(cfg)
    before = cfg.get('own_data') or {}
    if 'classes' in before:
        classes = cfg.classes
        if isinstance(classes, str):
            raise ValueError(one_string(classes))
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f'classes must be distinct names, got {classes!r}')
        model, old = cfg.get('model'), len(before['classes'])
        _replace(model, 'num_classes', old, len(classes))
    if 'data_root' in before:
        cfg.data_root = osp.expanduser(cfg.data_root)
    for name in ('train', 'val', 'test'):
        loader = cfg.get(f'{name}_dataloader')
        for key, at in dict(
            data_root='data_root', classes='classes', image_scale='scale'
        ).items():
            if key in before:
                _replace(loader, at, before[key], cfg[key])
    for key in before:
        before[key] = copy.deepcopy(cfg[key])
    return cfg


@RUNNERS.register_module()
class OwnDataRunner(Runner):
    """A runner whose config may change ``data_root``, ``classes`` and ``image_scale``.

    Named by ``runner_type`` in a config. The config that it writes into the work
    directory has the values in all their places.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> Runner:
        """Build the runner as mmengine does, from a config whose parts agree."""
        return super().from_cfg(follow_own_data(cfg))
