"""Train detectors to convergence; every run is a row of one file.

    python tools/experiments/converged.py CONFIG.py --seeds 0 1 2
    python tools/experiments/converged.py CONFIG.py --loss ce-w4 --split tuning \\
        --cfg-options KEY=VALUE
    python tools/experiments/converged.py --table-only --update docs/results.md
    python tools/experiments/converged.py --add OTHER.json

A run is trained in one thread, tested, and its row put into ``--out``. Runs that have
a row are skipped and those that were interrupted go on bit for bit, so the same
command, also with more seeds, continues. ``--split tuning`` trains on the first 1,600
images of the training split and tests on its last 400, to choose settings by.
``--loss`` names a variant that ``--cfg-options`` make of the config. Exit status 1: a
run failed.

A row: ``data``, ``detector``, ``loss`` and ``seed`` name it. In percent, of the test
split: ``AP50`` (VOC's, area), ``AP`` (COCO's), ``AP75`` (COCO's at IoU 0.75),
``best_f1``, the best F1 at IoU 0.5 of the pooled detections of all classes with one
threshold, ``f1_at_half``, F1 of those that score 0.5 or more, ``class_AP50`` and
``class_AP``. ``best_threshold``: the score from which on F1 is best. ``curve``: the
mean losses of each epoch and AP50 where it was evaluated. ``seconds``: of the training,
with its validations, also while it was halted; ``step_seconds``: the median step.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Iterable, Iterator, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from scipy.stats import t

from tools import ROOT
from tools.common.atomic_file import atomic_file
from tools.common.markdown_table import markdown_table, split_page, update_page
from tools.experiments import compare, compare_report
from tools.experiments.compare_configs import check, load, parse_options
from tools.experiments.compare_jobs import Stopped

OUT = ROOT / 'docs' / 'results' / 'converged.json'
MARKS = compare_report.marks('converged')
BASELINE = 'ce'
_TRAINVAL = 'VOC2007/ImageSets/Main/trainval.txt'
SPLITS = dict(
    test=[],
    tuning=[
        'train_dataloader.dataset.indices=1600',
        *(
            f'{name}_dataloader.dataset.{option}'
            for name in ('val', 'test')
            for option in (f'ann_file={_TRAINVAL}', 'indices=-400')
        ),
    ],
)
NOTE = (
    'In percent; mean ± standard deviation over seeds. AP50 is that of VOC (area), AP '
    'and AP75 are those of COCO, F1 is that of the pooled detections of all classes. '
    f"Δ: the mean difference to `{BASELINE}` with the same seeds, with Student's "
    '95 % interval over the seeds. On the right AP50 on the way there.'
)
KEY = ('data', 'detector', 'loss', 'seed')
Row = dict[str, Any]


def names(stem: str, loss: str | None = None, split: str = 'test') -> dict[str, str]:
    """Read data, detector and loss of a run from the name of its config.

    Args:
        stem: The name.
        loss: The loss, if not that of the name.
        split: What it is tested on; data that are split otherwise are called so.

    Raises:
        ValueError: If the name is not laid out as those of configs/voc_subset.
    """
    parts = stem.split('_')
    if len(parts) != 6:
        raise ValueError(
            'a config must be named DETECTOR_BACKBONE_NECK_LOSS_SCHEDULE_DATA.py, as '
            f'those in configs/voc_subset, got {stem!r}'
        )
    detector, _, neck, own, _, data = parts
    return dict(
        data=data if split == 'test' else f'{data}-{split}',
        detector=f'{detector}-tiny' if neck.endswith('-tiny') else detector,
        loss=loss or own,
    )


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file; none if there is no file."""
    return compare_report.read_json(path)['runs'] if path.is_file() else []


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let other processes that ask for it wait."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def add_rows(path: Path, rows: Iterable[Row]) -> None:
    """Put rows in the places of those with the same names, at once or not at all.

    Other processes may do the same at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        found = {tuple(row[key] for key in KEY): row for row in read_rows(path)}
        found.update({tuple(row[key] for key in KEY): row for row in rows})
        lines = [f'  {json.dumps(found[key])}' for key in sorted(found)]
        with atomic_file(path) as draft:
            text = '{"runs": [\n' + ',\n'.join(lines) + '\n]}\n'
            draft.write_text(text, encoding='utf-8')


def step_seconds(folder: Path) -> float | None:
    """Return the median time of a step that the training's logs tell."""
    found = []
    for path in folder.glob('2*/vis_data/scalars.json'):
        for line in path.read_text().splitlines():
            if '"loss"' in line and line.endswith('}'):
                found.append(json.loads(line)['time'])
    return round(median(found), 4) if found else None


