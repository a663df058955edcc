_base_ = 'mmdet::_base_/default_runtime.py'

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=1, max_keep_ckpts=1),
    num_class_check=dict(type='NumClassCheckHook'),
)
randomness = dict(seed=0)
