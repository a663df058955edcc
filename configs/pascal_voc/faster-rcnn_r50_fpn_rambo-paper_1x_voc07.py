# The baseline's 4 epochs of a data set repeated 3 times are the paper's 12.
_base_ = ['./faster-rcnn_r50_fpn_rambo_1x_voc07.py', '../_base_/rambo_paper.py']

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(_delete_=True, type='RaMBOLoss', **_base_.paper_loss),
            box_avg='rows',
            loss_bbox=dict(loss_weight=1.0),
        )
    ),
    train_cfg=dict(
        rpn=dict(assigner=dict(ignore_iof_thr=-1)),
        rcnn=dict(assigner=dict(ignore_iof_thr=-1), sampler=dict(num=512)),
    ),
)
train_dataloader = dict(batch_size=_base_.paper_batch_size)
optim_wrapper = _base_.paper_optim_wrapper
param_scheduler = [_base_.paper_warmup, *_base_.param_scheduler]
