"""The RoI head that trains in bfloat16."""

import pytest
import torch

pytest.importorskip('mmdet', reason='the head is registered in mmdet')
from mmdet.registry import MODELS


@pytest.fixture
def head():
    import rambo_det.heads.autocast  # noqa: F401  registers it

    return MODELS.build(
        dict(
            type='AutocastRaMBOShared2FCBBoxHead',
            in_channels=2,
            fc_out_channels=8,
            roi_feat_size=2,
            num_classes=3,
            loss_cls=dict(type='RaMBOLoss', margin=0.0),
        )
    )


def test_logits_are_bfloat16_in_training_alone(head):
    features = torch.randn(6, 2, 2, 2)
    logits, boxes = head(features)
    assert (logits.dtype, boxes.dtype) == (torch.bfloat16, torch.float32)
    logits, boxes = head.eval()(features)
    assert logits.dtype == boxes.dtype == torch.float32


def test_the_loss_ranks_these_logits_in_float32(head):
    logits, _ = head(torch.randn(12, 2, 2, 2))
    labels = torch.arange(12) % 4
    leaf = logits.detach().float().requires_grad_()
    loss, expected = head.loss_cls(logits, labels), head.loss_cls(leaf, labels)
    assert loss == expected and loss.dtype == torch.float32
    loss.backward()
    weight = head.fc_cls.weight.grad
    assert torch.isfinite(weight).all() and weight.any()
    (gradient,) = torch.autograd.grad(expected, leaf)
    assert gradient.any()