def _percent(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(100 * value, digits)


def make_row(plan: compare.Plan, named: dict[str, str], split: str) -> Row:
    """Make the row of a run from the record that compare.py has written."""
    record = compare_report.read_json(plan.record_path)
    path = plan.candidate.path.resolve()
    curve = [dict(point) for point in record['curve']]
    for point in curve:
        if 'val_ap50' in point:
            point['AP50'] = _percent(point.pop('val_ap50'))
    by_class = {
        key: {n: _percent(v, 2) for n, v in record[key.lower()].items()}
        for key in ('class_AP50', 'class_AP')
    }
    return dict(
        **named,
        seed=record['seed'],
        **{key: _percent(record[key.lower()]) for key in ('AP50', 'AP', 'AP75')},
        best_f1=_percent(record['best_f1']),
        best_threshold=round(record['best_threshold'], 4),
        f1_at_half=_percent(record['f1_at_half']),
        config=str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name),
        split=split,
        options=record['options'],
        images=record['images'],
        seconds=record['train_seconds'],
        step_seconds=step_seconds(plan.folder),
        **{key: record[key] for key in ('threads', 'sessions', 'date', 'versions')},
        config_sha=record['config_sha'],
        **by_class,
        curve=curve,
    )


def run(args: argparse.Namespace) -> int:
    """Make the runs that have no row yet, and their rows; return how many failed.

    Raises:
        ValueError: If something is wrong with the arguments or in the way.
    """
    options = [*SPLITS[args.split], *args.cfg_options]
    candidate = load(args.config, parse_options(options))
    check([candidate])
    named = names(candidate.stem, args.loss, args.split)
    candidate = replace(candidate, name='_'.join(named.values()))
    rows = {tuple(row[key] for key in KEY): row for row in read_rows(args.out)}
    plans = []
    for seed in args.seeds:
        row = rows.get((*named.values(), seed))
        if row and row['config_sha'] != candidate.sha:
            raise ValueError(
                f'{args.out} has a row of {candidate.name} seed {seed} of another '
                f'config (SHA-256 {row["config_sha"][:8]}, now {candidate.sha[:8]}); '
                'name this one with --loss, or delete the row'
            )
        if row:
            print(f'{candidate.name} seed {seed}: done before, AP50 {row["AP50"]:.1f}')
            continue
        folder = (args.work_dir / candidate.name / f'seed_{seed}').resolve()
        plan = compare.Plan(
            candidate=candidate,
            seed=seed,
            folder=folder,
            out=folder,
            options=options,
            versions=compare.versions(),
            threads=1,
        )
        refusal = plan.refusal()
        if refusal:
            raise ValueError(refusal)
        plans.append(plan)
    failed = 0
    for plan in plans:
        failed += compare.train([plan], jobs=1)
        if plan.is_done:
            add_rows(args.out, [make_row(plan, named, args.split)])
    return failed


def _mean(rows: Sequence[Row], key: str, form: str = '.1f') -> str:
    """Lay out a mean, with the standard deviation where there is one."""
    values = [row[key] for row in rows]
    text = f'{np.mean(values):{form}}'
    return f'{text} ± {np.std(values, ddof=1):{form}}' if len(values) > 1 else text


