_base_ = [
    'mmdet::pascal_voc/retinanet_r50_fpn_1x_voc0712.py',
    '../_base_/training_checks.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)
default_hooks = _base_.training_checks

model = dict(
    bbox_head=dict(
        type='RaMBORetinaHead', loss_cls=dict(_delete_=True, type='RaMBOLoss')
    ),
    train_cfg=dict(assigner=dict(ignore_iof_thr=0.5)),  # difficult: no negatives
    test_cfg=dict(score_thr=0.0),  # scores are no probabilities: docs/detectors.md
)
