# The layers of the RoI head compute in bfloat16.
_base_ = './faster-rcnn_mobilenetv2_fpn-tiny_rambo_6e_bccd.py'
custom_imports = dict(imports=['rambo_det.heads.autocast'], allow_failed_imports=False)

model = dict(roi_head=dict(bbox_head=dict(type='AutocastRaMBOShared2FCBBoxHead')))
