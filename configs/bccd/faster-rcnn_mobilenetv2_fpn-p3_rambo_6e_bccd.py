_base_ = [
    './faster-rcnn_mobilenetv2_fpn-p3_ce_6e_bccd.py',
    '../_base_/losses/rambo.py',
]

model = dict(
    roi_head=dict(
        bbox_head=dict(type='RaMBOShared2FCBBoxHead', loss_cls=_base_.rambo_loss)
    )
)
