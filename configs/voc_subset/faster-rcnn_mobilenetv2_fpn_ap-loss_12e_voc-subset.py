_base_ = './faster-rcnn_mobilenetv2_fpn_ce_12e_voc-subset.py'
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

model = dict(
    roi_head=dict(
        bbox_head=dict(loss_cls=dict(_delete_=True, type='APLoss', loss_weight=0.25))
    )
)
