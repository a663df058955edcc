"""Tells a loss which head holds it, so that no head trains it wrongly in silence.

The loss can see its arguments alone: not that a stock head made a background column
which it takes for a class, nor that it is called once per pyramid level.
"""

from typing import Any, Dict, Optional

from mmdet.models.dense_heads import (
    CenterNetUpdateHead,
    DETRHead,
    FCOSHead,
    FoveaHead,
    MaskFormerHead,
    YOLOFHead,
)
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.task_modules.assigners import ClassificationCost
from mmdet.registry import MODELS
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..losses import Owner, RaMBOLoss, RankingLoss, check_columns
from .telling import let_tell

_PER_ANCHOR = 'it needs a loss for every single row, and a ranking has none'
_POSITIVES = 'its loss sees positives only; an objectness tells them from background'
_SOFT = 'its targets are numbers in [0, 1] for every class, not labels to rank by'
_UNUSED = 'it never calls its loss_cls'
# Heads of mmdet that take a ``loss_cls`` and cannot use a ranking, and why.
NOT_RANKABLE: Dict[str, str] = dict(
    ATSSVLFusionHead='its columns are the tokens of a text, not classes',
    AutoAssignHead=f'{_UNUSED}: points have no label, their weights are learned',
    CenterNetUpdateHead=f'its loss is one of heat maps: {_SOFT}',
    FSAFHead=f'{_PER_ANCHOR}: it chooses the pyramid level by it',
    FreeAnchorRetinaHead=f'{_UNUSED}: its loss is the likelihood of bags of anchors',
    GroundingDINOHead='its columns are the tokens of a text, not classes',
    LADHead=f'{_PER_ANCHOR}: it chooses anchors by it',
    MultiInstanceBBoxHead=f'{_PER_ANCHOR}: it matches sets of predictions by it',
    PAAHead=f'{_PER_ANCHOR}: it chooses anchors by it',
    PISARetinaHead=f'{_PER_ANCHOR}: it weights anchors by it',
    TOODHead='its scores are products of probabilities, and two losses take turns',
    VFNetHead=_SOFT,
    YOLACTHead=f'{_PER_ANCHOR}: it chooses hard negatives by it',
    YOLOV3Head=_POSITIVES,
    YOLOXHead=_POSITIVES,
)
# Dense heads that call their loss once for all levels; others call it once per level.
_ONCE_PER_BATCH = (CenterNetUpdateHead, FCOSHead, FoveaHead, MaskFormerHead, YOLOFHead)


def _refusal(head: nn.Module, loss: RankingLoss, bound: Optional[str]) -> Optional[str]:
    """Return why calls of a head cannot be ranked that do not tell their images."""
    cure = 'No head of this package binds it: docs/detectors.md says how to'
    if bound is not None:
        cure = f'Use the head that binds the loss, type={bound}'
    if isinstance(head, DETRHead):
        if loss.remembered is None:
            return None
        called = 'without telling images, and its decoder layers share one memory'
        cure = 'Set memory=0 in loss_cls'  # what binds it does not take one either
    elif isinstance(head, BaseDenseHead) and not isinstance(head, _ONCE_PER_BATCH):
        called = 'once per pyramid level, which ranks each level on its own'
    else:
        return None
    return (
        f'{type(head).__name__} called the loss {called}. {cure}. A head of your own '
        'gives images=...'
    )


def _check_matching(head: nn.Module, loss: RankingLoss) -> None:
    """Raise if a head matches by a softmax, which an offset of a query cancels in."""
    costs = getattr(getattr(head, 'assigner', None), 'match_costs', ())
    if loss.has_background or not any(isinstance(c, ClassificationCost) for c in costs):
        return
    given, cure = '', 'Use FocalLossCost there'
    if isinstance(loss, RaMBOLoss):
        given = f' with scores={loss.scores!r}'
        cure += ", or scores='log_softmax', use_sigmoid=False in loss_cls"
    raise ValueError(
        f'{type(head).__name__}: train_cfg.assigner.match_costs has '
        'ClassificationCost, a softmax over the columns, one of them for the '
        f'background, but loss_cls={loss.name}{given} has none. {cure}'
    )


def _introduce(head: nn.Module, name: str, loss: Optional[nn.Module]) -> None:
    """Introduce a head to the loss that becomes part of it."""
    if not isinstance(loss, RankingLoss):
        let_tell(head, loss)
        return
    kind = type(head).__name__
    if kind in NOT_RANKABLE and type(head).__module__.startswith('mmdet.'):
        raise ValueError(
            f'{kind}: {name}={loss.name} cannot train this head: '
            f'{NOT_RANKABLE[kind]}. Use another head (docs/detectors.md) or another '
            'loss'
        )
    classes: Any = getattr(head, 'num_classes', None)
    if not isinstance(classes, int):
        return
    _check_matching(head, loss)
    bound: Optional[str] = kind if kind.startswith('RaMBO') else f'RaMBO{kind}'
    bound = bound if MODELS.get(bound) else None
    refusal = _refusal(head, loss, bound)
    owner = Owner(kind, classes, isinstance(head, BaseDenseHead), refusal, bound)
    columns: Any = getattr(head, 'cls_out_channels', None)
    if owner.dense and refusal is None and isinstance(columns, int):
        # Now, since YOLOFHead fails before it calls the loss.
        check_columns(loss, columns, [owner])
    loss.owners.append(owner)


register_module_module_registration_hook(_introduce)
