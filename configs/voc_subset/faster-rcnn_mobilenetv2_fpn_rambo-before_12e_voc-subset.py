# The default before: sampled proposals, the box loss divided by the rows.
_base_ = './faster-rcnn_mobilenetv2_fpn_rambo_12e_voc-subset.py'

model = dict(
    roi_head=dict(bbox_head=dict(box_avg='rows', loss_bbox=dict(loss_weight=1.0))),
    train_cfg=dict(rcnn=dict(sampler=dict(num=64))),
)
