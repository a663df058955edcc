_base_ = [
    '../_base_/models/faster-rcnn_mobilenetv2_fpn-small.py',
    '../_base_/datasets/voc_trials.py',
    '../_base_/schedules/schedule_5e_cpu.py',
    '../_base_/cpu_runtime.py',
]
# For --cfg-options that put RaMBOLoss into the head.
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

train_cfg = dict(val_interval=3)
optim_wrapper = dict(optimizer=dict(fused=True))
