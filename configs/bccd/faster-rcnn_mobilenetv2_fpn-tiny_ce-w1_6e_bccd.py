# Cross-entropy with mmdet's loss weight instead of the one that led on the VOC subset.
_base_ = './faster-rcnn_mobilenetv2_fpn-tiny_ce_6e_bccd.py'

model = dict(roi_head=dict(bbox_head=dict(loss_cls=dict(loss_weight=1.0))))
