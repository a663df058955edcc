# The cheaper model, for many seeds on a CPU.
_base_ = [
    '../_base_/models/faster-rcnn_mobilenetv2_fpn-p3.py',
    '../_base_/datasets/bccd.py',
    '../_base_/schedules/schedule_6e_cpu.py',
    '../_base_/cpu_runtime.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

model = dict(
    roi_head=dict(
        bbox_head=dict(
            type='RaMBOShared2FCBBoxHead',  # for box_avg
            num_classes=3,
            box_avg='positives',
            loss_bbox=dict(loss_weight=0.25),
        )
    )
)
# Every evaluation takes time.
train_cfg = dict(val_interval=3)
