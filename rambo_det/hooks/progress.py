"""What mmengine's checkpoints leave out of what a training has reached."""

from numbers import Real
from typing import Any, Dict, List, Optional

from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import BaseLoop, IterBasedTrainLoop
from torch import Tensor

from .model import bare_model


def _wrappers(runner: Any) -> List[Any]:
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return [*wrapper.values()]
    return [wrapper] if isinstance(wrapper, OptimWrapper) else []  # only validating


def accumulation(runner: Any) -> Dict[str, Any]:
    """Return the gradients that wait for the next update, and how many iterations do.

    There are some with ``accumulative_counts`` alone.
    """
    waiting = not all(wrapper.should_update() for wrapper in _wrappers(runner))
    gradients: Dict[str, Tensor] = {
        name: parameter.grad.cpu()
        for name, parameter in bare_model(runner).named_parameters()
        if waiting and parameter.grad is not None
    }
    counts = [wrapper.inner_count for wrapper in _wrappers(runner)]
    return dict(gradients=gradients, counts=counts)


def set_accumulation(runner: Any, state: Dict[str, Any]) -> None:
    """Restore what :func:`accumulation` returned."""
    parameters = dict(bare_model(runner).named_parameters())
    for name, gradient in state['gradients'].items():
        parameters[name].grad = gradient.to(parameters[name]).clone()
    for wrapper, count in zip(_wrappers(runner), state['counts']):
        wrapper._inner_count = int(count)


def _stoppers(runner: Any) -> List[EarlyStoppingHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


def _reacts_to_validation(runner: Any) -> bool:
    """Tell whether anything of the training depends on the metrics."""
    schedulers = runner.param_schedulers or []
    if isinstance(schedulers, dict):
        schedulers = [each for several in schedulers.values() for each in several]
    return (
        bool(_stoppers(runner))
        or any(getattr(each, 'need_val_args', False) for each in schedulers)
        or any(isinstance(h, CheckpointHook) and h.save_best for h in runner.hooks)
    )


class Validations:
    """Which validation was the last, and what early stopping made of it.

    A checkpoint may be saved before the validation of its epoch, or in the middle of
    it, when the best one is saved: :meth:`catch_up` then does the rest.
    """

    def __init__(self) -> None:
        self._last = 0
        self._unseen: Optional[Dict[str, float]] = None  # by early stopping

    def begin(self, runner: Any, metrics: Dict[str, Any]) -> None:
        """Note the metrics, before any other hook sees them."""
        loop = runner._train_loop
        if isinstance(loop, BaseLoop):  # else nothing is trained
            self._last = _now(loop)
            numbers = {k: v for k, v in metrics.items() if isinstance(v, Real)}
            self._unseen = {key: float(value) for key, value in numbers.items()}

    def end(self) -> None:
        """Note that all hooks have seen the metrics."""
        self._unseen = None

    def state(self, runner: Any) -> Dict[str, Any]:
        """Return what a checkpoint needs, in plain values."""
        stoppers = [
            dict(monitor=h.monitor, waited=h.wait_count, best=float(h.best_score))
            for h in _stoppers(runner)
        ]
        return dict(last=self._last, unseen=self._unseen, stoppers=stoppers)

    def catch_up(self, runner: Any, state: Dict[str, Any]) -> Optional[str]:
        """Restore a state, and do what was left of its validation.

        Returns:
            What could not be restored, if anything.
        """
        self._last = int(state['last'])
        hooks, saved = _stoppers(runner), state['stoppers']
        fits = [hook.monitor for hook in hooks] == [each['monitor'] for each in saved]
        for hook, each in zip(hooks, saved if fits else ()):
            hook.wait_count, hook.best_score = int(each['waited']), float(each['best'])
            if state['unseen'] is not None:
                hook.after_val_epoch(runner, state['unseen'])
        if _reacts_to_validation(runner) and self._is_due(runner):
            runner.logger.info('Doing the validation that the checkpoint was before')
            runner.val_loop.run()
        if fits:
            return None
        return f'EarlyStoppingHook, which was another one: {saved} before'

    def _is_due(self, runner: Any) -> bool:
        if runner.val_loop is None:
            return False
        loop = runner.train_loop
        loop._decide_current_val_interval()
        now = _now(loop)
        by_iteration = isinstance(loop, IterBasedTrainLoop)
        end = loop.max_iters if by_iteration else loop.max_epochs
        due = now % loop.val_interval == 0 or now == end
        return bool(due and now >= loop.val_begin and now != self._last)


def _now(loop: Any) -> int:
    """Return what validations are counted in."""
    now: int = loop.iter if isinstance(loop, IterBasedTrainLoop) else loop.epoch
    return now
