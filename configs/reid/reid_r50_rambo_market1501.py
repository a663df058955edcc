# mmdet's baseline of ReID with the triplet loss replaced, on Market-1501. mmdet's
# tools/dataset_converters know the MOT challenge only: lists of images and identities,
# a name and a number in each line, are to be written to data/market1501/meta. mmdet's
# ReIDMetrics knows neither cameras nor junk images: numbers are not those of papers.
_base_ = 'mmdet::reid/reid_r50_8xb32-6e_mot17train80_test-mot17val20.py'
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

model = dict(
    head=dict(
        type='UnitReIDHead',
        num_classes=751,
        loss_triplet=dict(_delete_=True, type='RaMBORetrievalLoss'),
    )
)
data_root = 'data/market1501/'
train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='meta/train.txt',
        data_prefix=dict(img_path='bounding_box_train'),
    )
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='meta/test.txt',
        data_prefix=dict(img_path='bounding_box_test'),
    )
)
test_dataloader = val_dataloader
default_hooks = dict(num_class_check=dict(type='NumClassCheckHook'))
