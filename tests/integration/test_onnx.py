"""Heads export to ONNX and give the same scores there."""

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet', reason='needs mmdet')
pytest.importorskip('onnxruntime', reason='runs the exported heads')
pytest.importorskip('onnx', reason='writes the exported heads')
import onnxruntime
from torch import nn

from tests.helpers.detectors import DENSE, QUERY, build

ROI = 'faster-rcnn_r50_fpn_rambo_1x_voc0712'


class Scores(nn.Module):
    """A head's scores of what it is given."""

    def __init__(self, head, classify):
        super().__init__()
        self.head, self.classify = head, classify

    def forward(self, features):
        return self.classify(self.head, features)


def roi(head, features):
    return head.loss_cls.get_activation(head(features)[0])[:, :-1]


def dense(head, features):
    return head((features,))[0][0].sigmoid()


def query(head, features):
    references = [torch.full((*features.shape[1:3], 2), 0.5)] * len(features)
    return head(features, references)[0].sigmoid()


@pytest.mark.parametrize(
    'name, place, classify, shape',
    [
        (ROI, 'roi_head', roi, (5, 32, 7, 7)),
        (DENSE['RetinaHead'], None, dense, (1, 32, 6, 8)),
        (QUERY['DeformableDETRHead'], None, query, (2, 1, 50, 32)),
    ],
    ids=['roi', 'retina', 'deformable-detr'],
)
def test_scores_are_the_same(name, place, classify, shape, tmp_path):
    model = build(name).eval()
    head = (getattr(model, place) if place else model).bbox_head
    module, features = Scores(head, classify).eval(), torch.randn(shape)
    with torch.no_grad():
        expected = module(features).numpy()
    assert expected.std() > 0
    path = str(tmp_path / 'head.onnx')
    names = dict(input_names=['features'], output_names=['scores'])
    torch.onnx.export(module, (features,), path, dynamo=False, **names)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {'features': features.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
