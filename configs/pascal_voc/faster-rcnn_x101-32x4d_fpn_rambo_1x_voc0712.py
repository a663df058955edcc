_base_ = './faster-rcnn_r101_fpn_rambo_1x_voc0712.py'

model = dict(
    backbone=dict(
        type='ResNeXt',
        groups=32,
        base_width=4,
        init_cfg=dict(checkpoint='open-mmlab://resnext101_32x4d'),
    )
)
