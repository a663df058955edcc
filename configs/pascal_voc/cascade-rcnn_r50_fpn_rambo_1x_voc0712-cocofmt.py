_base_ = [
    'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    '../_base_/datasets/voc0712-cocofmt.py',
    '../_base_/training_checks.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)
default_hooks = _base_.training_checks

# Every stage has a loss of its own.
model = dict(
    roi_head=dict(
        bbox_head=[
            dict(
                head,
                type='RaMBOShared2FCBBoxHead',
                num_classes=20,
                loss_cls=dict(type='RaMBOLoss'),
            )
            for head in _base_.model.roi_head.bbox_head
        ]
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.0001)),  # docs/detectors.md, Thresholds
)
train_dataloader = _base_.voc_train_dataloader
val_dataloader = _base_.voc_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.voc_evaluator
test_evaluator = val_evaluator
