_base_ = [
    'mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712-cocofmt.py',
    '../_base_/training_checks.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)
default_hooks = _base_.training_checks

model = dict(
    roi_head=dict(
        bbox_head=dict(
            type='RaMBOShared2FCBBoxHead',
            loss_cls=dict(_delete_=True, type='RaMBOLoss'),
            box_avg='positives',
            loss_bbox=dict(loss_weight=0.25),
        )
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=1024))),  # all proposals
    test_cfg=dict(rcnn=dict(score_thr=0.0001)),  # docs/detectors.md, Thresholds
)
