# The boxes' classes are ranked; masks are learned as in mmdet's baseline.
_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    '../_base_/training_checks.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)
default_hooks = _base_.training_checks

model = dict(
    roi_head=dict(
        bbox_head=dict(
            type='RaMBOShared2FCBBoxHead',
            loss_cls=dict(_delete_=True, type='RaMBOLoss'),
        )
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.0001)),  # docs/detectors.md, Thresholds
)
