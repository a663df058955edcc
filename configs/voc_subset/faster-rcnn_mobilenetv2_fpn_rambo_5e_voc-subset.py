_base_ = [
    './faster-rcnn_mobilenetv2_fpn_ce_5e_voc-subset.py',
    '../_base_/losses/rambo.py',
]

model = dict(
    roi_head=dict(
        bbox_head=dict(type='RaMBOShared2FCBBoxHead', loss_cls=_base_.rambo_loss)
    )
)
