"""Input checks shared by the functional API; messages name what came."""

from typing import Optional

import torch
from torch import Tensor

PERTURB = ('together', 'singly')


def check_scores(name: str, scores: Tensor, check_nan: bool, ndim: int = 0) -> None:
    """Check that ``scores`` is a floating-point tensor without NaN.

    To look for NaN takes a device synchronisation. ``ndim`` is the required number of
    dimensions; 0 means at least one.

    Raises:
        TypeError: If ``scores`` is no floating-point tensor.
        ValueError: If its number of dimensions is wrong or it contains NaN.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(
            f'{name}: scores must be a torch.Tensor, got {type(scores).__name__}'
        )
    if not scores.is_floating_point():
        raise TypeError(
            f'{name}: scores must be floating point, got {scores.dtype}; '
            'convert them with scores.float()'
        )
    if ndim and scores.dim() != ndim:
        raise ValueError(
            f'{name}: scores must have {ndim} dimensions (R, n), one row per '
            f'sequence, got shape {tuple(scores.shape)}; '
            'add a row with scores.unsqueeze(0) if it is a single sequence'
        )
    if scores.dim() == 0:
        raise ValueError(f'{name}: scores must have at least one dimension, got 0')
    if check_nan and bool(torch.isnan(scores).any()):
        count = int(torch.isnan(scores).sum())
        raise ValueError(
            f'{name}: scores contain NaN ({count} of {scores.numel()} entries); NaN '
            'has no rank. Look for a diverging learning rate or a zero-area box; '
            'check_nan=False skips this check'
        )


def check_binary(name: str, arg: str, value: Tensor, scores: Tensor) -> Tensor:
    """Return ``value``, the argument ``arg``, as a bool tensor shaped like ``scores``.

    Raises:
        TypeError: If ``value`` is no tensor.
        ValueError: If shape or device differ from those of ``scores``.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f'{name}: {arg} must be a torch.Tensor, got {type(value).__name__}'
        )
    if value.shape != scores.shape:
        raise ValueError(
            f'{name}: {arg} must have the shape of scores {tuple(scores.shape)}, '
            f'got {tuple(value.shape)}'
        )
    if value.device != scores.device:
        raise ValueError(
            f'{name}: {arg} is on {value.device}, scores are on {scores.device}; '
            f'move one with {arg}.to(scores.device)'
        )
    return value if value.dtype == torch.bool else value != 0


def check_positive(name: str, arg: str, value: float) -> None:
    """Raise unless ``value`` is a positive finite number."""
    if isinstance(value, Tensor) or not 0 < value < float('inf'):
        raise ValueError(
            f'{name}: {arg} must be a positive finite number, got {value!r}'
        )


def check_perturb(name: str, perturb: str) -> bool:
    """Return whether positives move together; raise if ``perturb`` is unknown."""
    if perturb not in PERTURB:
        raise ValueError(f'{name}: perturb must be one of {PERTURB}, got {perturb!r}')
    return perturb == 'together'


def check_lambd(name: str, lambd: float, together: bool) -> None:
    """Raise unless λ is positive, and finite where positives move together."""
    if together or lambd != float('inf'):
        check_positive(name, 'lambd', lambd)


def representable(lambd: float, dtype: torch.dtype) -> float:
    """Return λ within the range of a type, where it is neither 0 nor inf.

    Those beyond do what the ends do: move no score, or each to the top.
    """
    info = torch.finfo(dtype)
    return lambd if lambd == float('inf') else min(max(lambd, info.tiny), info.max)


def check_margin(name: str, margin: float) -> None:
    """Raise unless ``margin`` is a finite number that is not negative."""
    if isinstance(margin, Tensor) or not 0 <= margin < float('inf'):
        raise ValueError(f'{name}: margin must be a finite number >= 0, got {margin!r}')


def at_least_float32(scores: Tensor) -> Tensor:
    """Return half-precision scores as float32, others as they are.

    Half precision merges scores that differ and cannot hold ranks above 2,048.
    """
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def bool_mask(name: str, mask: Optional[Tensor], scores: Tensor) -> Optional[Tensor]:
    """Check an optional mask; see :func:`check_binary`."""
    return None if mask is None else check_binary(name, 'mask', mask, scores)
