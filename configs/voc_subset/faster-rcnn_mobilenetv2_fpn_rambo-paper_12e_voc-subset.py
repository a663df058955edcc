_base_ = [
    './faster-rcnn_mobilenetv2_fpn_ce_12e_voc-subset.py',
    '../_base_/rambo_paper.py',
]

custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(_delete_=True, type='RaMBOLoss', **_base_.paper_loss),
        )
    )
)
train_dataloader = dict(batch_size=_base_.paper_batch_size)
optim_wrapper = _base_.paper_optim_wrapper
param_scheduler = [
    _base_.paper_warmup,
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[9], gamma=0.1),
]
