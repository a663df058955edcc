"""Load configs with mmdet's own tools/train.py, and build what they name.

    python load_configs.py TRAIN_SCRIPT OUT.json CONFIG...

It runs in a process of its own, since the tests have imported much of this already.
"""

import json
import runpy
import sys
import traceback
from types import SimpleNamespace

import torch
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

CHECK = 'NumClassCheckHook'


def registered_hooks(cfg):
    """Build the hooks as the runner does."""
    runner = Runner.__new__(Runner)
    runner._hooks = []
    runner.register_hooks(cfg.default_hooks, cfg.get('custom_hooks'))
    return runner.hooks


def lazy(dataset):
    """Let a data set read no files, which are not there."""
    parts = [*dataset.get('datasets', []), dataset.get('dataset')]
    for part in filter(None, parts):
        lazy(part)
    dataset.lazy_init = True
    return dataset


def build(cfg):
    """Build model, data sets and hooks; run mmdet's check of the classes."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    # Names and sizes are of interest, no numbers, which mmpretrain's ResNet reads.
    with torch.device('cpu' if cfg.model.type == 'BaseReID' else 'meta'):
        model = MODELS.build(cfg.model)
    loaders = {
        f'{name}_dataloader': SimpleNamespace(
            dataset=DATASETS.build(lazy(cfg[f'{name}_dataloader'].dataset))
        )
        for name in ('train', 'val')
    }
    hooks = registered_hooks(cfg)
    runner = SimpleNamespace(
        model=model, logger=MMLogger.get_current_instance(), **loaders
    )
    for hook in hooks:
        if type(hook).__name__ == CHECK:
            hook.before_train_epoch(runner)
            hook.before_val_epoch(runner)
    return dict(
        hooks=[type(hook).__name__ for hook in hooks],
        modules=sorted({type(part).__module__ for part in [*model.modules(), *hooks]}),
        imports=(cfg.get('custom_imports') or {}).get('imports', []),
    )


def main(script, out, *configs):
    Visualizer.get_instance('unused')
    train = runpy.run_path(script)
    found = {}
    built = []
    train['Runner'].from_cfg = lambda cfg: SimpleNamespace(
        train=lambda: built.append(build(cfg))
    )
    for config in configs:
        sys.argv = ['train.py', config]
        try:
            train['main']()
            found[config] = built.pop()
        except Exception:
            found[config] = dict(error=traceback.format_exc())
    used_tools = 'tools' in sys.modules
    with open(out, 'w', encoding='utf-8') as file:
        json.dump(dict(used_tools=used_tools, found=found), file)


if __name__ == '__main__':
    main(*sys.argv[1:])
