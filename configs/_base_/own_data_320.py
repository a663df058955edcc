# For training on a CPU: images of about 320 pixels, loaded by the process that trains.
_base_ = './own_data.py'

image_scale = (320, 320)
own_data = dict(image_scale=image_scale)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = image_scale
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = image_scale
_here = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline), **_here)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline), **_here)
test_dataloader = dict(dataset=dict(pipeline=test_pipeline), **_here)
optim_wrapper = dict(optimizer=dict(lr=2e-4))

del _here
