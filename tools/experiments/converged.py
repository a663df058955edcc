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
import json
import signal
import sys
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, Iterable, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from scipy.stats import t

from tools import ROOT
from tools.common.atomic_file import atomic_file
from tools.common.markdown_table import markdown_table, split_page, update_page
from tools.experiments.runs import RunError, Training, alone_in, resolve

OUT = ROOT / 'docs' / 'results' / 'converged.json'
MARKS = ('<!-- compare converged -->', '<!-- end converged -->')
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
    return (
        json.loads(path.read_text(encoding='utf-8'))['runs'] if path.is_file() else []
    )


def add_rows(path: Path, rows: Iterable[Row], names: Sequence[str] = KEY) -> None:
    """Put rows in the places of those with the same names, at once or not at all.

    Other processes may do the same at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(path.parent):
        found = {tuple(row[key] for key in names): row for row in read_rows(path)}
        found.update({tuple(row[key] for key in names): row for row in rows})
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


def run(args: argparse.Namespace) -> int:
    """Make the runs that have no row yet, and their rows; return how many failed.

    Raises:
        ValueError: If something is wrong with the arguments or in the way.
    """
    options = [*SPLITS[args.split], *args.cfg_options]
    resolved = resolve(args.config, options)
    named = names(args.config.stem, args.loss, args.split)
    name = '_'.join(named.values())
    rows = {tuple(row[key] for key in KEY): row for row in read_rows(args.out)}
    todo = []
    for seed in args.seeds:
        folder = (args.work_dir / name / f'seed_{seed}').resolve()
        training = Training(args.config, resolved, seed, folder, options)
        row = rows.get((*named.values(), seed))
        if row and row['config_sha'] != training.sha:
            raise ValueError(
                f'{args.out} has a row of {name} seed {seed} of another '
                f'config (SHA-256 {row["config_sha"][:8]}, now {training.sha[:8]}); '
                'name this one with --loss, or delete the row'
            )
        if row:
            print(f'{name} seed {seed}: done before, AP50 {row["AP50"]:.1f}')
            continue
        training.refuse()
        todo.append(training)
    path, failed = args.config.resolve(), 0
    for training in todo:
        try:
            found = training.make()
        except RunError as failure:
            failed += 1
            print(f'{name} seed {training.seed} failed: {failure}', file=sys.stderr)
            continue
        row = dict(
            **named,
            seed=training.seed,
            config=str(
                path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
            ),
            config_sha=training.sha,
            split=args.split,
            options=options,
            date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
            threads=1,
            step_seconds=step_seconds(training.folder),
            **found,
        )
        add_rows(args.out, [row])
    return failed


def ap50_curve(row: Row) -> dict[int, float]:
    """Return AP50 after each epoch after which a run was evaluated."""
    return {point['epoch']: point['AP50'] for point in row['curve'] if 'AP50' in point}


def by_detector(
    rows: Iterable[Row],
) -> dict[tuple[str, str], dict[str, dict[int, Row]]]:
    """Sort rows by data set and detector, then by loss, then by seed."""
    groups: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        group = groups.setdefault((row['data'], row['detector']), {})
        group.setdefault(row['loss'], {})[row['seed']] = row
    return groups


def mean_text(rows: Sequence[Row], key: str, form: str = '.1f') -> str:
    """Lay out a mean, with the standard deviation where there is one."""
    values = [row[key] for row in rows]
    text = f'{np.mean(values):{form}}'
    return f'{text} ± {np.std(values, ddof=1):{form}}' if len(values) > 1 else text


def difference_text(rows: Sequence[Row], base: Sequence[Row], key: str) -> str:
    """Lay out the mean of the paired differences, with Student's 95 % interval."""
    values = [a[key] - b[key] for a, b in zip(rows, base)]
    mean, count = np.mean(values), len(values)
    if count < 2:
        return f'{mean:+.1f}'
    half = t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return f'{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]'


def _table(by_loss: dict[str, list[Row]]) -> str:
    curves = {loss: [*map(ap50_curve, rows)] for loss, rows in by_loss.items()}
    epochs = sorted({epoch for found in curves.values() for epoch in found[0]})
    head = ['AP50', 'AP', 'AP75', 'best F1', 'at score', 'F1 at 0.5', 'Δ AP50', 'Δ AP']
    lines = [['loss', *head, *(f'epoch {epoch}' for epoch in epochs)]]
    for loss, rows in by_loss.items():
        cells = [mean_text(rows, key) for key in ('AP50', 'AP', 'AP75', 'best_f1')]
        cells += [
            mean_text(rows, 'best_threshold', '.2f'),
            mean_text(rows, 'f1_at_half'),
        ]
        for key in ('AP50', 'AP'):
            paired = loss != BASELINE and BASELINE in by_loss
            cells.append(
                difference_text(rows, by_loss[BASELINE], key) if paired else ''
            )
        for epoch in epochs:
            values = [curve[epoch] for curve in curves[loss] if epoch in curve]
            cells.append(f'{np.mean(values):.1f}' if len(values) == len(rows) else '')
        lines.append([loss, *cells])
    return markdown_table(lines)


def tables(rows: Sequence[Row]) -> str:
    """Return a Markdown table for each data set, detector and set of seeds.

    A table holds the losses with just these seeds, and the baseline's runs of them.
    """
    texts = []
    for (data, detector), group in sorted(by_detector(rows).items()):
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
    # As Ctrl-C does: what it has started is stopped too.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
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
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        sys.exit(f'converged: {failed} runs failed, see above')


if __name__ == '__main__':
    main()
