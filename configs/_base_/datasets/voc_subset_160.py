# The VOC subset with images of about 160 pixels.
_base_ = './voc_subset.py'

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (160, 160)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (160, 160)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
