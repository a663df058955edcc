# As in mmdet's baselines of ReID.
_base_ = './reid_r18-small_triplet_omniglot.py'

model = dict(
    head=dict(num_classes=136, loss_cls=dict(type='mmpretrain.CrossEntropyLoss'))
)
