"""What the heads of mmdet, and those of this package, ask of a loss that ranks."""

from contextlib import nullcontext
from typing import ClassVar, ContextManager, Dict, List, Optional

import torch
from torch import Tensor, nn

from .gather import Mean
from .memory import ScoreMemory
from .rows import Owner

# After so many calls without a positive, a loss says so.
PATIENCE = 50


class RankingLoss(nn.Module):
    """A loss that ranks all rows of a call, which the bound heads hand over at once."""

    # Whether its columns may have one for the background, if the config asks for it.
    takes_background: ClassVar[bool] = False

    # Whether the classifier has a background column.
    has_background: bool = False
    check_values: bool = True
    # Whether it ranks by the overlap of each box too; ``forward`` takes ``overlaps``.
    needs_overlaps: bool = False

    def __init__(self) -> None:
        super().__init__()
        # The heads that hold this loss, which several may.
        self.owners: List[Owner] = []
        # mmdet's RoI heads ask for these three to use the methods below.
        self.custom_cls_channels = self.custom_activation = self.custom_accuracy = True

    @property
    def name(self) -> str:
        """What messages call the loss."""
        return type(self).__name__

    @property
    def remembered(self) -> Optional[ScoreMemory]:
        """The memory of past steps; ``None`` without one."""
        return None

    @property
    def gathers(self) -> bool:
        """Whether calls of a bound head are calls of all processes."""
        return False

    def expected(self) -> ContextManager[Optional[Mean]]:
        """Return what a head enters before it computes what the loss then ranks.

        Where processes rank together, the others wait for the call. If this one raises
        before it, the context tells them. It gives what to use for ``reduce_mean``.
        """
        return nullcontext()

    def get_cls_channels(self, num_classes: int) -> int:
        """Return the number of outputs of the classifier for C classes."""
        return num_classes + self.has_background

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Turn logits (N, C), or (N, C + 1) with softmax, into test scores.

        They have shape (N, C + 1): RoI heads drop the last column, and semi-supervised
        detectors read it as the probability of the background. Where every class has a
        sigmoid, that is what the classes leave for it, 1 - max. Dense heads drop
        nothing, and get (N, C).
        """
        dense = any(owner.dense for owner in self.owners)
        if self.has_background:
            scores = cls_score.softmax(dim=-1)
            return scores[..., :-1] if dense else scores
        scores = cls_score.sigmoid()
        if dense:
            return scores
        background = (-cls_score.amax(dim=-1, keepdim=True)).sigmoid()
        return torch.cat([scores, background], dim=-1)

    def get_accuracy(
        self, cls_score: Optional[Tensor] = None, labels: Optional[Tensor] = None
    ) -> Dict[str, Tensor]:
        """Return what the log shows of the preceding call, here nothing.

        The arguments are mmdet's interface and not used.
        """
        return {}
