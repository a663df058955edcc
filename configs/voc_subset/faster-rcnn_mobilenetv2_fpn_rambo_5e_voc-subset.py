# Cross-entropy learns the features, ranking takes over after three of five epochs.
_base_ = './faster-rcnn_mobilenetv2_fpn_ce_5e_voc-subset.py'
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

model = dict(
    roi_head=dict(
        bbox_head=dict(
            type='RaMBOShared2FCBBoxHead',
            loss_cls=dict(
                _delete_=True,
                type='RaMBOLoss',
                scores='log_softmax',
                use_sigmoid=False,
                lambd=3.0,
                margin=0.5,
                memory=15,
                class_ap=dict(weight=1.0, span='memory'),
                pooled_ap=dict(weight=0.1, span='batch'),
                loss_weight=10.0,
                auxiliary=dict(type='CrossEntropyLoss', use_sigmoid=False),
            ),
        )
    )
)
custom_hooks = [
    dict(
        type='RaMBOScheduleHook', param='loss_weight', start=0.0, curve='step', begin=3
    ),
    dict(
        type='RaMBOScheduleHook',
        param='auxiliary',
        start=1.0,
        end=0.0,
        curve='step',
        begin=3,
    ),
]
