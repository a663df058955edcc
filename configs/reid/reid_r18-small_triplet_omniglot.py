# With the rate of the others, the hardest triplets hardly learn.
_base_ = '../_base_/reid_omniglot.py'

model = dict(head=dict(loss_triplet=dict(type='TripletLoss', margin=0.2)))
optim_wrapper = dict(optimizer=dict(lr=1e-3))
