"""What dense and query heads fill in for their loss, and which rows they say it has."""

from typing import Any, Dict, Mapping, Type

import torch
from mmdet.registry import MODELS
from torch import Tensor

from ..losses import WITH_BACKGROUND, RaMBOLoss


def complete_loss_config(
    head: Type[Any],
    loss_cls: Any,
    background: bool,
    memory: bool = True,
    auxiliary: bool = True,
) -> Any:
    """Fill in what dense and query heads need and the config leaves open.

    Stock heads read ``use_sigmoid`` from the config, so it has to stand there. One
    column per class is the default, and no memory: it would hold every anchor of the
    last steps.

    Args:
        head: The class of the head, for messages.
        loss_cls: The config of the loss; one of another loss is returned as it is.
        background: Whether the head can have a background column.
        memory: Whether the head can have a memory.
        auxiliary: Whether the head can have an auxiliary loss.

    Returns:
        A completed copy.

    Raises:
        ValueError: If the config asks for what the head cannot have.
    """
    kind = loss_cls.get('type') if isinstance(loss_cls, Mapping) else None
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(kind, type) and issubclass(kind, RaMBOLoss)):
        return loss_cls
    result: Dict[str, Any] = {'scores': 'logits', 'memory': 0, **loss_cls}
    softmax = result['scores'] in WITH_BACKGROUND
    result.setdefault('use_sigmoid', not softmax)
    if softmax and not background:
        raise ValueError(
            f'{head.__name__}: loss_cls has scores={result["scores"]!r}, which needs a '
            "background column, and this head has none; use 'logits' or 'sigmoid'"
        )
    if result['memory'] and not memory:
        raise ValueError(
            f'{head.__name__}: loss_cls has memory={result["memory"]!r}, but decoder '
            'layers, encoder and denoising queries share this loss and their scores '
            'must not mix; set memory=0'
        )
    if result.get('auxiliary') and not auxiliary:
        raise ValueError(
            f'{head.__name__}: loss_cls has auxiliary={result["auxiliary"]!r}, but the '
            'stock head divides its classification loss by the number of positives '
            'after the call, so that the sum over all anchors would be added; leave '
            'auxiliary out'
        )
    return result


def image_major(num_images: int, rows_per_image: int, device: torch.device) -> Tensor:
    """Return the image of each row where the rows of an image follow each other."""
    index = torch.arange(num_images, device=device)
    return index.repeat_interleave(rows_per_image)


def rank_nothing(loss_cls: RaMBOLoss, cls_scores: Tensor, columns: int) -> Tensor:
    """Call the loss for a head that has nothing to rank, and so does not call it.

    Where all processes rank together, the others wait for this one. And the classifier
    becomes part of the graph: ``DistributedDataParallel`` waits for its gradient.

    Args:
        loss_cls: The loss.
        cls_scores: The logits, of which none is ranked.
        columns: The number of columns that their rows have.

    Returns:
        0, or the loss of the other processes' rows, with zero gradient.
    """
    pred = cls_scores.reshape(-1, columns)[:0]
    labels = torch.zeros(0, dtype=torch.long, device=pred.device)
    with loss_cls.images(labels, 1):
        return loss_cls(pred, labels)
