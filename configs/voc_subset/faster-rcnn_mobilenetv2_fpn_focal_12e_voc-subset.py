_base_ = [
    './faster-rcnn_mobilenetv2_fpn_ce_12e_voc-subset.py',
    '../_base_/roi_focal.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

model = dict(roi_head=dict(bbox_head=_base_.focal_head))
