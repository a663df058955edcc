# mmdet's FocalLoss in a RoI head with one column per class.
focal_head = dict(
    loss_cls=dict(_delete_=True, type='RoIFocalLoss', use_sigmoid=True),
    # As by default, but scores start at 0.01 like those of dense heads, else the
    # background outweighs all else at first.
    init_cfg=[
        dict(type='Normal', std=0.01, bias_prob=0.01, override=dict(name='fc_cls')),
        dict(type='Normal', std=0.001, override=dict(name='fc_reg')),
        dict(type='Xavier', distribution='uniform', override=[dict(name='shared_fcs')]),
    ],
)
