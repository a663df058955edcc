"""Several calls of one loss: to be ranked together, or by mistake ranked apart."""

import inspect
import weakref
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """The arguments of one call of a classification loss.

    Attributes:
        pred: Logits of shape (N, C).
        target: Labels of shape (N,).
        weight: Weights of shape (N,), or ``None`` for a weight of 1 everywhere.
        avg_factor: What the mean over the rows of all calls divides by.
    """

    pred: Tensor
    target: Tensor
    weight: Optional[Tensor]
    avg_factor: Optional[float] = None


def merge_calls(calls: List[Call]) -> Call:
    """Return one call with the rows of all, in their order.

    Raises:
        ValueError: If there are no calls.
    """
    if not calls:
        raise ValueError('merge_calls: expected at least one recorded call, got none')
    pred, target, weight, avg_factor = zip(*calls)
    weights = None
    if any(w is not None for w in weight):
        weights = torch.cat(
            [
                p.new_ones(len(p)) if w is None else w.to(p.dtype)
                for p, w in zip(pred, weight)
            ]
        )
    return Call(
        torch.cat(pred), torch.cat([t.long() for t in target]), weights, avg_factor[0]
    )


def hard_labels(target: Any) -> Tensor:
    """Return the labels of a target ``(labels, quality)``; a tensor as it is.

    Raises:
        TypeError: If the target is neither.
    """
    if isinstance(target, (tuple, list)) and len(target) == 2:
        target = target[0]
    if not isinstance(target, Tensor):
        raise TypeError(
            'RaMBOLoss: target must be a tensor of labels, or (labels, quality) as '
            f'GFL and RTMDet give it, got {type(target).__name__}'
        )
    return target


class _Token:
    """Lives as long as the graph of one loss, and knows whether that was used."""

    used = False

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def on_backward(self, _: Tensor) -> None:
        self.used = True


class OpenCalls:
    """Notices that the rows of one image come in several calls.

    A head that calls the loss once per pyramid level holds the first result while it
    calls again, with another number of rows. A head that calls it once per step has
    run backward or dropped the result by then.
    """

    def __init__(self) -> None:
        self._token: Optional[weakref.ReferenceType[_Token]] = None

    def __reduce__(self) -> Tuple[Any, ...]:
        # Copies and pickles of the loss start without open calls.
        return OpenCalls, ()

    def add(self, loss: Tensor, rows: int) -> Optional[int]:
        """Take note of a call.

        Args:
            loss: The returned loss.
            rows: How many rows the call ranked.

        Returns:
            The number of rows of the preceding call if its result still waits for
            backward and the number was another one, else ``None``.
        """
        if not loss.requires_grad:
            return None
        before = None if self._token is None else self._token()
        token = _Token(rows)
        loss.register_hook(token.on_backward)
        self._token = weakref.ref(token)
        if before is None or before.used or before.rows == rows:
            return None
        return before.rows


def calling_head(loss: nn.Module) -> Optional[str]:
    """Return the class name of the head that is calling a loss, for messages."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get('self')
        if isinstance(caller, nn.Module) and getattr(caller, 'loss_cls', None) is loss:
            return type(caller).__name__
        frame = frame.f_back
    return None
