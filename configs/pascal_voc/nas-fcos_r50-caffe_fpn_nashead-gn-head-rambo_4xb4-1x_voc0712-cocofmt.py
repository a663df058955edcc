_base_ = [
    'mmdet::nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py',
    '../_base_/datasets/voc0712-cocofmt.py',
    '../_base_/training_checks.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)
default_hooks = _base_.training_checks

model = dict(
    bbox_head=dict(
        type='RaMBONASFCOSHead',
        num_classes=20,
        loss_cls=dict(_delete_=True, type='RaMBOLoss'),
    ),
    test_cfg=dict(score_thr=0.0),  # scores are no probabilities: docs/detectors.md
)
train_dataloader = _base_.voc_train_dataloader
val_dataloader = _base_.voc_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.voc_evaluator
test_evaluator = val_evaluator
