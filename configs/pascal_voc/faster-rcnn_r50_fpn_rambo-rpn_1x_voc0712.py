# Both stages rank: the anchors of the RPN as well.
_base_ = './faster-rcnn_r50_fpn_rambo_1x_voc0712.py'

model = dict(
    rpn_head=dict(type='RaMBORPNHead', loss_cls=dict(_delete_=True, type='RaMBOLoss'))
)
