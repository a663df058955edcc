_base_ = [
    '../_base_/models/faster-rcnn_mobilenetv2_fpn.py',
    '../_base_/datasets/bccd.py',
    '../_base_/schedules/schedule_6e_cpu.py',
    '../_base_/cpu_runtime.py',
]

model = dict(roi_head=dict(bbox_head=dict(num_classes=3)))
