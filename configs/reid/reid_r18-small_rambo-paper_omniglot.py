# The paper's method: positives are moved together, with a finite λ, a fixed margin, and
# a memory of the last steps.
_base_ = '../_base_/reid_omniglot.py'

model = dict(
    head=dict(
        loss_triplet=dict(
            type='RaMBORetrievalLoss',
            perturb='together',
            lambd=4.0,
            margin=0.02,
            memory=3,
        )
    )
)
