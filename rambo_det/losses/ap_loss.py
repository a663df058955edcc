"""AP Loss."""

from typing import Any, Optional

from mmdet.registry import MODELS
from torch import Tensor

from ..functional import peers
from .peer_loss import PeerLoss


@MODELS.register_module()
class APLoss(PeerLoss):
    """AP Loss: one minus the interpolated AP of all (row, class) entries together.

    Chen et al., *Towards Accurate One-Stage Object Detection with AP-Loss*, CVPR 2019
    (arXiv 1904.06373). Its gradient is the paper's error-driven update; see
    :func:`~rambo_det.functional.peers.ap_loss`. The arguments are those of
    :class:`~rambo_det.losses.peer_loss.PeerLoss`; ``delta`` defaults to 1 as there.

    Example:
        >>> import torch
        >>> from mmdet.registry import MODELS
        >>> loss_cls = MODELS.build(dict(type='APLoss'))
        >>> logits = torch.tensor([[9.0, -9.0], [-9.0, 9.0], [-9.0, -9.0]])
        >>> loss_cls(logits, torch.tensor([0, 1, 2]))  # the last row is background
        tensor(0.)
    """

    def __init__(self, delta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(delta, **kwargs)

    def rank(self, pred: Tensor, labels: Tensor, quality: Optional[Tensor]) -> Tensor:
        """Return the loss; see :meth:`PeerLoss.rank`."""
        return peers.ap_loss(pred, labels, self.delta)
