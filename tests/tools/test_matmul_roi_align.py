"""RoIAlign as matrix products, against mmcv's."""

import pytest
import torch

pytest.importorskip('mmcv', reason='needs mmcv')

import mmcv.ops
from mmcv.ops import RoIAlign
from mmcv.ops import roi_align as mmcv_roi_align

from tools.experiments import matmul_roi_align


def random_rois(count, images, extent):
    """RoIs of all sizes, some beyond the borders and some without an extent."""
    corner = torch.rand(count, 2) * 1.4 * extent - 0.2 * extent
    size = torch.rand(count, 2) ** 3 * extent * (torch.rand(count, 1) > 0.1)
    image = torch.randint(images, (count, 1)).float()
    return torch.cat([image, corner, corner + size], dim=1)


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('samples', [0, 1, 3])
@pytest.mark.parametrize('count', [0, 1, 60])
def test_pools_and_differentiates_as_mmcv(count, samples, aligned):
    torch.manual_seed(count + samples)
    features = torch.randn(3, 5, 11, 8, requires_grad=True)
    rois = random_rois(count, images=2, extent=40.0)  # the third image has none
    options = ((4, 7), 0.25, samples, 'avg', aligned)
    expected = mmcv_roi_align(features, rois, *options)
    found = matmul_roi_align.roi_align(features, rois, *options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape)
    if count:
        gradients = [
            torch.autograd.grad(pooled, features, weight)[0]
            for pooled in (expected, found)
        ]
        torch.testing.assert_close(*gradients[::-1], rtol=1e-5, atol=1e-5)


def test_installed_it_serves_the_layers_and_then_mmcv_again(monkeypatch):
    module = matmul_roi_align._MODULE
    monkeypatch.setattr(module, 'roi_align', None)
    monkeypatch.setattr(mmcv.ops, 'roi_align', None)
    features, rois = torch.randn(1, 2, 6, 6), random_rois(5, images=1, extent=6.0)
    for mode in ('avg', 'max'):
        with matmul_roi_align.installed():
            found = RoIAlign(3, 1.0, pool_mode=mode)(features, rois)
        assert module.roi_align is mmcv.ops.roi_align is None
        expected = mmcv_roi_align(features, rois, (3, 3), 1.0, 0, mode)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