def _difference(rows: Sequence[Row], base: Sequence[Row], key: str) -> str:
    """Lay out the mean of the paired differences, with Student's 95 % interval."""
    values = [a[key] - b[key] for a, b in zip(rows, base)]
    mean, count = np.mean(values), len(values)
    if count < 2:
        return f'{mean:+.1f}'
    half = t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return f'{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]'


def _table(by_loss: dict[str, list[Row]]) -> str:
    curves = {
        loss: [{p['epoch']: p['AP50'] for p in r['curve'] if 'AP50' in p} for r in rows]
        for loss, rows in by_loss.items()
    }
    epochs = sorted({epoch for found in curves.values() for epoch in found[0]})
    head = ['AP50', 'AP', 'AP75', 'best F1', 'at score', 'F1 at 0.5', 'Δ AP50', 'Δ AP']
    lines = [['loss', *head, *(f'epoch {epoch}' for epoch in epochs)]]
    for loss, rows in by_loss.items():
        cells = [_mean(rows, key) for key in ('AP50', 'AP', 'AP75', 'best_f1')]
        cells += [_mean(rows, 'best_threshold', '.2f'), _mean(rows, 'f1_at_half')]
        for key in ('AP50', 'AP'):
            paired = loss != BASELINE and BASELINE in by_loss
            cells.append(_difference(rows, by_loss[BASELINE], key) if paired else '')
        for epoch in epochs:
            values = [curve[epoch] for curve in curves[loss] if epoch in curve]
            cells.append(f'{np.mean(values):.1f}' if len(values) == len(rows) else '')
        lines.append([loss, *cells])
    return markdown_table(lines)


def tables(rows: Sequence[Row]) -> str:
    """Return a Markdown table for each data set, detector and set of seeds.

    A table holds the losses with just these seeds, and the baseline's runs of them.
    """
    groups: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        group = groups.setdefault((row['data'], row['detector']), {})
        group.setdefault(row['loss'], {})[row['seed']] = row
    texts = []
    for (data, detector), group in sorted(groups.items()):
        order = sorted(group, key=lambda loss: (loss != BASELINE, loss))
        sets = {tuple(sorted(found)) for found in group.values()}
        for seeds in sorted(sets, key=lambda seeds: (-len(seeds), seeds)):
            by_loss = {
                loss: [group[loss][seed] for seed in seeds]
                for loss in order
                if set(seeds) == set(group[loss])
                or (loss == BASELINE and set(seeds) < set(group[loss]))
            }
            title = f'**{data}, {detector}**, seed{"s" * (len(seeds) > 1)} '
            texts.append(f'{title}{", ".join(map(str, seeds))}:')
            texts.append(_table(by_loss))
    return '\n\n'.join([*texts, NOTE])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', nargs='?', type=Path, metavar='CONFIG')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--loss', help="the variant's name (default: the config's)")
    parser.add_argument('--split', choices=SPLITS, default='test')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/converged'))
    parser.add_argument('--out', type=Path, default=OUT, help='the file of the rows')
    parser.add_argument('--table-only', action='store_true', help='train nothing')
    parser.add_argument(
        '--add', type=Path, nargs='+', default=[], help='take over the rows of a file'
    )
    parser.add_argument('--update', type=Path, metavar='PAGE.md')
    args = parser.parse_args(argv)
    if bool(args.config) == bool(args.table_only or args.add):
        parser.error('expected either CONFIG to train, or --table-only or --add')
    if args.loss and '_' in args.loss:
        parser.error(f'--loss must be without underscores, got {args.loss!r}')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse(argv)
    failed = 0
    try:
        if args.update:  # not only after hours of training
            split_page(args.update, *MARKS)
        if args.add:
            add_rows(args.out, [row for path in args.add for row in read_rows(path)])
        if args.config:
            failed = run(args)
        text = tables(read_rows(args.out))
        print(f'\n{text}')
        if args.update:
            update_page(args.update, *MARKS, text)
    except ValueError as error:
        sys.exit(f'converged: {error}')
    except Stopped as stopped:
        sys.exit(128 + stopped.args[0])
    if failed:
        sys.exit(f'converged: {failed} runs failed, see above')


if __name__ == '__main__':
    main()
