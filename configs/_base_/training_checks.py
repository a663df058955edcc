# Hooks that stop a training that would go wrong without a word: a loss that is not
# finite, a box without area, or a head whose num_classes is not that of the data.
# mmengine refuses two bases with the same key, and mmdet's have default_hooks; so a
# config takes these with default_hooks = _base_.training_checks.
training_checks = dict(
    invalid_loss=dict(type='InvalidLossHook'),
    num_class_check=dict(type='NumClassCheckHook'),
)
