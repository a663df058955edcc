# The recipe: cross-entropy learns the features for 60 % of the training, then ranking
# takes over. What led the trials on 20 classes, see docs/results.md.
custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)

rambo_loss = dict(
    _delete_=True,
    type='RaMBOLoss',
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
takeover = dict(type='RaMBOScheduleHook', curve='step', begin=0.6, unit='training')
custom_hooks = [
    dict(takeover, param='loss_weight', start=0.0),
    dict(takeover, param='auxiliary', start=1.0, end=0.0),
]

del takeover
