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
                lambd=0.3,
                margin=0.5,
                memory=0,
                class_ap=dict(span='batch'),
                pooled_ap=dict(span='batch'),
                loss_weight=10.0,
            ),
        )
    )
)
custom_hooks = [dict(type='LambdScheduleHook', start=333.0)]  # λ falls from 100 to 0.3
