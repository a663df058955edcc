"""Train retrieval of Omniglot's characters; every run is a row of one file.

    python tools/experiments/retrieval.py --tune        # on alphabets to train, alone
    python tools/experiments/retrieval.py --seeds 0 1 2
    python tools/experiments/retrieval.py --table-only --update docs/retrieval.md
    python tools/experiments/retrieval.py --draw docs/images/retrieval.png

``RAMBO_OMNIGLOT`` names the folder that tools/dataset_tools/omniglot.py has written.
Without a CONFIG all configs/reid/*_omniglot.py are trained, each in one thread, with
each of the seeds, and tested on alphabets that no training image shows. With ``--tune``
three of the alphabets to train train, and the other two test the settings in GRID; the
configs have the best ones. Runs that have a row are skipped. The features are ranked as
mmdet's ReIDMetrics does it, every image a query and all others the gallery.

A row: ``data``, ``model``, ``loss`` and ``seed`` name it. In percent: ``R1``, ``R5``
and ``mAP``, ``recall``, which is R@k for k = 1..20, and ``curve``, R@1 and mAP after
so many steps. ``seconds``: of the training, without tests. ``nearest``: some images
with those nearest to them.
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
from mmengine.config import Config
from torch import Tensor

from rambo_det.functional import average_precision, recall_at_k
from tools import ROOT
from tools.common.markdown_table import markdown_table, split_page, update_page
from tools.experiments.converged import (
    Row,
    add_rows,
    difference_text,
    mean_text,
    read_rows,
)
from tools.experiments.runs import parse_options, resolve, versions

OUT = ROOT / 'docs' / 'results' / 'retrieval.json'
CONFIGS = sorted((ROOT / 'configs' / 'reid').glob('*_omniglot.py'))
MARKS = ('<!-- retrieval -->', '<!-- end retrieval -->')
KEY = ('data', 'model', 'loss', 'seed')
TUNING = [
    'train_dataloader.dataset.ann_file=meta/tuning-train.txt',
    'test_dataloader.dataset.ann_file=meta/tuning-test.txt',
]
_HEAD, _LOSS = 'model.head', 'model.head.loss_triplet'
# For each loss what is tried, beside what its config has.
GRID = {
    'triplet': {
        'm0.1': [f'{_LOSS}.margin=0.1'],
        'm0.6': [f'{_LOSS}.margin=0.6'],
    },
    'ce': {
        'lr10': ['optim_wrapper.optimizer.lr=1e-2'],
        'linear': [f'{_HEAD}.type=LinearReIDHead'],
    },
    'rambo-recall': {
        'm0.4': [f'{_LOSS}.margin=0.4'],
        'memory': [f'{_LOSS}.memory=4'],
    },
    'rambo-ap': {
        'm0.4': [f'{_LOSS}.margin=0.4'],
        'memory': [f'{_LOSS}.memory=4'],
    },
    'rambo-paper': {'l0.5': [f'{_LOSS}.lambd=0.5']},
}
NOTE = (
    'In percent; mean ± standard deviation over seeds. Below each loss: the mean '
    "difference of R@1 to it with the same seeds, with Student's 95 % interval."
)
DEPTH, QUERIES, SHOWN = 20, 5, 6


def names(stem: str, loss: str = '', tuning: bool = False) -> dict[str, str]:
    """Read data, model and loss of a run from the name of its config.

    Raises:
        ValueError: If the name is not laid out as those of configs/reid.
    """
    parts = stem.split('_')
    if len(parts) != 4:
        raise ValueError(
            f'a config must be named reid_MODEL_LOSS_DATA.py, got {stem!r}'
        )
    data = f'{parts[3]}-tuning' if tuning else parts[3]
    return dict(data=data, model=parts[1], loss=loss or parts[2])


def measure(feats: Tensor, labels: Tensor) -> dict[str, Any]:
    """Rank all others for each image by distance; return what a row holds of it."""
    scores = -torch.cdist(feats, feats)
    others = ~torch.eye(len(labels), dtype=torch.bool)
    targets = labels[:, None] == labels
    given = scores, targets
    recall = [recall_at_k(*given, k, others) for k in range(1, DEPTH + 1)]
    found = [round(100 * float(hits.nanmean()), 2) for hits in recall]
    precision = average_precision(*given, others).nanmean()
    return dict(
        R1=found[0],
        R5=found[4],
        mAP=round(100 * float(precision), 2),
        recall=found,
    )


def nearest(feats: Tensor, files: Sequence[str]) -> dict[str, list[str]]:
    """Return for some images, evenly spread, the names of those nearest to them."""
    queries = torch.linspace(0, len(files) - 1, QUERIES + 2).long()[1:-1]
    distance = torch.cdist(feats[queries], feats)
    distance[torch.arange(QUERIES), queries] = float('inf')
    order = distance.argsort(dim=1)[:, :SHOWN].tolist()
    return {
        files[query]: [files[i] for i in row]
        for query, row in zip(queries.tolist(), order)
    }


def train(cfg: Config, work_dir: Path) -> dict[str, Any]:
    """Train a config and return what is measured on its test set."""
    from mmdet.registry import DATASETS
    from mmengine.hooks import Hook
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    init_default_scope('mmdet')
    data = DATASETS.build(cfg.test_dataloader.dataset)
    # As small images all fit into memory, and are tested many at once.
    images = torch.cat([data[i]['inputs'] for i in range(len(data))])
    infos = [data.get_data_info(i) for i in range(len(data))]
    labels = torch.tensor([int(info['gt_label']) for info in infos])
    interval = cfg.train_cfg.pop('val_interval')
    for name in ('val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{name}_{part}'] = None
    cfg.work_dir, cfg.log_level = str(work_dir), 'WARNING'
    curve: list[dict[str, float]] = []
    spent = 0.0

    @torch.no_grad()
    def features(model: Any) -> Tensor:
        normal = model.eval().data_preprocessor
        found = [
            model((part - normal.mean) / normal.std, mode='tensor')
            for part in images.split(128)
        ]
        model.train()
        return torch.cat(found)

    class Test(Hook):
        def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
            nonlocal spent
            if self.every_n_train_iters(runner, interval):
                begin = time.monotonic()
                found = measure(features(runner.model), labels)
                curve.append(
                    dict(step=runner.iter + 1, R1=found['R1'], mAP=found['mAP'])
                )
                spent += time.monotonic() - begin

    runner = Runner.from_cfg(cfg)
    runner.register_hook(Test())
    begin = time.monotonic()
    model = runner.train()
    seconds = time.monotonic() - begin - spent
    feats = features(model)
    root = Path(cfg.train_dataloader.dataset.data_root) / 'imgs'
    files = [str(Path(info['img_path']).relative_to(root)) for info in infos]
    return dict(
        **measure(feats, labels),
        images=len(labels),
        curve=curve,
        seconds=round(seconds, 1),
        nearest=nearest(feats, files),
    )


def run(args: argparse.Namespace) -> None:
    """Make the runs that have no row yet.

    Raises:
        ValueError: If a row is that of another config.
    """
    torch.set_num_threads(1)
    todo = []
    for seed in args.seeds:
        for path in args.configs:
            loss = names(path.stem)['loss']
            grid = {'': [], **GRID.get(loss, {})} if args.tune else {'': []}
            for variant, options in grid.items():
                named = names(
                    path.stem, '-'.join(filter(None, [loss, variant])), args.tune
                )
                todo.append(
                    (path, named, [*(TUNING if args.tune else []), *options], seed)
                )
    rows = {tuple(row[key] for key in KEY): row for row in read_rows(args.out)}
    for path, named, options, seed in todo:
        resolved = resolve(path, options)
        sha = hashlib.sha256(json.dumps(resolved).encode()).hexdigest()
        row = rows.get((*named.values(), seed))
        name = '_'.join(named.values())
        if row:
            if row['config_sha'] != sha:
                raise ValueError(f'{args.out} has a row of {name} of another config')
            continue
        cfg = Config.fromfile(path)
        cfg.merge_from_dict({**parse_options(options), 'randomness.seed': seed})
        found = train(cfg, args.work_dir / name / f'seed_{seed}')
        row = dict(
            **named,
            seed=seed,
            config=str(path.resolve().relative_to(ROOT)),
            config_sha=sha,
            options=options,
            date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
            versions=versions(),
            **found,
        )
        add_rows(args.out, [row], KEY)
        print(f'{name} seed {seed}: R@1 {row["R1"]}, mAP {row["mAP"]}', flush=True)


def by_loss(rows: Sequence[Row], data: str) -> dict[str, list[Row]]:
    """Sort the rows of a data set by loss, and by seed; rows of fewer seeds go."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row['seed']):
        if row['data'] == data:
            found.setdefault(row['loss'], []).append(row)
    order = [path.stem.split('_')[2] for path in CONFIGS]
    return dict(
        sorted(
            found.items(),
            key=lambda item: (
                order.index(item[0]) if item[0] in order else 99,
                item[0],
            ),
        )
    )


