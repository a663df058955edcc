"""What several hooks ask of their arguments and of a runner."""

import os.path as osp
from pathlib import Path
from typing import Any, Dict, Type, TypeVar

from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import find_latest_checkpoint
from torch import nn

from ..checkpoint import newest_whole
from ..losses import RaMBOLoss

Module = TypeVar('Module', bound=nn.Module)


def check_interval(hook: Hook, interval: object) -> int:
    """Return the interval of a hook, unless it is not a positive integer."""
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(
            f'{type(hook).__name__}: interval must be a number of iterations >= 1, '
            f'got {interval!r}'
        )
    return interval


def bare_model(runner: Any) -> nn.Module:
    """Return the model without the wrapper of distributed training."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def named_modules(runner: Any, kind: Type[Module]) -> Dict[str, Module]:
    """Return every module of a kind in the model under its name there."""
    return {
        name: module
        for name, module in bare_model(runner).named_modules()
        if isinstance(module, kind)
    }


def named_losses(runner: Any) -> Dict[str, RaMBOLoss]:
    """Return every ``RaMBOLoss`` of the model under its name there."""
    return named_modules(runner, RaMBOLoss)


def require_losses(hook: Hook, runner: Any, purpose: str) -> Dict[str, RaMBOLoss]:
    """Return what :func:`named_losses` does, unless there is nothing."""
    losses = named_losses(runner)
    if not losses:
        raise ValueError(
            f'{type(hook).__name__}: the model has no RaMBOLoss {purpose}; remove the '
            'hook from custom_hooks or use the loss'
        )
    return losses


def checkpoint_is_due(runner: Any) -> bool:
    """Tell whether a hook that saves by iterations may do so after this one."""
    return any(
        isinstance(hook, CheckpointHook)
        and not hook.by_epoch
        and (
            hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
            or hook.is_last_train_iter(runner)
        )
        for hook in runner.hooks
    )


def checkpoint_folder(hook: CheckpointHook, runner: Any) -> Path:
    """Return where a hook saves."""
    work_dir = str(runner.work_dir)
    if hook.out_dir is None or str(hook.out_dir) == work_dir:
        return Path(work_dir)
    return Path(hook.out_dir, osp.basename(work_dir.rstrip(osp.sep)))


def choose_checkpoint(runner: Any) -> None:
    """Let a training resume although ``last_checkpoint`` is empty, missing or no text.

    It then goes on from the newest complete file, or begins if there is no file. One
    that is named and damaged, or missing, is an error of loading.
    """
    if not runner._resume or runner._load_from is not None:
        return
    try:
        named = find_latest_checkpoint(runner.work_dir)
    except (OSError, ValueError):
        named = None
    if named and '\0' not in named:  # of which a file may consist after a power failure
        return
    savers = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    places = [(checkpoint_folder(h, runner), h.filename_tmpl) for h in savers]
    path = next(filter(None, (newest_whole(*place) for place in places)), None)
    left = [file for folder, _ in places for file in folder.glob('*.pth')]
    lost = f'last_checkpoint in {runner.work_dir} is empty, missing or no text'
    if path is not None:
        runner._load_from = path
        runner.logger.warning(f'{lost}; going on from {path}, the newest complete one')
    elif left:
        raise ValueError(
            f'{lost}, and no checkpoint there is complete, such as {left[0]}; remove '
            'them to train anew, or name another one in load_from'
        )
    else:
        runner._resume = False
