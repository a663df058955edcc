_base_ = [
    'mmdet::dab_detr/dab-detr_r50_8xb2-50e_coco.py',
    '../_base_/datasets/voc0712-cocofmt.py',
    '../_base_/training_checks.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)
default_hooks = _base_.training_checks

model = dict(
    bbox_head=dict(
        type='RaMBODABDETRHead',
        num_classes=20,
        loss_cls=dict(_delete_=True, type='RaMBOLoss'),
    )
)
train_dataloader = _base_.voc_train_dataloader
val_dataloader = _base_.voc_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.voc_evaluator
test_evaluator = val_evaluator
