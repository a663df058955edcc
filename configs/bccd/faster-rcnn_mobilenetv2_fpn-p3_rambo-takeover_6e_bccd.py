_base_ = [
    './faster-rcnn_mobilenetv2_fpn-p3_ce_6e_bccd.py',
    '../_base_/rambo_takeover.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(_delete_=True, type='RaMBOLoss', **_base_.takeover_loss),
        )
    )
)
custom_hooks = _base_.takeover_hooks
