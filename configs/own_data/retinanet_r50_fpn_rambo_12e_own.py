_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', '../_base_/own_data.py']

# These are torchvision://resnet50, a name that only works with torchvision installed.
r50 = '{{$RAMBO_RESNET50:https://download.pytorch.org/models/resnet50-0676ba61.pth}}'
model = dict(
    backbone=dict(init_cfg=dict(checkpoint=r50)),
    bbox_head=dict(
        type='RaMBORetinaHead',
        num_classes=len(_base_.classes),
        loss_cls=dict(_delete_=True, type='RaMBOLoss'),
    ),
    train_cfg=dict(assigner=dict(ignore_iof_thr=0.5)),  # difficult: no negatives
    test_cfg=dict(score_thr=0.0),  # scores are no probabilities: docs/detectors.md
)
