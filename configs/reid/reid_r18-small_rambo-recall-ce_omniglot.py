_base_ = './reid_r18-small_rambo-recall_omniglot.py'

model = dict(
    head=dict(num_classes=136, loss_cls=dict(type='mmpretrain.CrossEntropyLoss'))
)