def tables(rows: Sequence[Row], tuning: bool) -> str:
    """Return a Markdown table of the tuning, or of the test and of the way there."""
    losses = by_loss(rows, 'omniglot-tuning' if tuning else 'omniglot')
    measures = ('R1', 'R5', 'mAP')
    head = ['loss', 'seeds', 'R@1', 'R@5', 'mAP']
    lines = [
        [loss, len(found), *(mean_text(found, key) for key in measures)]
        for loss, found in losses.items()
    ]
    if tuning:
        return markdown_table([head, *lines])
    steps = [
        point['step']
        for point in next(iter(losses.values()), [{'curve': []}])[0]['curve']
    ]
    way = [
        [
            loss,
            *(
                f'{np.mean([row["curve"][i]["R1"] for row in found]):.1f}'
                for i in range(len(steps))
            ),
        ]
        for loss, found in losses.items()
    ]
    for line, (loss, found) in zip(lines, losses.items()):
        for other, base in losses.items():
            pairs = [(a, b) for a in found for b in base if a['seed'] == b['seed']]
            line.append(
                ''
                if other == loss or not pairs
                else difference_text(*zip(*pairs), 'R1')
            )
    return '\n\n'.join(
        [
            markdown_table([[*head, *(f'Δ to {loss}' for loss in losses)], *lines]),
            NOTE + ' R@1 on the way there:',
            markdown_table([['loss', *(f'step {step}' for step in steps)], *way]),
        ]
    )


