# Retrieval of handwritten characters: a small ResNet for images of 28 pixels, trained
# on a CPU. tools/dataset_tools/omniglot.py makes the data. Configs that inherit this
# add the loss to the head.
_base_ = './cpu_runtime.py'
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

model = dict(
    type='BaseReID',
    data_preprocessor=dict(
        type='ReIDDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3
    ),
    backbone=dict(
        type='mmpretrain.ResNet_CIFAR',
        depth=18,
        num_stages=3,
        stem_channels=16,
        base_channels=16,
        strides=(2, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
    ),
    # An average over the 4 x 4 positions would lose where strokes are. Normalised,
    # embeddings do not all start in one direction, where hard triplets collapse.
    neck=dict(
        type='mmpretrain.LinearNeck',
        in_channels=64 * 4 * 4,
        out_channels=64,
        norm_cfg=dict(type='BN1d'),
    ),
    head=dict(
        type='UnitReIDHead',
        num_fcs=0,
        in_channels=64,
        fc_channels=64,
        out_channels=64,
    ),
)

data_root = '{{$RAMBO_OMNIGLOT:data/omniglot/}}'
resize = dict(type='Resize', scale=(28, 28))
train_pipeline = [
    dict(
        type='TransformBroadcaster',
        share_random_params=False,
        transforms=[
            dict(type='LoadImageFromFile'),
            resize,
            dict(type='Rotate', prob=1.0, max_mag=15.0, img_border_value=255),
            dict(type='TranslateX', prob=1.0, max_mag=0.1, img_border_value=255),
            dict(type='TranslateY', prob=1.0, max_mag=0.1, img_border_value=255),
        ],
    ),
    dict(type='PackReIDInputs', meta_keys=None),
]
test_pipeline = [dict(type='LoadImageFromFile'), resize, dict(type='PackReIDInputs')]
# An item is a batch: 16 characters, 4 images of each.
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(
        type='ReIDDataset',
        data_root=data_root,
        triplet_sampler=dict(num_ids=16, ins_per_id=4),
        data_prefix=dict(img_path='imgs'),
        ann_file='meta/train.txt',
        pipeline=train_pipeline,
    ),
)
# mmdet's models of ReID test one image at a time.
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ReIDDataset',
        data_root=data_root,
        data_prefix=dict(img_path='imgs'),
        ann_file='meta/test.txt',
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='ReIDMetrics',
    metric=['mAP', 'CMC'],
    metric_options=dict(rank_list=[1, 5], max_rank=20),
)
test_evaluator = val_evaluator

max_iters = 1600
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=200)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-2, weight_decay=1e-3),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters, eta_min=0.0),
]
default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=max_iters),
)
log_processor = dict(by_epoch=False)
