"""Write a detector of this package as a config and a checkpoint of stock mmdet.

    python tools/model_converters/to_stock.py CONFIG CHECKPOINT OUT.pth \\
        [--mode MODE] [--check DIR]

Beside OUT.pth it writes OUT.py, a config that needs nothing of rambo_det. Modes:

- sigmoid: the parameters as they are. A RoI head gets CrossEntropyCustomLoss, mmdet's
  loss whose columns have a sigmoid each; dense heads and queries get FocalLoss. Scores
  and boxes are the same; to train on, choose a loss. The default.
- softmax-order: a RoI head with mmdet's usual C + 1 columns. The background's logit is
  constant and far above the others, so that the softmax of class c is nearly exp(z - b)
  and detections are in the same order. The scores are tiny; score_thr becomes 0.
- softmax: C + 1 columns, the background's logit is 0. The score of a class is nearly
  its sigmoid where no other class is likely, and less elsewhere; the order may change.

A classifier that has a background column (scores='log_softmax') is stock mmdet's
already, in every mode. --check DIR tests both with mmdet's own tools/test.py at any
score, the stock one in a process that cannot import rambo_det, and compares AP and
scores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from mmdet.registry import HOOKS, MODELS
from mmengine.config import Config

from tools.analysis_tools.classifier import (
    build,
    find_classifier,
    load_checkpoint,
    load_config,
)
from tools.analysis_tools.detections import load_run, scores_by_box
from tools.common.atomic_file import atomic_file
from tools.common.mmdet_script import find_mmdet_script
from tools.common.wrong_calls import (
    Parser,
    readable_file,
    writable_file,
    writable_folder,
)

MODES = ('sigmoid', 'softmax-order', 'softmax')
# Logits up to HIGHEST keep their order: float32 knows exp(-87) and 2**-24 = exp(-17).
HIGHEST, GAP, DEEPEST = 40.0, 17.0, 87.0
SHRINK = (DEEPEST - GAP) / (2 * HIGHEST)
SHIFT = SHRINK * HIGHEST + GAP
_STOCK = "import runpy, sys; sys.modules['rambo_det'] = None; sys.argv = sys.argv[1:]; "
_STOCK += "runpy.run_path(sys.argv[0], run_name='__main__')"


def stock_score(score: float) -> float:
    """Return what softmax-order makes of a score: its threshold, for one of ours."""
    return math.exp(SHRINK * math.log(score / (1 - score)) - SHIFT)


def _ours(part: Any, registry: Any) -> bool:
    kind = part.get('type') if isinstance(part, dict) else None
    kind = registry.get(kind) if isinstance(kind, str) else kind
    return getattr(kind, '__module__', '').startswith('rambo_det')


def _stock_head(head: dict[str, Any], softmax: bool, dense: bool) -> None:
    """Change the config of a head in place to that of mmdet's."""
    name = head['type'] if isinstance(head['type'], str) else head['type'].__name__
    if _ours(head, MODELS):
        head['type'] = name.replace('RaMBO', '', 1)
        head.pop('box_avg', None)
    if not _ours(head.get('loss_cls'), MODELS):
        return
    if softmax:
        head['loss_cls'] = dict(type='CrossEntropyLoss', use_sigmoid=False)
    elif dense:
        head['loss_cls'] = dict(type='FocalLoss', use_sigmoid=True)
    else:
        classes = head['num_classes']
        head['loss_cls'] = dict(
            type='CrossEntropyCustomLoss', use_sigmoid=True, num_classes=classes
        )


def stock_config(cfg: Config, softmax: bool, any_score: bool) -> Config:
    """Return a copy of a config without anything of rambo_det.

    Args:
        cfg: The config.
        softmax: Whether the classifier has a background column.
        any_score: Whether RoI heads keep detections of any score.
    """
    found = cfg.to_dict()
    model = found['model']
    for part, dense in (
        (model.get('roi_head', {}).get('bbox_head', []), False),
        (model.get('bbox_head', []), True),
        (model.get('rpn_head', []), True),
    ):
        for head in part if isinstance(part, list) else [part]:
            _stock_head(head, softmax and part is not model.get('rpn_head'), dense)
    if any_score:
        model['test_cfg']['rcnn']['score_thr'] = 0.0
    hooks = found.get('default_hooks') or {}
    found['default_hooks'] = {k: v for k, v in hooks.items() if not _ours(v, HOOKS)}
    found.update(load_from=None, resume=False)
    # No imports and hooks of ours, nor what a base leaves, like settings of a loss.
    known = ('model', 'default_', 'env_', 'vis', 'log_', 'load_from', 'resume')
    known += ('train_', 'val_', 'test_', 'optim_', 'param_', 'auto_', 'randomness')
    return Config({k: v for k, v in found.items() if k.startswith(known)})


