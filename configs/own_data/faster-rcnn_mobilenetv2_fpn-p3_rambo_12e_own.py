# The small one, which a CPU can train.
_base_ = [
    '../_base_/models/faster-rcnn_mobilenetv2_fpn-p3.py',
    '../_base_/own_data_320.py',
]

model = dict(
    roi_head=dict(
        bbox_head=dict(
            type='RaMBOShared2FCBBoxHead',
            num_classes=len(_base_.classes),
            box_avg='positives',
            loss_bbox=dict(loss_weight=0.25),
            loss_cls=dict(_delete_=True, type='RaMBOLoss'),
        )
    ),
    # What lies on a difficult object is no negative.
    train_cfg=dict(
        rpn=dict(assigner=dict(ignore_iof_thr=0.5)),
        rcnn=dict(assigner=dict(ignore_iof_thr=0.5)),
    ),
)
