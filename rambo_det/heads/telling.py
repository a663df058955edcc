"""A process that fails on the way to a ranking tells the others, which wait for it.

They wait in the ranking, or before it in mmdet's ``reduce_mean``, in which nothing can
be said. So while a head computes, or a detector that has one, its means are brought
together in a way in which a failure is heard (:meth:`Exchange.mean`).
"""

import functools
import sys
from contextlib import contextmanager
from typing import Any, Callable, FrozenSet, Iterator, Optional, Tuple, TypeVar, cast

from mmdet.models.detectors.base import BaseDetector
from mmdet.models.roi_heads.base_roi_head import BaseRoIHead
from mmengine.dist import get_world_size
from torch import Tensor, nn

from ..losses import RankingLoss
from ..losses.gather import Exchange, Mean
from .binding import RaMBOHeadMixin

_Method = TypeVar('_Method', bound=Callable[..., Any])
_MEANS = 'reduce_mean'  # what mmdet's modules call it
_STATE = '_rambo_told'  # of a detector, see _loss_that_tells
_exchange = Exchange(_MEANS)


def _waiting(kind: type) -> FrozenSet[str]:
    """Name the modules in which methods of a class find ``reduce_mean``."""
    names = {each.__module__ for each in kind.__mro__}
    return frozenset(n for n in names if hasattr(sys.modules.get(n), _MEANS))


@contextmanager
def _heard_in(names: FrozenSet[str], mean: Mean) -> Iterator[None]:
    """Let modules call ``mean`` instead of ``reduce_mean``."""
    modules = [sys.modules[name] for name in names]
    stock = [getattr(module, _MEANS) for module in modules]

    def heard(value: Tensor) -> Tensor:
        return mean(value) if value.numel() == 1 else stock[0](value)

    try:
        for module in modules:
            setattr(module, _MEANS, heard)
        yield
    finally:
        for module, function in zip(modules, stock):
            setattr(module, _MEANS, function)


def told_to_others(method: _Method) -> _Method:
    """Let other processes know if a method of a head raises before it ranks.

    Put it before each method that calls ``rank_calls``.
    """

    @functools.wraps(method)
    def telling(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.ranks:
            return method(self, *args, **kwargs)
        with self.loss_cls.expected() as mean:
            if mean is None:
                return method(self, *args, **kwargs)
            with _heard_in(_waiting(type(self)), mean):
                return method(self, *args, **kwargs)

    return cast(_Method, telling)


def let_tell(owner: nn.Module, part: Optional[nn.Module]) -> None:
    """Let a detector, or a RoI head, tell if it fails where others will wait for it.

    That may be in parts that are mmdet's: assigners and samplers, and other heads.
    """
    if (
        part is not None
        and isinstance(owner, (BaseDetector, BaseRoIHead))
        and 'loss' not in owner.__dict__
        and any(isinstance(module, RankingLoss) for module in part.modules())
    ):
        # A partial, since that is copied and pickled with its owner.
        owner.__dict__['loss'] = functools.partial(_loss_that_tells, owner)


def _loss_that_tells(detector: Any, *args: Any, **kwargs: Any) -> Any:
    compute = functools.partial(type(detector).loss, detector)
    if not detector.training or get_world_size() == 1:
        return compute(*args, **kwargs)
    if _STATE not in detector.__dict__:
        detector.__dict__[_STATE] = _waits_for(detector)
    names, usual = detector.__dict__[_STATE]
    if not usual:
        return compute(*args, **kwargs)
    sent, failures = Exchange.sent, Exchange.failures
    try:
        with _heard_in(names, _exchange.mean):
            found = compute(*args, **kwargs)
    except Exception:
        # Else the others know, or wait for nothing that could be told.
        if failures == Exchange.failures and Exchange.sent - sent < usual:
            _exchange.tell()
        raise
    detector.__dict__[_STATE] = (names, Exchange.sent - sent)
    return found


def _waits_for(detector: nn.Module) -> Tuple[FrozenSet[str], int]:
    """Return where a detector brings means together, and how many headers it sends.

    At least so many, until it is known: one for each loss that ranks together.
    """
    modules = [*detector.modules()]
    bound = [m.loss_cls for m in modules if isinstance(m, RaMBOHeadMixin) and m.ranks]
    told = [m for m in modules if getattr(m, 'gather', None) is True]
    losses = {loss for loss in [*bound, *told] if isinstance(loss, RankingLoss)}
    number = sum(loss.gathers for loss in losses)
    return frozenset().union(*(_waiting(type(module)) for module in modules)), number