def draw(rows: Sequence[Row], imgs: Path, out: Path) -> None:
    """Draw R@k of each loss, and images with those nearest to them."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from PIL import Image

    losses = by_loss(rows, 'omniglot')
    shown = [loss for loss in losses if loss in ('triplet', 'rambo-recall')]
    figure = plt.figure(figsize=(11, 4.2), layout='constrained')
    left, *parts = figure.subfigures(
        1, 1 + len(shown), width_ratios=[1.3] + [1] * len(shown)
    )
    axes = left.subplots()
    for loss, found in losses.items():
        mean = np.mean([row['recall'] for row in found], axis=0)
        axes.plot(range(1, DEPTH + 1), mean, label=loss)
    axes.set(
        xlabel='k',
        ylabel='R@k in percent, unseen alphabets',
        xticks=range(1, DEPTH + 1, 3),
    )
    axes.legend(frameon=False)
    for part, loss in zip(parts, shown):
        part.suptitle(f'{loss}: query, nearest', fontsize=10)
        grid = part.subplots(QUERIES, SHOWN + 1)
        for line, (query, found) in zip(grid, losses[loss][0]['nearest'].items()):
            for cell, name in zip(line, [query, *found]):
                cell.imshow(Image.open(imgs / name), cmap='gray')
                cell.set(xticks=[], yticks=[])
                # The part before the drawer's number names the character.
                right = name.rsplit('_', 1)[0] == query.rsplit('_', 1)[0]
                colour = (
                    'black' if name is query else 'tab:green' if right else 'tab:red'
                )
                for side in cell.spines.values():
                    side.set(color=colour, linewidth=1 if name is query else 2.5)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    print(f'wrote {out}')


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='*', type=Path, metavar='CONFIG')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--tune', action='store_true', help='try the settings in GRID')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/retrieval'))
    parser.add_argument('--out', type=Path, default=OUT, help='the file of the rows')
    parser.add_argument('--table-only', action='store_true', help='train nothing')
    parser.add_argument('--update', type=Path, metavar='PAGE.md')
    parser.add_argument('--draw', type=Path, metavar='PICTURE.png')
    args = parser.parse_args(argv)
    args.configs = args.configs or CONFIGS
    try:
        if args.update:  # not only after hours of training
            split_page(args.update, *MARKS)
        if not (args.table_only or args.draw):
            run(args)
        rows = read_rows(args.out)
        text = tables(rows, args.tune)
        print(f'\n{text}')
        if args.update:
            update_page(args.update, *MARKS, text)
        if args.draw:
            root = Config.fromfile(CONFIGS[0]).data_root
            draw(rows, Path(root) / 'imgs', args.draw)
    except (OSError, ValueError) as error:
        sys.exit(f'retrieval: {error}')


if __name__ == '__main__':
    main()
