"""The arguments of RaMBOLoss: checked, and its terms parsed."""

from typing import Any, Dict, NamedTuple, Optional, Tuple

from mmdet.registry import MODELS
from torch import nn

SPANS = {
    'class_ap': ('memory', 'batch', 'image'),
    'pooled_ap': ('batch', 'image', 'row'),
}
DEFAULTS = {
    'class_ap': dict(weight=1.0, span='batch'),
    'pooled_ap': dict(weight=1.0, span='batch'),
}
SCORES = ('logits', 'sigmoid', 'softmax', 'log_softmax')
# Those that have a background column.
WITH_BACKGROUND = ('softmax', 'log_softmax')
# Spellings of an infinite λ. mmengine dumps a float infinity as a name that Python does
# not know, and --cfg-options makes it of 'inf'; the second spelling survives both.
INFINITE = ('inf', 'infinite')
# The cure where a config has arguments of the loss that it replaces.
INHERITED = (
    'A config that inherits another loss keeps its arguments; replace them all with '
    'loss_cls=dict(_delete_=True, type=…)'
)


class Term(NamedTuple):
    """One term of the loss: its weight, what a sequence spans, and its λ."""

    name: str
    weight: float
    span: str
    lambd: float

    @property
    def per_class(self) -> bool:
        """Whether each class has a sequence of its own."""
        return self.name == 'class_ap'


def number(
    name: str,
    value: Any,
    positive: bool = False,
    finite: bool = True,
    where: str = '',
    loss: str = 'RaMBOLoss',
) -> float:
    """Return a number >= 0 (or > 0) or raise an error that names it.

    Where it need not be finite, it may be given as one of ``INFINITE``.
    """
    low = 'positive' if positive else 'non-negative'
    if positive and value in INFINITE:
        value = float('inf')
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{loss}: {name} must be a {low} number, got {value!r}')
    low_enough = value < float('inf') if finite else True
    if not (low_enough and (value > 0 if positive else value >= 0)):
        kind = f'finite {low}' if finite else low
        raise ValueError(
            f'{loss}: {name} must be a {kind} number{where}, got {value!r}'
        )
    return float(value)


def steps(name: str, value: Any, loss: str = 'RaMBOLoss') -> int:
    """Return a number of steps >= 0 or raise an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f'{loss}: {name} must be a number of steps >= 0, got {value!r}'
        )
    return value


def refuse_unknown(loss: str, unknown: Dict[str, Any]) -> None:
    """Raise if a config has arguments that a loss does not know."""
    if unknown:
        names = ', '.join(map(repr, unknown))
        raise TypeError(f'{loss}: unexpected keyword argument {names}. {INHERITED}')


def parse_term(
    name: str, spec: Optional[Dict[str, Any]], lambd: float, finite: bool
) -> Optional[Term]:
    """Check one term's dictionary; ``None`` or weight 0 switch the term off."""
    if spec is None:
        return None
    if not isinstance(spec, dict):
        raise TypeError(
            f'RaMBOLoss: {name} must be None or dict(weight=…, span=…, lambd=…), '
            f'got {spec!r}'
        )
    unknown = set(spec) - {'weight', 'span', 'lambd'}
    if unknown:
        raise ValueError(
            f'RaMBOLoss: {name} has unknown keys {sorted(unknown)}; it takes weight, '
            'span and lambd'
        )
    spec = {**DEFAULTS[name], **spec}
    if spec['span'] not in SPANS[name]:
        raise ValueError(
            f'RaMBOLoss: {name} has span {spec["span"]!r}, expected one of '
            f'{SPANS[name]}'
        )
    weight = number(f'{name}.weight', spec['weight'])
    if not weight:
        return None
    label, own = f'{name}.lambd', spec.get('lambd')
    if own is None:
        label, own = 'lambd', lambd
    where = " with perturb='together'" if finite else ''
    lambd = number(label, own, positive=True, finite=finite, where=where)
    return Term(name, weight, spec['span'], lambd)


def parse_overlaps(value: Any) -> Optional[Tuple[float, ...]]:
    """Check the IoU thresholds of the loss."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(
            'RaMBOLoss: overlaps must be None or a tuple of IoU thresholds, such as '
            f'(0.5, 0.6, 0.7, 0.8), got {value!r}'
        )
    found = tuple(number('overlaps', each) for each in value)
    if list(found) != sorted(set(found)) or found[-1] > 1:
        raise ValueError(
            f'RaMBOLoss: overlaps must be ascending numbers in [0, 1], got {value!r}'
        )
    return found


def build_auxiliary(
    config: Optional[Dict[str, Any]], scores: str, use_sigmoid: bool
) -> Optional[nn.Module]:
    """Build the auxiliary loss, which must read the columns that the ranking reads."""
    if config is None:
        return None
    if not isinstance(config, dict):
        raise TypeError(
            'RaMBOLoss: auxiliary must be None or the config of a loss, such as '
            f"dict(type='CrossEntropyLoss'), got {config!r}"
        )
    loss = MODELS.build(config)
    if bool(getattr(loss, 'use_sigmoid', False)) != use_sigmoid:
        raise ValueError(
            f'RaMBOLoss: scores={scores!r} needs an auxiliary loss with '
            f'use_sigmoid={use_sigmoid}, as both are computed from the same columns, '
            f'got {config!r}'
        )
    return loss
