_base_ = './faster-rcnn_mobilenetv2_fpn-tiny_ce_12e_voc-subset.py'

model = dict(
    roi_head=dict(bbox_head=dict(loss_cls=dict(_delete_=True, type='RaMBOLoss')))
)
