# The cheaper one, for many runs on a CPU: images of about 224 pixels, no level of
# stride 4, the first three stages frozen.
_base_ = './faster-rcnn_mobilenetv2_fpn.py'

model = dict(
    backbone=dict(out_indices=(2, 4, 6), frozen_stages=3),
    neck=dict(in_channels=[32, 96, 320], num_outs=4),
    rpn_head=dict(anchor_generator=dict(strides=[8, 16, 32, 64])),
    roi_head=dict(bbox_roi_extractor=dict(featmap_strides=[8, 16, 32])),
)
