# Four convolutions before the one layer that is shared by class and box.
_base_ = './faster-rcnn_r50_fpn_rambo_1x_voc0712.py'

model = dict(roi_head=dict(bbox_head=dict(type='RaMBOShared4Conv1FCBBoxHead')))
