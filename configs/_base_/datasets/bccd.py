# Blood cells (BCCD): microscopy, three classes, two boxes without area.
_base_ = './voc_subset.py'

data_root = '{{$RAMBO_BCCD:data/bccd/BCCD/}}'
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (320, 320)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (320, 320)
dataset = dict(
    data_root=data_root,
    data_prefix=dict(sub_data_root=''),
    metainfo=dict(
        classes=('RBC', 'WBC', 'Platelets'),
        palette=[(220, 20, 60), (0, 0, 142), (255, 165, 0)],
    ),
)
train_dataloader = dict(
    dataset=dict(
        ann_file='ImageSets/Main/trainval.txt', pipeline=train_pipeline, **dataset
    )
)
val_dataloader = dict(
    dataset=dict(ann_file='ImageSets/Main/test.txt', pipeline=test_pipeline, **dataset)
)
test_dataloader = val_dataloader

del dataset
