"""What several hooks ask of their arguments and of a runner."""

from typing import Any, Dict, Type, TypeVar

from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from torch import nn

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
