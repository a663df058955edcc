_base_ = '../_base_/reid_omniglot.py'

model = dict(head=dict(loss_triplet=dict(type='TripletLoss', margin=0.3)))
