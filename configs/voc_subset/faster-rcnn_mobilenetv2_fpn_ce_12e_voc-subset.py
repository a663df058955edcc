# To convergence, see docs/results.md. Difficult objects are no negatives: what lies on
# one is ignored in training, as it is in the evaluation. All proposals are trained on.
_base_ = [
    '../_base_/models/faster-rcnn_mobilenetv2_fpn-p3.py',
    '../_base_/datasets/voc_subset.py',
    '../_base_/schedules/schedule_12e_cpu.py',
    '../_base_/cpu_runtime.py',
]
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

model = dict(
    roi_head=dict(
        bbox_head=dict(
            type='RaMBOShared2FCBBoxHead',  # for box_avg
            box_avg='positives',
            loss_bbox=dict(loss_weight=0.25),
            loss_cls=dict(loss_weight=2.0),
        )
    ),
    train_cfg=dict(
        rpn=dict(assigner=dict(ignore_iof_thr=0.5)),
        rcnn=dict(assigner=dict(ignore_iof_thr=0.5)),
    ),
)
# Hours of training on a CPU go on where they were stopped.
custom_hooks = [dict(type='ExactResumeHook')]
