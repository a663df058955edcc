# Cross-entropy learns the features for 60 % of the training, then ranking takes over:
# level with cross-entropy, see docs/research-log.md.
takeover_loss = dict(
    perturb='together',
    scores='log_softmax',
    use_sigmoid=False,
    lambd=3.0,
    margin=0.5,
    memory=15,
    class_ap=dict(weight=1.0, span='memory'),
    pooled_ap=dict(weight=0.1, span='batch'),
    loss_weight=10.0,
    auxiliary=dict(type='CrossEntropyLoss', use_sigmoid=False),
)
_step = dict(type='RaMBOScheduleHook', curve='step', begin=0.6, unit='training')
takeover_hooks = [
    dict(_step, param='loss_weight', start=0.0),
    dict(_step, param='auxiliary', start=1.0, end=0.0),
]

del _step
