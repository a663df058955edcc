"""Change the settings of the loss during training."""

import math
from typing import Any, Optional

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop

from ..losses import SCHEDULED
from .model import named_losses, require_losses

_CURVES = ('linear', 'cosine', 'exponential', 'step')
_UNITS = ('epoch', 'iteration', 'training')


@HOOKS.register_module()
class RaMBOScheduleHook(Hook):
    """Change a setting of every ``RaMBOLoss`` in the model during training.

    The setting is what the config of the loss says times a factor. The factor is
    ``start`` before ``begin``, goes to ``end`` between ``begin`` and ``until``, and
    stays there. The hook keeps no state: a resumed run goes on where it was. The factor
    is logged as ``train/{param}_factor``.

    Args:
        param (str): What changes: 'lambd' (of every term), 'margin', 'loss_weight'
            (of the ranking) or 'auxiliary' (the weight of the auxiliary loss).
        start (float): The first factor.
        end (float): The last factor. Defaults to 1.0.
        curve (str): 'linear', 'cosine', 'exponential' (equal ratios, so that ``start``
            and ``end`` must be positive), or 'step' (``end`` from ``begin`` on).
            Defaults to 'linear'.
        begin (float): Where the change begins. Defaults to 0.
        until (float, optional): Where it is complete. Defaults to None, the end of the
            training.
        unit (str): What ``begin`` and ``until`` count: 'epoch', 'iteration', or
            'training', of which they are shares from 0 to 1. Epochs may be fractions:
            the factor changes in every iteration. Defaults to 'epoch'.

    Raises:
        ValueError: If an argument is out of range, if nothing in the model could change
            (no ``RaMBOLoss``, an infinite ``lambd``, a margin or weight of 0, no
            auxiliary loss), if two hooks change one setting, or if ``begin`` or
            ``until`` counts epochs and the training loop does not.

    Example:
        λ falls from 100 to 1 where the loss has ``lambd=1.0, perturb='together'``::

            custom_hooks = [
                dict(type='RaMBOScheduleHook', param='lambd', start=100.0,
                     curve='exponential')
            ]
    """

    def __init__(
        self,
        param: str,
        start: float,
        end: float = 1.0,
        curve: str = 'linear',
        begin: float = 0,
        until: Optional[float] = None,
        unit: str = 'epoch',
    ) -> None:
        name = type(self).__name__
        if param not in SCHEDULED:
            raise ValueError(f'{name}: param must be one of {SCHEDULED}, got {param!r}')
        if curve not in _CURVES:
            raise ValueError(f'{name}: curve must be one of {_CURVES}, got {curve!r}')
        if unit not in _UNITS:
            raise ValueError(f'{name}: unit must be one of {_UNITS}, got {unit!r}')
        positive = param == 'lambd' or curve == 'exponential'
        for factor in (start, end):
            if not 0 <= factor < math.inf or (positive and factor == 0):
                raise ValueError(
                    f'{name}: start and end must be finite factors '
                    f'{"> 0" if positive else ">= 0"} of {param} with curve={curve!r}, '
                    f'got start={start!r}, end={end!r}'
                )
        if begin < 0 or (until is not None and until < begin):
            raise ValueError(
                f'{name}: expected 0 <= begin <= until, got begin={begin!r}, '
                f'until={until!r}'
            )
        if unit == 'training' and max(begin, until or 0) > 1:
            raise ValueError(
                f"{name}: with unit='training', begin and until are shares of the "
                f'training from 0 to 1, got begin={begin!r}, until={until!r}'
            )
        self.param, self.curve = param, curve
        self.start, self.end = float(start), float(end)
        self.begin, self.until, self.unit = begin, until, unit

    def factor(
        self, iteration: int, num_iterations: int, epoch_length: Optional[float] = None
    ) -> float:
        """Return the factor of one iteration.

        Args:
            iteration (int): The iteration, counted from 0.
            num_iterations (int): Iterations of the whole training.
            epoch_length (float, optional): Iterations in an epoch, if there are epochs.
        """
        lengths = dict(training=num_iterations, iteration=1, epoch=epoch_length)
        length = lengths[self.unit]
        if length is None and (self.begin or self.until is not None):
            raise ValueError(
                f'{type(self).__name__}: the training loop counts no epochs; set '
                "unit='iteration' or 'training' and give begin and until in it, "
                f'got begin={self.begin!r}, until={self.until!r}'
            )
        length = length or 1
        # Rounded: 0.07 of 100 is 7, not a little more.
        begin = round(self.begin * length, 6)
        last = num_iterations if self.until is None else self.until * length
        if self.curve == 'step':
            return self.end if iteration >= begin else self.start
        # The last iteration of the interval has the end.
        progress = (iteration - begin) / max(round(last, 6) - 1 - begin, 1)
        progress = min(max(progress, 0.0), 1.0)
        if self.curve == 'exponential':
            return self.start * (self.end / self.start) ** progress
        if self.curve == 'cosine':
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress

    def before_train(self, runner: Any) -> None:
        """Check that this hook changes something that no other hook changes."""
        name, purpose = type(self).__name__, f'whose {self.param} could change'
        losses = require_losses(self, runner, purpose).values()
        if self.param == 'lambd' and any(
            math.isinf(term.lambd) for loss in losses for term in loss.terms
        ):
            raise ValueError(
                f'{name}: lambd is infinite, as by default, so that a factor cannot '
                'change it; give the loss a finite lambd'
            )
        values = [getattr(loss, self.param) for loss in losses]
        if not any(values):  # each is absent or 0
            raise ValueError(
                f'{name}: the RaMBOLoss of the model has {self.param}={values[0]!r}, '
                'which no factor changes; give the loss the value to be reached, or '
                'remove the hook'
            )
        schedules = [h for h in runner.hooks if isinstance(h, RaMBOScheduleHook)]
        if [schedule.param for schedule in schedules].count(self.param) > 1:
            raise ValueError(
                f'{name}: two hooks change {self.param}, and only the last one would '
                'count; leave one of them in custom_hooks'
            )

    def before_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Set the factor for the coming iteration and log it."""
        length = None
        if not isinstance(runner.train_loop, IterBasedTrainLoop):  # has no epochs
            length = runner.max_iters / runner.max_epochs
        factor = self.factor(runner.iter, runner.max_iters, length)
        for loss in named_losses(runner).values():
            loss.factors[self.param] = factor
        runner.message_hub.update_scalar(f'train/{self.param}_factor', factor)
