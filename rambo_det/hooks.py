"""Hooks registered in mmengine's ``HOOKS``."""

from typing import Any, Optional

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from .losses import RaMBOLoss


@HOOKS.register_module()
class LambdScheduleHook(Hook):
    """Change λ of every ``RaMBOLoss`` in the model during training.

    A large λ moves all positives past most negatives, so that every one of them gives a
    gradient from which features can be learned; a small λ is faithful to AP at the top
    of the list. The hook multiplies each term's λ by a factor that falls (or rises)
    from ``start`` to ``end`` by equal ratios per iteration. It keeps no state: a
    resumed run goes on where it was.

    Args:
        start (float): The factor of the first iteration, > 0.
        end (float): The factor of the last iteration, > 0. Defaults to 1.0.

    Raises:
        ValueError: If a factor is not positive, or if the model has no ``RaMBOLoss``.

    Example:
        In a config: ``custom_hooks = [dict(type='LambdScheduleHook', start=100.0)]``
    """

    def __init__(self, start: float, end: float = 1.0) -> None:
        if not (0 < start < float('inf') and 0 < end < float('inf')):
            raise ValueError(
                'LambdScheduleHook: start and end must be positive finite factors of '
                f'lambd, got start={start!r}, end={end!r}'
            )
        self.start = start
        self.end = end

    def factor(self, iteration: int, num_iterations: int) -> float:
        """Return the factor of one iteration, counted from 0."""
        progress = iteration / max(num_iterations - 1, 1)
        return float(self.start * (self.end / self.start) ** progress)

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Optional[Any] = None
    ) -> None:
        """Set the factor for the coming iteration and log it."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        losses = [m for m in model.modules() if isinstance(m, RaMBOLoss)]
        if not losses:
            raise ValueError(
                'LambdScheduleHook: the model has no RaMBOLoss whose lambd could '
                'change; remove the hook from custom_hooks or use the loss'
            )
        factor = self.factor(runner.iter, runner.max_iters)
        for loss in losses:
            loss.lambd_factor = factor
        runner.message_hub.update_scalar('train/lambd_factor', factor)
