# Faster R-CNN with RaMBO instead of cross-entropy. It ranks all proposals, about 1,000
# an image, where mmdet's VOC baseline samples 512, and difficult objects are no
# negatives. The recipe was measured with smaller detectors on a CPU (docs/results.md),
# not at this size.
_base_ = [
    'mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py',
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
    train_cfg=dict(
        rpn=dict(assigner=dict(ignore_iof_thr=0.5)),
        rcnn=dict(assigner=dict(ignore_iof_thr=0.5), sampler=dict(num=1024)),
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.0001)),  # docs/detectors.md, Thresholds
)
