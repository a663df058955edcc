"""Try losses and their hyper-parameters in minutes: train the box head alone.

    python tools/ablate_head.py CONFIG CHECKPOINT --cache CACHE --out OUT.json \\
        --set ce 'dict(type="CrossEntropyLoss")' \\
        --set lambd1 'dict(type="RaMBOLoss", lambd=1.0)'

Proposals and their features are computed once with the frozen detector of CHECKPOINT
(tools/roi_cache.py). On them each setting trains a new box head, classifier and box
regression as in full training, and is evaluated on the last ``--val-images`` images of
the training split, never on the test split. The detector should not have seen them
either: train it with ``--cfg-options train_dataloader.dataset.indices=1600`` where the
split has 2000 images.

``--set NAME DICT`` takes a loss, or a setting; ``--settings FILE.py`` defines a
dictionary ``settings`` of more. What a setting does not name is the config's:

    settings = dict(
        slow=dict(
            loss_cls=dict(type='RaMBOLoss', lambd=1.0, loss_weight=10.0),
            schedules=[  # arguments of RaMBOScheduleHook, a hook each
                dict(param='lambd', start=100.0, curve='exponential')
            ],
            lr=1e-4, epochs=5, batch_size=4,
            bbox_head=dict(fc_out_channels=256),  # merged into the config's, as are
            optim_wrapper=dict(clip_grad=None),  # these two
            test_cfg=dict(score_thr=0.01),
        )
    )

A RaMBOLoss in a stock head gets the head of this package, which tells it the image of
each RoI. Its schedules are the config's only where the loss is too. Settings that
OUT.json already holds are not run again, unless their definition has changed.

``--full FILE...`` tells how well the order of the settings agrees with full training:
each file is a JSON object of AP50 by setting, or the ``scalars.json`` of the training
of the setting that the file is named after.

What is not as in full training: the features do not learn, gradients are clipped by
the norm of the head's alone, and each epoch repeats the RoIs of one of ``--samples``
passes of the detector over the images.
"""

from __future__ import annotations

import argparse
import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import ablate_report
from atomic_file import atomic_file
from head_training import SCHEDULE, build_head, train_head
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from roi_cache import RoiCache, open_cache

KEYS = (
    *('loss_cls', 'bbox_head', 'optim_wrapper', 'lr', 'epochs', 'batch_size'),
    *('schedules', 'test_cfg'),
)


# Settings


def parse_setting(name: str, text: str) -> dict[str, Any]:
    """Read the dictionary of ``--set``: a loss where it has a type, else a setting."""
    try:
        value = eval(text, {'__builtins__': {}}, {'dict': dict})
    except Exception as error:
        raise ValueError(
            f'ablate_head: --set {name} must be a Python dictionary such as '
            f'dict(type="RaMBOLoss", lambd=1.0), got {text!r}: {error}'
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f'ablate_head: --set {name} must be a dictionary, got {value!r}; write '
            'dict(type="RaMBOLoss") for a loss, dict(lr=1e-3) for a setting'
        )
    return dict(loss_cls=value) if 'type' in value else value


def read_settings(path: Path) -> dict[str, dict[str, Any]]:
    """Run a Python file and return its ``settings``."""
    settings = runpy.run_path(str(path)).get('settings')
    if not isinstance(settings, dict):
        raise ValueError(
            f'ablate_head: --settings {path} must define settings = dict(name=dict('
            f'loss_cls=dict(type=…), lr=…)), got {settings!r}'
        )
    return settings


def _stretched(scheduler: dict[str, Any], ratio: float) -> dict[str, Any]:
    """A schedule of epochs for another number of epochs; one of steps stays."""
    scheduler = copy.deepcopy(scheduler)
    if scheduler.get('by_epoch', True):
        for key in {'begin', 'end', 'T_max'} & scheduler.keys():
            scheduler[key] = round(scheduler[key] * ratio)
        if 'milestones' in scheduler:
            scheduler['milestones'] = [
                round(epoch * ratio) for epoch in scheduler['milestones']
            ]
    return scheduler


