"""Input checks shared by the functional API; messages name what came."""

import torch
from torch import Tensor


def check_scores(
    name: str, scores: Tensor, check_nan: bool, ndim: int = 0, scalar: bool = False
) -> None:
    """Raise unless scores are floating point, (R, n) with ``ndim=2``, without NaN."""
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
    if scores.dim() == 0 and not scalar:
        raise ValueError(f'{name}: scores must have at least one dimension, got 0')
    if check_nan and bool(torch.isnan(scores).any()):  # synchronises with the device
        count = int(torch.isnan(scores).sum())
        raise ValueError(
            f'{name}: scores contain NaN ({count} of {scores.numel()} entries); NaN '
            'has no rank. Look for a diverging learning rate or a zero-area box; '
            'check_nan=False skips this check'
        )


def check_binary(name: str, arg: str, value: Tensor, scores: Tensor) -> Tensor:
    """Return ``value``, the argument ``arg``, as bool; raise unless it fits scores."""
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


def check_perturb(name: str, perturb: str) -> bool:
    """Return whether positives move together; raise if ``perturb`` is unknown."""
    known = ('together', 'singly')
    if perturb not in known:
        raise ValueError(f'{name}: perturb must be one of {known}, got {perturb!r}')
    return perturb == 'together'


def check_lambd(name: str, lambd: float, together: bool = True) -> None:
    """Raise unless λ is positive, and finite where positives move together."""
    to_the_top = not together and lambd == float('inf')
    if isinstance(lambd, Tensor) or not (to_the_top or 0 < lambd < float('inf')):
        raise ValueError(
            f'{name}: lambd must be a positive finite number, got {lambd!r}'
        )


def representable(lambd: float, dtype: torch.dtype) -> float:
    """Return λ within the range of a type; those beyond do what the ends do."""
    info = torch.finfo(dtype)
    return lambd if lambd == float('inf') else min(max(lambd, info.tiny), info.max)


def at_least_float32(scores: Tensor) -> Tensor:
    """Return half-precision scores, in which ranks above 2,048 merge, as float32."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
