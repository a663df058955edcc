_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/own_data.py']

# These are torchvision://resnet50, a name that only works with torchvision installed.
r50 = '{{$RAMBO_RESNET50:https://download.pytorch.org/models/resnet50-0676ba61.pth}}'
model = dict(
    backbone=dict(init_cfg=dict(checkpoint=r50)),
    roi_head=dict(
        bbox_head=dict(
            type='RaMBOShared2FCBBoxHead',
            num_classes=len(_base_.classes),
            loss_cls=dict(_delete_=True, type='RaMBOLoss'),
            box_avg='positives',
            loss_bbox=dict(loss_weight=0.25),
        )
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=1024))),  # all proposals
    test_cfg=dict(rcnn=dict(score_thr=0.0001)),  # docs/detectors.md, Thresholds
)
