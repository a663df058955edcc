"""Shipped detectors, shrunken, with a batch to train on; for the tests of the heads."""

from pathlib import Path

import torch
from mmdet.models.utils import unpack_gt_instances
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger

from tests import ROOT
from tools.common.shrink_config import shrink

register_all_modules()
MMLogger.get_current_instance().setLevel('ERROR')  # a line for each initialised weight
VOC = ROOT / 'configs' / 'pascal_voc'
CLASSES = 6
DENSE = dict(
    RetinaHead='retinanet_r50_fpn_rambo_1x_voc0712',
    ATSSHead='atss_r50_fpn_rambo_1x_voc0712-cocofmt',
    DDODHead='ddod_r50_fpn_rambo_1x_voc0712-cocofmt',
    FCOSHead='fcos_r50-caffe_fpn_gn-head-rambo_1x_voc0712-cocofmt',
    NASFCOSHead='nas-fcos_r50-caffe_fpn_nashead-gn-head-rambo_4xb4-1x_voc0712-cocofmt',
    YOLOFHead='yolof_r50-c5_rambo_8xb8-1x_voc0712-cocofmt',
    GFLHead='gfl_r50_fpn_rambo_1x_voc0712-cocofmt',
    RTMDetSepBNHead='rtmdet_tiny_rambo_8xb32-300e_voc0712-cocofmt',
)
QUERY = dict(
    DETRHead='detr_r50_rambo_8xb2-150e_voc0712-cocofmt',
    ConditionalDETRHead='conditional-detr_r50_rambo_8xb2-50e_voc0712-cocofmt',
    DABDETRHead='dab-detr_r50_rambo_8xb2-50e_voc0712-cocofmt',
    DeformableDETRHead='deformable-detr_r50_rambo_16xb2-50e_voc0712-cocofmt',
    DINOHead='dino-4scale_r50_rambo_8xb2-12e_voc0712-cocofmt',
)


def model_config(name):
    """The model of a shipped config, shrunken; the loss' keys are those shipped."""
    shipped = Config.fromfile(VOC / f'{name}.py')
    return shrink(shipped, Path('unused'), 1, 1.0).model


def build(name, change=None):
    """Build a shipped detector, shrunken, after a change of its config."""
    cfg = model_config(name)
    if change is not None:
        change(cfg)
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    return model.train()


def batch(model, sizes=((64, 96), (80, 64)), objects=None):
    """Images of several sizes with ground truth, preprocessed."""
    shapes = [[3, *size] for size in sizes]
    data = demo_mm_inputs(len(sizes), shapes, objects, num_classes=CLASSES)
    return model.data_preprocessor(data, True)


def truth(data):
    """What a head's ``loss_by_feat`` takes after its predictions."""
    instances, ignored, metas = unpack_gt_instances(data['data_samples'])
    return instances, metas, ignored


def record_calls(loss):
    """Keep what a loss is called with, and the images that come with it."""
    calls = []
    forward = loss.forward

    def spy(pred, target, weight=None, *args, images=None, **kwargs):
        calls.append((pred, target, weight, images))
        return forward(pred, target, weight, *args, images=images, **kwargs)

    loss.forward = spy
    return calls


def train_and_predict(model, steps=1, classes=CLASSES):
    """Run steps, then predict the classes alone; return what the last step reported."""
    data = batch(model)
    for _ in range(steps):
        losses = model.loss(data['inputs'], data['data_samples'])
        total, logs = model.parse_losses(losses)
        total.backward()
        assert all(torch.isfinite(torch.as_tensor(value)) for value in logs.values())
        assert {'class_ap', 'pooled_ap'} <= {key.rpartition('.')[2] for key in logs}
    model.eval()
    with torch.no_grad():
        results = model.predict(data['inputs'], data['data_samples'])
    labels = torch.cat([result.pred_instances.labels for result in results])
    assert len(labels) and labels.min() >= 0 and labels.max() < classes
    assert all((result.pred_instances.scores <= 1).all() for result in results)
    return logs
