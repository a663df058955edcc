# The model and the losses of the comparison on the VOC subset.
_base_ = [
    '../_base_/models/faster-rcnn_mobilenetv2_fpn-tiny.py',
    '../_base_/datasets/bccd.py',
    '../_base_/schedules/schedule_6e_cpu.py',
    '../_base_/cpu_runtime.py',
]

model = dict(
    roi_head=dict(bbox_head=dict(num_classes=3, loss_cls=dict(loss_weight=2.0)))
)
train_cfg = dict(val_interval=3)
optim_wrapper = dict(optimizer=dict(fused=True))
