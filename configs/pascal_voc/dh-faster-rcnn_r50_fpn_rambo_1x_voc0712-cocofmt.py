_base_ = [
    'mmdet::double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
    '../_base_/datasets/voc0712-cocofmt.py',
    '../_base_/training_checks.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)
default_hooks = _base_.training_checks

model = dict(
    roi_head=dict(
        bbox_head=dict(
            type='RaMBODoubleConvFCBBoxHead',
            num_classes=20,
            loss_cls=dict(_delete_=True, type='RaMBOLoss'),
        )
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.0001)),  # docs/detectors.md, Thresholds
)
train_dataloader = _base_.voc_train_dataloader
val_dataloader = _base_.voc_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.voc_evaluator
test_evaluator = val_evaluator
