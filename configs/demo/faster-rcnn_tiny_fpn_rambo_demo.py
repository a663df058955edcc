# A small Faster R-CNN that learns the shapes of
# tools/dataset_tools/make_demo_voc.py from random weights on a CPU in minutes. Only
# what differs from mmdet's baseline for PASCAL VOC stands here.
_base_ = 'mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py'
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

classes = ('disc', 'square', 'triangle', 'cross', 'ring', 'star')
max_epochs = 4

# The objects are 14 to 55 pixels wide: three levels of features, strides 4 to
# 16, with anchors of 16 to 64 pixels.
model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        base_channels=16,
        stem_channels=16,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
    ),
    neck=dict(in_channels=[16, 32, 64], out_channels=32, num_outs=3),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=1),
            out_channels=32,
            featmap_strides=[4, 8, 16],
            finest_scale=16,
        ),
        bbox_head=dict(
            type='RaMBOShared2FCBBoxHead',
            in_channels=32,
            fc_out_channels=256,
            num_classes=len(classes),
            loss_cls=dict(_delete_=True, type='RaMBOLoss'),
            # In a training this short, what the shapes are is harder to learn than
            # where they are.
            box_avg='positives',
            loss_bbox=dict(loss_weight=0.125),
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=100, max_per_img=50),
        rcnn=dict(sampler=dict(num=64)),  # more than there are: none is left out
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=60)),
)

# XMLDataset, not VOCDataset: from a folder called VOC2007 the latter takes the
# names of the 20 VOC classes into the table of results.
data_root = '{{$RAMBO_DEMO_DATA:data/demo_voc}}'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=1.0),  # sets the scale_factor of the results
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
# Loading so small an image takes no time worth a process of its own.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='XMLDataset',
        data_root=data_root,
        ann_file='ImageSets/Main/trainval.txt',
        data_prefix=dict(sub_data_root=''),
        metainfo=dict(classes=classes),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='XMLDataset',
        data_root=data_root,
        ann_file='ImageSets/Main/test.txt',
        data_prefix=dict(sub_data_root=''),
        metainfo=dict(classes=classes),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
# The area under the curve, which the loss optimises, rather than VOC 2007's
# eleven points on it.
val_evaluator = dict(eval_mode='area')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type='AdamW',
        lr=2e-3,
        betas=(0.9, 0.98),  # of a thousand steps, the last fifty tell how large
        weight_decay=0.01,
        fused=True,
    ),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=max_epochs),
    num_class_check=dict(type='NumClassCheckHook'),
)
randomness = dict(seed=0)
