# With embeddings of length 1 the hardest triplets are learned more slowly.
_base_ = '../_base_/reid_omniglot.py'

model = dict(
    head=dict(type='LinearReIDHead', loss_triplet=dict(type='TripletLoss', margin=0.3))
)
