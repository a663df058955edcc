"""Train retrieval of Omniglot's characters; every run is a row of one file.

    python tools/experiments/retrieval.py --tune        # on alphabets to train, alone
    python tools/experiments/retrieval.py --seeds 0 1 2
    python tools/experiments/retrieval.py --table-only --update docs/retrieval.md
    python tools/experiments/retrieval.py --table-only --draw docs/images/retrieval.png

``RAMBO_OMNIGLOT`` names the folder that tools/dataset_tools/omniglot.py has written.
Without a CONFIG all configs/reid/*_omniglot.py are trained, each in one thread, with
each of the seeds, and tested on alphabets that no training image shows. With ``--tune``
three of the alphabets to train train, and the other two test the settings in GRID; the
configs have the best ones. Runs that have a row are skipped. The features are ranked as
mmdet's ReIDMetrics does it, every image a query and all others the gallery.

A row: ``data``, ``model``, ``loss`` and ``seed`` name it. In percent: ``R1``, ``R5``
and ``mAP``, ``recall``, which is R@k for k = 1..20, and ``curve``, R@1 after so many
steps, with the mean training loss since the last time. ``seconds``: of the training,
without tests. ``nearest``: some images with those nearest to them, but in the tuning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import Tensor

from rambo_det.functional import average_precision, recall_at_k
from tools import ROOT
from tools.common.markdown_table import markdown_table, split_page, update_page
from tools.common.wrong_calls import (
    Parser,
    at_least,
    readable_file,
    writable_file,
    writable_folder,
)
from tools.experiments import converged
from tools.experiments.converged import Row, difference_text, mean_text, read_rows
from tools.experiments.runs import parse_options, resolve, versions

OUT = ROOT / 'docs' / 'results' / 'retrieval.json'
CONFIGS = sorted((ROOT / 'configs' / 'reid').glob('*_omniglot.py'))
MARKS = ('<!-- retrieval -->', '<!-- end retrieval -->')
KEY = ('data', 'model', 'loss', 'seed')


def _steps(count: int) -> list[str]:
    return [
        f'train_cfg.max_iters={count}',
        f'train_cfg.val_interval={count // 8}',
        f'param_scheduler.1.T_max={count}',
    ]


TUNING = [
    'train_dataloader.dataset.ann_file=meta/tuning-train.txt',
    'test_dataloader.dataset.ann_file=meta/tuning-test.txt',
    'max_iters=800',
    *_steps(800),
    'default_hooks.checkpoint.interval=800',
]
_HEAD, _LOSS = 'model.head', 'model.head.loss_triplet'
_RATE = 'optim_wrapper.optimizer.lr'
_UNIT, _LINEAR = f'{_HEAD}.type=UnitReIDHead', f'{_HEAD}.type=LinearReIDHead'


def _settings(rate: str, margin: float, *more: str) -> list[str]:
    return [f'{_RATE}={rate}', f'{_LOSS}.margin={margin}', *more]


LONG = _steps(1600)
# For each loss what is tried. Each one sets all that is tuned. 'long' has the steps of
# the configs, the others half as many.
GRID = {
    'triplet': {
        'unit-lr3-m0.2': _settings('3e-3', 0.2, _UNIT),
        'linear-lr3-m0.3': _settings('3e-3', 0.3, _LINEAR),
        'unit-lr3-m0.2-long': _settings('3e-3', 0.2, _UNIT, *LONG),
        'linear-lr3-m0.3-long': _settings('3e-3', 0.3, _LINEAR, *LONG),
        'linear-lr10-m0.3': _settings('1e-2', 0.3, _LINEAR),
    },
    'ce': {
        'lr10': [f'{_RATE}=1e-2'],
        'lr10-long': [f'{_RATE}=1e-2', *LONG],
        'lr30': [f'{_RATE}=3e-2'],
        'lr100': [f'{_RATE}=1e-1'],
    },
    'rambo-recall': {
        'lr10-m0.2': _settings('1e-2', 0.2),
        'lr30-m0.2': _settings('3e-2', 0.2),
        'lr10-m0.3': _settings('1e-2', 0.3),
        'lr30-m0.3': _settings('3e-2', 0.3),
        'lr10-m0.5': _settings('1e-2', 0.5),
    },
    'rambo-ap': {
        'lr30-m0.2': _settings('3e-2', 0.2),
        'lr10-m0.3': _settings('1e-2', 0.3),
        'lr10-m0.3-long': _settings('1e-2', 0.3, *LONG),
        'lr30-m0.3': _settings('3e-2', 0.3),
        'lr10-m0.5': _settings('1e-2', 0.5),
    },
    'rambo-paper': {
        'lr10-m0.3-t0': _settings('1e-2', 0.3, f'{_LOSS}.memory=0'),
        'lr30-m0.02-t3': _settings('3e-2', 0.02, f'{_LOSS}.memory=3'),
        'lr30-m0.2-t0': _settings('3e-2', 0.2, f'{_LOSS}.memory=0'),
    },
}
NOTE = (
    'In percent; mean ± standard deviation over seeds. Δ: the mean difference of R@1 '
    "with the same seeds, with Student's 95 % interval. On the right R@1 after parts "
    'of the training.'
)
DEPTH, QUERIES, SHOWN = 20, 5, 6


def measure(feats: Tensor, labels: Tensor, depth: int = DEPTH) -> dict[str, Any]:
    """Rank all others for each image by distance; return what a row holds of it.

    With a ``depth`` of 1 that is R@1 alone, which takes little time.
    """
    scores = -torch.cdist(feats, feats)
    others = ~torch.eye(len(labels), dtype=torch.bool)
    given = scores, labels[:, None] == labels
    recall = [recall_at_k(*given, k, others) for k in range(1, depth + 1)]
    found = [round(100 * float(hits.nanmean()), 2) for hits in recall]
    if depth == 1:
        return dict(R1=found[0])
    precision = 100 * float(average_precision(*given, others).nanmean())
    return dict(R1=found[0], R5=found[4], mAP=round(precision, 2), recall=found)


def nearest(feats: Tensor, files: Sequence[str]) -> dict[str, list[str]]:
    """Return for some images, evenly spread, the names of those nearest to them."""
    queries = torch.linspace(0, len(files) - 1, QUERIES + 2).long()[1:-1]
    distance = torch.cdist(feats[queries], feats)
    distance[torch.arange(QUERIES), queries] = float('inf')
    order = distance.argsort(dim=1)[:, :SHOWN].tolist()
    rows = zip(queries.tolist(), order)
    return {files[query]: [files[i] for i in row] for query, row in rows}


class _Test(Hook):
    """Tests a model from time to time, many of the small images at once."""

    def __init__(self, dataset: dict[str, Any], interval: int) -> None:
        data = DATASETS.build(dataset)
        infos = [data.get_data_info(i) for i in range(len(data))]
        self.images = torch.cat([data[i]['inputs'] for i in range(len(data))])
        self.labels = torch.tensor([int(info['gt_label']) for info in infos])
        root = Path(data.data_prefix['img_path'])
        self.files = [str(Path(info['img_path']).relative_to(root)) for info in infos]
        self.interval, self.seconds = interval, 0.0
        self.curve: list[dict[str, float]] = []
        self.losses: list[float] = []

    @torch.no_grad()
    def features(self, model: Any) -> Tensor:
        normal = model.eval().data_preprocessor
        parts = ((part - normal.mean) / normal.std for part in self.images.split(128))
        found = torch.cat([model(part, mode='tensor') for part in parts])
        model.train()
        return found

    def after_train_iter(self, runner: Any, *_: Any, outputs: Any, **__: Any) -> None:
        self.losses.append(float(outputs['loss'].detach()))
        if self.every_n_train_iters(runner, self.interval):
            begin = time.monotonic()
            found = measure(self.features(runner.model), self.labels, depth=1)
            loss = round(float(np.mean(self.losses)), 4)
            self.curve.append(dict(step=runner.iter + 1, **found, loss=loss))
            self.losses.clear()
            self.seconds += time.monotonic() - begin


def train(cfg: Config, work_dir: Path) -> dict[str, Any]:
    """Train a config and return what is measured on its test set."""
    init_default_scope('mmdet')
    test = _Test(cfg.test_dataloader.dataset, cfg.train_cfg.pop('val_interval'))
    for part in ('dataloader', 'cfg', 'evaluator'):
        cfg[f'val_{part}'] = cfg[f'test_{part}'] = None
    cfg.work_dir, cfg.log_level = str(work_dir), 'WARNING'
    runner = Runner.from_cfg(cfg)
    runner.register_hook(test)
    begin = time.monotonic()
    feats = test.features(runner.train())
    return dict(
        **measure(feats, test.labels),
        images=len(test.labels),
        curve=test.curve,
        seconds=round(time.monotonic() - begin - test.seconds, 1),
        nearest=nearest(feats, test.files),
    )


def run(args: argparse.Namespace) -> None:
    """Make the runs that have no row yet.

    Raises:
        ValueError: If a row is that of another config.
    """
    torch.set_num_threads(1)
    rows = {tuple(row[key] for key in KEY): row for row in read_rows(args.out)}
    todo = []
    for seed in args.seeds:
        for path in args.configs:
            _, model, loss, data = path.stem.split('_')
            if not args.tune:
                todo.append((path, (data, model, loss, seed), []))
                continue
            for name, options in GRID.get(loss, {}).items():
                key = (f'{data}-tuning', model, f'{loss}-{name}', seed)
                todo.append((path, key, [*TUNING, *options]))
    for path, key, options in todo:
        resolved = json.dumps(resolve(path, options))
        sha = hashlib.sha256(resolved.encode()).hexdigest()
        if rows.get(key, {}).get('config_sha', sha) != sha:
            raise ValueError(f'{args.out} has a row of {key} of another config')
        if key in rows:
            continue
        cfg = Config.fromfile(path)
        cfg.merge_from_dict({**parse_options(options), 'randomness.seed': key[-1]})
        found = train(cfg, args.work_dir / '_'.join(map(str, key)))
        if args.tune:
            del found['nearest']
        row = dict(
            **dict(zip(KEY, key)),
            config=str(path.resolve().relative_to(ROOT)),
            config_sha=sha,
            options=options,
            date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
            versions=versions(),
            **found,
        )
        converged.add_rows(args.out, [row], KEY)
        print(f'{key}: R@1 {row["R1"]}, mAP {row["mAP"]}', flush=True)


def by_loss(rows: Sequence[Row], data: str) -> dict[str, dict[int, Row]]:
    """Sort the rows of a data set by loss, then by seed."""
    found: dict[str, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: (row['loss'], row['seed'])):
        if row['data'] == data:
            found.setdefault(row['loss'], {})[row['seed']] = row
    return found


def table(rows: Sequence[Row], tuning: bool) -> str:
    """Return a Markdown table of the tuning, or of the test."""
    losses = by_loss(rows, 'omniglot-tuning' if tuning else 'omniglot')
    bases = [] if tuning else [loss for loss in losses if 'rambo' not in loss]
    points = max((len(of[0]['curve']) for of in losses.values()), default=0)
    way = [f'at {k}/{points}' for k in range(1, points + 1)]
    head = ['loss', 'seeds', 'R@1', 'R@5', 'mAP', *(f'Δ to {base}' for base in bases)]
    lines: list[list[Any]] = [[*head, *way]]
    for loss, runs in losses.items():
        found = [*runs.values()]
        lines.append([loss, len(found)])
        lines[-1] += [mean_text(found, key) for key in ('R1', 'R5', 'mAP')]
        for base in bases:
            both = [seed for seed in runs if seed in losses[base] and loss != base]
            pairs = [[of[seed] for seed in both] for of in (runs, losses[base])]
            lines[-1].append(difference_text(*pairs, 'R1') if both else '')
        for reached in zip(*(row['curve'] for row in found)):
            lines[-1].append(f'{np.mean([point["R1"] for point in reached]):.1f}')
    return f'{markdown_table(lines)}\n\n{NOTE}'


def draw(rows: Sequence[Row], imgs: Path, out: Path) -> None:
    """Draw R@k of each loss, and images with those nearest to them."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from PIL import Image

    losses = by_loss(rows, 'omniglot')
    shown = [loss for loss in losses if loss in ('ce', 'rambo-ap')]
    figure = plt.figure(figsize=(11, 4.2), layout='constrained')
    ratios = [1.3] + [1] * len(shown)
    left, *parts = figure.subfigures(1, len(ratios), width_ratios=ratios)
    axes = left.subplots()
    for loss, runs in losses.items():
        mean = np.mean([row['recall'] for row in runs.values()], axis=0)
        axes.plot(range(1, DEPTH + 1), mean, label=loss)
    axes.set(xlabel='k', ylabel='R@k in percent, unseen alphabets')
    axes.legend(frameon=False)
    for part, loss in zip(parts, shown):
        part.suptitle(f'{loss}: query, nearest others', fontsize=10)
        grid = part.subplots(QUERIES, SHOWN + 1)
        for line, (query, found) in zip(grid, losses[loss][0]['nearest'].items()):
            for cell, name in zip(line, [query, *found]):
                cell.imshow(Image.open(imgs / name), cmap='gray')
                cell.set(xticks=[], yticks=[])
                # What is before the drawer's number names the character.
                right = name.rsplit('_', 1)[0] == query.rsplit('_', 1)[0]
                colour = 'tab:green' if right else 'tab:red'
                for side in cell.spines.values():
                    side.set(color='black' if name == query else colour, linewidth=2)
    figure.savefig(out, dpi=100)
    print(f'wrote {out}')


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='*', type=readable_file, metavar='CONFIG')
    parser.add_argument('--seeds', nargs='+', type=at_least(0), default=[0])
    parser.add_argument('--tune', action='store_true', help='try the settings in GRID')
    parser.add_argument(
        '--work-dir', type=writable_folder, default=Path('work_dirs/retrieval')
    )
    parser.add_argument(
        '--out', type=writable_file, default=OUT, help='the file of the rows'
    )
    parser.add_argument('--table-only', action='store_true', help='train nothing')
    parser.add_argument('--update', type=readable_file, metavar='PAGE.md')
    parser.add_argument('--draw', type=writable_file, metavar='PICTURE.png')
    args = parser.parse_args(argv)
    args.configs = args.configs or CONFIGS
    try:
        if args.update:  # not only after hours of training
            split_page(args.update, *MARKS)
        if not args.table_only:
            run(args)
        rows = read_rows(args.out)
        print(f'\n{table(rows, args.tune)}')
        if args.update:
            update_page(args.update, *MARKS, table(rows, False))
        if args.draw:
            root = Config.fromfile(CONFIGS[0]).data_root
            draw(rows, Path(root) / 'imgs', args.draw)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
