_base_ = '../_base_/reid_omniglot.py'

model = dict(
    head=dict(num_classes=136, loss_cls=dict(type='mmpretrain.CrossEntropyLoss'))
)
