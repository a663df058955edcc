_base_ = './faster-rcnn_mobilenetv2_fpn-p3_ce_6e_bccd.py'
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

model = dict(
    roi_head=dict(
        bbox_head=dict(
            type='RaMBOShared2FCBBoxHead',
            # With few classes a small lambda does as well as any.
            loss_cls=dict(_delete_=True, type='RaMBOLoss', lambd=0.1, loss_weight=1.0),
        )
    )
)
