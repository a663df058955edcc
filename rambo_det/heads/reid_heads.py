"""A head for retrieval by the cosine."""

from typing import Tuple

from mmdet.models.reid import LinearReIDHead
from mmdet.registry import MODELS
from torch import Tensor

from ..losses import unit_vectors


@MODELS.register_module()
class UnitReIDHead(LinearReIDHead):
    """mmdet's ``LinearReIDHead`` with embeddings of length 1, to train and to test.

    mmdet's ``ReIDMetrics`` ranks by distance. That of such embeddings has the order of
    the cosine, which :class:`~rambo_det.losses.RaMBORetrievalLoss` ranks by default.
    Arguments are those of ``LinearReIDHead``.
    """

    def forward(self, feats: Tuple[Tensor, ...]) -> Tensor:
        """Return the embeddings of the features of the last stage, (N, D)."""
        return unit_vectors(super().forward(feats))
