# For choosing settings: the training split of the VOC subset, of which the last 400
# images are for validation.
_base_ = './voc_subset_160.py'

train_dataloader = dict(dataset=dict(indices=1600))
val_dataloader = dict(
    dataset=dict(ann_file='VOC2007/ImageSets/Main/trainval.txt', indices=-400)
)
test_dataloader = val_dataloader
