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
    # What lies on a difficult object is no negative, and all proposals are ranked.
    train_cfg=dict(
        rpn=dict(assigner=dict(ignore_iof_thr=0.5)),
        rcnn=dict(assigner=dict(ignore_iof_thr=0.5), sampler=dict(num=1024)),
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.0001)),  # docs/detectors.md, Thresholds
)
