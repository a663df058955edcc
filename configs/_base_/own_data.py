# Everything but the model for data of your own in VOC layout. What you set:
# data_root, classes and image_scale, in a config that inherits this one or with
# --cfg-options; OwnDataRunner takes them to all their places.
_base_ = ['./cpu_runtime.py', './datasets/voc_pipelines.py']
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)
runner_type = 'OwnDataRunner'

data_root = 'data/own/'
classes = ('first', 'second')
image_scale = (1000, 600)
own_data = dict(data_root=data_root, classes=classes, image_scale=image_scale)

# XMLDataset, not VOCDataset, which brings the names and colours of VOC's 20 classes.
dataset = dict(
    type='XMLDataset',
    data_root=data_root,
    data_prefix=dict(sub_data_root=''),
    metainfo=dict(classes=classes),
)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = image_scale
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = image_scale
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        ann_file='ImageSets/Main/train.txt',
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='ImageSets/Main/val.txt',
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = dict(
    val_dataloader,
    dataset=dict(val_dataloader['dataset'], ann_file='ImageSets/Main/test.txt'),
)
# The area under the whole curve, as AP is defined today.
val_evaluator = dict(type='VOCMetric', metric='mAP', eval_mode='area')
test_evaluator = val_evaluator

# The schedule follows train_cfg.max_epochs: none of its parts names an end of its own,
# but for the first epoch, in which the rate rises.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=35, norm_type=2),
)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.01, begin=0, end=1, convert_to_iter_based=True
    ),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, convert_to_iter_based=True),
]
default_hooks = dict(
    # What stops a training that would go wrong without a word.
    invalid_loss=dict(type='InvalidLossHook'),
)

del dataset
