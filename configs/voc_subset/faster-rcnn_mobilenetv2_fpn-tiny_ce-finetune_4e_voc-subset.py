_base_ = [
    './faster-rcnn_mobilenetv2_fpn-tiny_ce_12e_voc-subset.py',
    '../_base_/rambo_finetune.py',
]

load_from = _base_.finetune_start
train_cfg = _base_.finetune_train_cfg
optim_wrapper = dict(optimizer=dict(lr=_base_.finetune_rate))
param_scheduler = _base_.finetune_schedule