def convert(cfg: Config, content: dict[str, Any], mode: str) -> tuple[Config, dict]:
    """Return the stock config and the parameters.

    Args:
        cfg: The config.
        content: The checkpoint.
        mode: One of ``MODES``.

    Raises:
        ValueError: If the mode is not for this detector.
    """
    classifier = find_classifier(build(cfg, content['state_dict']))
    # A memory of past scores, and what else a loss keeps.
    state = {k: v for k, v in content['state_dict'].items() if '.loss_cls.' not in k}
    widen = mode != 'sigmoid' and not classifier.softmax
    if widen and 'roi_head' not in cfg.model:
        raise ValueError(
            f'--mode {mode} is for RoI heads; mmdet reads the C columns of '
            f'{type(classifier.head).__name__} as sigmoids, so use --mode sigmoid'
        )
    if widen:
        scale, shift = (SHRINK, -SHIFT) if mode == 'softmax-order' else (1.0, 0.0)
        classifier.fold(
            np.full(classifier.columns, scale), np.full(classifier.columns, shift)
        )
        for name, layer in classifier.layers.items():
            for part in ('weight', 'bias'):
                value = getattr(layer, part).detach().cpu()
                state[f'{name}.{part}'] = torch.cat([value, 0 * value[:1]])
    softmax = widen or classifier.softmax
    return stock_config(cfg, softmax, widen and mode == 'softmax-order'), state


def _test(script: Sequence[str], config: Path, checkpoint: Path, folder: Path) -> Any:
    dump = folder / 'detections.pkl'
    command = [sys.executable, '-W', 'ignore', *script, str(config), str(checkpoint)]
    command += ['--work-dir', str(folder), '--out', str(dump), '--cfg-options']
    part = 'rcnn.' if 'roi_head' in Config.fromfile(config).model else ''
    command.append(f'model.test_cfg.{part}score_thr=0.0')  # the scales differ
    print(f'testing {checkpoint} …', flush=True)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise ValueError(f'the test failed:\n{done.stderr[-2000:]}')
    return load_run(config, dump)


def check(config: Path, checkpoint: Path, out: Path, folder: Path) -> dict[str, float]:
    """Test a detector and what became of it, the latter without rambo_det.

    Returns:
        AP of both in percent, and the mean and largest difference of the scores of
        detections with the same box and class.
    """
    ours = Path(__file__).resolve().parents[1] / 'test.py'
    theirs = [str(find_mmdet_script('test'))]
    runs = [
        _test([str(ours)], config, checkpoint, folder / 'ours'),
        _test(['-c', _STOCK, *theirs], out.with_suffix('.py'), out, folder / 'stock'),
    ]
    scores = [scores_by_box(run) for run in runs]
    off = [abs(scores[0][key] - scores[1][key]) for key in scores[0].keys() & scores[1]]
    return dict(
        before=100 * runs[0].mean_ap,
        after=100 * runs[1].mean_ap,
        mean_difference=float(np.mean(off or [np.nan])),
        largest_difference=float(np.max(off or [np.nan])),
        same_boxes=100 * len(off) / max(len(scores[0]), 1),
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float] | None:
    """Run the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', type=Path)
    parser.add_argument('checkpoint', type=readable_file)
    parser.add_argument(
        'out', type=writable_file, help='the checkpoint; OUT.py is its config'
    )
    parser.add_argument('--mode', choices=MODES, default=MODES[0])
    parser.add_argument(
        '--check', type=writable_folder, metavar='DIR', help='test both there'
    )
    args = parser.parse_args(argv)
    if args.out.suffix != '.pth':
        parser.error(f'OUT must end in .pth, got {args.out}')
    with parser.refusing():
        cfg = load_config(args.config)
        content = load_checkpoint(args.checkpoint, cfg)
        stock, state = convert(cfg, content, args.mode)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(args.out) as draft:
            torch.save(dict(meta=content.get('meta', {}), state_dict=state), draft)
        stock.dump(args.out.with_suffix('.py'))
        print(f'{args.out}, {args.out.with_suffix(".py")}: {args.mode}')
        threshold = content.get('meta', {}).get('calibration', {}).get('threshold')
        if args.mode == 'softmax-order':
            known = threshold or 0.5
            print(f'in place of {known:.3f} use score_thr={stock_score(known):.4g}')
        if not args.check:
            return None
        found = check(args.config, args.checkpoint, args.out, args.check)
    print(json.dumps(found, indent=1))
    return found


if __name__ == '__main__':
    main()
