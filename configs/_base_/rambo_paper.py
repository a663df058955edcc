# The detection experiment of the RaMBO paper (CVPR 2020, arXiv 1912.03500): memory 7,
# margin 0.15, terms 2 : 1 over the batch, one GPU, batch 8, SGD with lr 0.1, 12 epochs
# cut by 10 after the ninth.
#
# The paper's lambda of 0.5 also meets the term's weight and the mean over the 20
# classes; ours belongs to one sequence, so the same gradient needs 0.5 * 2/3 / 20 for
# the class-wise term and 0.5 / 3 for the pooled one.
#
# With warm-up and clipping: ranking gradients are largest at the start, where scores
# are nearly tied and every small step reorders many of them.
paper_loss = dict(
    perturb='together',
    memory=7,
    margin=0.15,
    margin_noise=True,
    scores='logits',
    class_ap=dict(weight=2 / 3, span='memory', lambd=0.5 * 2 / 3 / 20),
    pooled_ap=dict(weight=1 / 3, span='batch', lambd=0.5 / 3),
    loss_weight=1.0,
)
paper_batch_size = 8
paper_optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.0001),
    clip_grad=dict(max_norm=35, norm_type=2),
)
paper_warmup = dict(
    type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500
)
