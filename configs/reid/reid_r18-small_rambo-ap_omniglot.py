_base_ = '../_base_/reid_omniglot.py'

model = dict(
    head=dict(
        loss_triplet=dict(type='RaMBORetrievalLoss', metric='ap', margin=0.3, memory=0)
    )
)