def _config_schedules(cfg: Config) -> list[dict[str, Any]]:
    hooks = [h for h in cfg.get('custom_hooks') or [] if h['type'] == SCHEDULE]
    return [{k: v for k, v in hook.items() if k != 'type'} for hook in hooks]


def resolve(cfg: Config, name: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Spell a setting out: all that its training depends on, but data and seed.

    Raises:
        ValueError: If the setting is no dictionary or has unknown keys.
    """
    if not isinstance(setting, dict) or set(setting) - set(KEYS):
        raise ValueError(
            f'ablate_head: setting {name!r} must be a dictionary with some of the keys '
            f'{", ".join(KEYS)}, got {setting!r}'
        )
    setting = copy.deepcopy(setting)
    changes: dict[str, Any] = dict(setting.get('bbox_head', {}))
    if 'loss_cls' in setting:
        changes['loss_cls'] = dict(setting['loss_cls'], _delete_=True)
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict(
        dict(
            model=dict(
                roi_head=dict(bbox_head=changes),
                test_cfg=dict(rcnn=setting.get('test_cfg', {})),
            ),
            optim_wrapper=setting.get('optim_wrapper', {}),
        )
    )
    head, wrapper = cfg.model.roi_head.bbox_head, cfg.optim_wrapper
    own = f'RaMBO{head.type}'
    if head.loss_cls.type == 'RaMBOLoss' and own in MODELS.module_dict:
        head.type = own
    if 'lr' in setting:
        wrapper.optimizer.lr = setting['lr']
    full = cfg.train_cfg.get('max_epochs')
    epochs = setting.get('epochs', full)
    if not full or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(
            f'ablate_head: epochs of setting {name!r} must be an integer > 0, and the '
            f'config must train by epochs, got {epochs!r} and train_cfg.max_epochs = '
            f'{full!r}'
        )
    inherited = [] if 'loss_cls' in setting else _config_schedules(cfg)
    definition = dict(
        bbox_head=head.to_dict(),
        optim_wrapper=wrapper.to_dict(),
        param_scheduler=[
            _stretched(dict(scheduler), epochs / full)
            for scheduler in cfg.get('param_scheduler') or []
        ],
        epochs=epochs,
        batch_size=setting.get('batch_size', cfg.train_dataloader.batch_size),
        schedules=setting.get('schedules', inherited),
        train_cfg=cfg.model.train_cfg.rcnn.to_dict(),
        test_cfg=cfg.model.test_cfg.rcnn.to_dict(),
    )
    return json.loads(json.dumps(definition))


# Results


def load_results(path: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """Read the results so far, or begin.

    Raises:
        ValueError: If the file holds results of another cache.
    """
    if not path.is_file():
        return dict(origin=origin, settings={})
    results = json.loads(path.read_text(encoding='utf-8'))
    found = results.get('origin')
    if found != origin:
        changed = [k for k in origin if (found or {}).get(k) != origin[k]]
        raise ValueError(
            f'ablate_head: --out {path} holds results with another '
            f'{" and another ".join(changed)}; they cannot stand in one table: name '
            'another file'
        )
    return results


def save_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results at once, so that stopping never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False) + '\n'
    with atomic_file(path) as draft:
        draft.write_text(text, encoding='utf-8')


def run_all(
    args: argparse.Namespace,
    settings: dict[str, dict[str, Any]],
    definitions: dict[str, dict[str, Any]],
    cache: RoiCache,
    results: dict[str, Any],
) -> list[str]:
    """Run what is not there yet and print a row each; return what failed."""
    longest = max((d['epochs'] for d in definitions.values()), default=0)
    failed = []
    print(ablate_report.header(longest), flush=True)
    for name, definition in definitions.items():
        entry = results['settings'].get(name, {})
        if entry.get('definition') != definition:
            entry = dict(setting=settings[name], definition=definition, runs={})
        results['settings'][name] = entry
        for seed in args.seeds:
            run = entry['runs'].get(str(seed))
            if run is None or (args.diagnose and 'diagnosis' not in run):
                try:
                    run = train_head(
                        definition,
                        cache,
                        seed,
                        name=name,
                        val_interval=args.val_interval,
                        diagnose=args.diagnose,
                        device=args.device,
                    )
                except (ValueError, RuntimeError) as error:
                    # Such as a loss that diverged: the other settings go on.
                    failed.append(f'{name}, seed {seed}: {error}')
                    print(f'ablate_head: {failed[-1]}', file=sys.stderr, flush=True)
                    continue
                entry['runs'][str(seed)] = run
                save_results(args.out, results)
            print(ablate_report.row(name, str(seed), run, longest), flush=True)
    return failed


def print_reports(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Print what is said of all results in the file."""
    settings = results['settings']
    sections = []
    if any(len(entry['runs']) > 1 for entry in settings.values()):
        sections.append(ablate_report.seeds_table(settings))
    if args.per_class:
        sections.append(ablate_report.per_class_table(settings, results['classes']))
    if args.diagnose:
        sections.append(ablate_report.diagnosis_table(settings))
    if args.full:
        full = ablate_report.read_full(args.full)
        sections.append(ablate_report.agreement(settings, full))
    for section in sections:
        print(f'\n{section}')


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', type=Path)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('--cache', type=Path, required=True, help='folder')
    parser.add_argument('--rebuild', action='store_true', help='make the cache anew')
    parser.add_argument('--out', type=Path, required=True, help='JSON of the results')
    parser.add_argument(
        *('--set', '-s'), nargs=2, action='append', default=[], metavar=('NAME', 'DICT')
    )
    parser.add_argument('--settings', type=Path, metavar='FILE.py')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='of the settings')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--val-images', type=int, default=400)
    parser.add_argument(
        *('--samples',),
        type=int,
        default=2,
        help='passes over the training images, each with its own flips and RoIs',
    )
    parser.add_argument('--val-interval', type=int, default=1, help='in epochs')
    parser.add_argument('--per-class', action='store_true')
    parser.add_argument('--diagnose', action='store_true')
    parser.add_argument('--full', type=Path, nargs='+', metavar='FILE')
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args(argv)
    for name in ('config', 'checkpoint', 'settings'):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            parser.error(f'{name} must be a file, got {path}, which does not exist')
    for name in ('samples', 'val_interval'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, got {getattr(args, name)}')
    return args


def collect_settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings of the file and the command line."""
    settings = read_settings(args.settings) if args.settings else {}
    settings = {**settings, **{name: parse_setting(name, t) for name, t in args.set}}
    unknown = set(args.only or []) - set(settings)
    if unknown:
        raise ValueError(
            f'ablate_head: --only names {sorted(unknown)}, expected some of '
            f'{sorted(settings)}'
        )
    return {k: v for k, v in settings.items() if not args.only or k in args.only}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    register_all_modules()
    if not MMLogger.check_instance_created('ablate_head'):
        MMLogger.get_instance('ablate_head', log_level='WARNING')
    cfg = Config.fromfile(args.config)
    try:
        settings = collect_settings(args)
        definitions = {k: resolve(cfg, k, v) for k, v in settings.items()}
        for definition in definitions.values():  # what is misspelt is known now
            build_head(definition['bbox_head'])
        cache = open_cache(
            args.cache,
            cfg,
            args.checkpoint,
            val_images=args.val_images,
            samples=args.samples,
            device=args.device,
            rebuild=args.rebuild,
        )
        origin = dict(cache.origin, samples=args.samples)
        results = dict(load_results(args.out, origin), classes=cache.classes)
        failed = run_all(args, settings, definitions, cache, results)
        print_reports(args, results)
    except (ValueError, TypeError, KeyError) as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f'ablate_head: {len(failed)} runs failed: ' + '; '.join(failed))
    return results


if __name__ == '__main__':
    main()
