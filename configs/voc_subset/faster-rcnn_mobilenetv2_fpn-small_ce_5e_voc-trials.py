_base_ = [
    '../_base_/models/faster-rcnn_mobilenetv2_fpn-small.py',
    '../_base_/datasets/voc_trials.py',
    '../_base_/schedules/schedule_5e_cpu.py',
    '../_base_/cpu_runtime.py',
]

train_cfg = dict(val_interval=3)
optim_wrapper = dict(optimizer=dict(fused=True))
