"""A RoI head whose layers compute in bfloat16 while it trains, on any device.

mmengine's ``AmpOptimWrapper`` wants a GPU, and mmcv's RoIAlign and NMS know no bfloat16
on a CPU, so that a whole two-stage detector cannot train in it there. The layers whose
output is ranked can; see ``configs/bccd``. ``import rambo_det`` leaves this head out: a
config asks for it with ``custom_imports = dict(imports=['rambo_det.heads.autocast'])``.
"""

from __future__ import annotations

import torch
from mmdet.registry import MODELS
from torch import Tensor

from .bbox_heads import RaMBOShared2FCBBoxHead


@MODELS.register_module()
class AutocastRaMBOShared2FCBBoxHead(RaMBOShared2FCBBoxHead):
    """``RaMBOShared2FCBBoxHead`` under autocast; its loss ranks bfloat16 logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits as they come out of autocast, and the boxes as float32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.training):
            cls_score, bbox_pred = super().forward(x)
        return cls_score, bbox_pred.float()
