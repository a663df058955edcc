_base_ = [
    'mmdet::detr/detr_r50_8xb2-150e_coco.py',
    '../_base_/datasets/voc0712-cocofmt.py',
    '../_base_/training_checks.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

default_hooks = _base_.training_checks

# One column per class instead of a softmax with "no object", so the matching takes
# sigmoids as well.
model = dict(
    bbox_head=dict(
        type='RaMBODETRHead',
        num_classes=20,
        loss_cls=dict(_delete_=True, type='RaMBOLoss'),
    ),
    train_cfg=dict(
        assigner=dict(
            match_costs=[
                dict(type='FocalLossCost', weight=2.0),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ]
        )
    ),
)
train_dataloader = _base_.voc_train_dataloader
val_dataloader = _base_.voc_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.voc_evaluator
test_evaluator = val_evaluator
