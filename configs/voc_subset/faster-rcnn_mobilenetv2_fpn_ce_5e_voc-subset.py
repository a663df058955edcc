_base_ = [
    '../_base_/models/faster-rcnn_mobilenetv2_fpn-p3.py',
    '../_base_/datasets/voc_subset.py',
    '../_base_/schedules/schedule_5e_cpu.py',
    '../_base_/cpu_runtime.py',
]
