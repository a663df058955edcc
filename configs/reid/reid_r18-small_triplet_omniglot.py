# mmdet's head: with embeddings of length 1, the hardest triplets stay at the margin.
_base_ = '../_base_/reid_omniglot.py'

model = dict(
    head=dict(type='LinearReIDHead', loss_triplet=dict(type='TripletLoss', margin=0.3))
)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
