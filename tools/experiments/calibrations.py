"""Calibrate trained detectors on a validation list, and measure them on the test list.

    python tools/experiments/calibrations.py WORK_DIR… --ann-file LIST [--indices N] \\
        [--cfg-options KEY=VALUE] --update docs/calibration.md
    python tools/experiments/calibrations.py --table-only --update docs/calibration.md

WORK_DIR is that of a training: its config and its last checkpoint. The list and N are
those of tools/analysis_tools/calibrate.py. Every detector is a row of ``--out``, with
what ``measures`` there says of the test images, before and after; ``f1`` is F1 at the
threshold that is best on the validation list.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])


from tools import ROOT
from tools.analysis_tools.calibrate import calibrate, measures, on_list
from tools.analysis_tools.classifier import (
    at_any_score,
    build,
    detect,
    load_checkpoint,
    load_config,
)
from tools.analysis_tools.detections import best_f1
from tools.common.atomic_file import atomic_file
from tools.common.markdown_table import markdown_table, split_page, update_page
from tools.common.wrong_calls import Parser, readable_file, reading, writable_file
from tools.experiments import matmul_roi_align

OUT = ROOT / 'docs' / 'results' / 'calibration.json'
MARKS = ('<!-- calibrations -->', '<!-- end calibrations -->')
COLUMNS = {
    'ap': 'AP50',
    'ap_at_005': 'at 0.05',
    'd_ece': 'D-ECE',
    'laece0': 'LaECE₀',
    'd_ece_shown': 'D-ECE shown',
    'laece0_shown': 'LaECE₀ shown',
    'best_f1': 'best F1',
    'best_at': 'at score',
    'f1': 'F1 at threshold',
    'f1_at_half': 'F1 at 0.5',
}


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a work dir.

    Raises:
        ValueError: If it has not one config and a checkpoint, or cannot be calibrated.
    """
    configs, last = sorted(folder.glob('*.py')), folder / 'last_checkpoint'
    if len(configs) != 1 or not last.is_file():
        raise ValueError(
            f'{folder}: expected the work dir of a training, with one config and '
            f'last_checkpoint, got {len(configs)} configs'
        )
    cfg = at_any_score(load_config(configs[0], args.cfg_options))
    checkpoint = folder / Path(last.read_text().strip()).name
    state = load_checkpoint(checkpoint, cfg)['state_dict']
    found = calibrate(on_list(cfg, args.ann_file, args.indices), state)
    row = dict(
        name=configs[0].stem,
        seed=cfg.randomness.get('seed'),
        fitted_on=len(found.after.images),
    )
    for when, run, params in (
        ('before', found.before, state),
        ('after', found.after, {**state, **found.state}),
    ):
        test = detect(cfg, build(cfg, params), f'test, {when}')
        threshold = best_f1(run)[1]
        row[when] = dict(measures(test, threshold), threshold=threshold)
        row['images'] = len(test.images)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table, two lines for each row."""
    lines = [['detector', 'seed', '', *COLUMNS.values()]]
    for row in rows:
        for when in ('before', 'after'):
            values = row[when].items()
            cells = {k: f'{v:.{3 if k == "best_at" else 1}f}' for k, v in values}
            lines.append([row['name'], row['seed'], when, *(cells[k] for k in COLUMNS)])
    return markdown_table(lines, text_columns=(0, 2))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folders', nargs='*', type=Path, metavar='WORK_DIR')
    parser.add_argument('--ann-file')
    parser.add_argument('--indices', type=int)
    parser.add_cfg_options()
    parser.add_argument('--out', type=writable_file, default=OUT)
    parser.add_argument('--table-only', action='store_true')
    parser.add_argument('--update', type=readable_file, metavar='PAGE.md')
    args = parser.parse_args(argv)
    if bool(args.folders) == args.table_only or (args.folders and not args.ann_file):
        parser.error('expected either WORK_DIR and --ann-file, or --table-only')
    with matmul_roi_align.installed(), parser.refusing():
        rows = []
        if args.out.is_file():
            with reading(args.out, 'the rows of this tool'):
                rows = json.loads(args.out.read_text(encoding='utf-8'))
        if args.update:  # not only after minutes
            split_page(args.update, *MARKS)
        for folder in args.folders:
            row = measure(folder, args)
            key = (row['name'], row['seed'])
            rows = [r for r in rows if (r['name'], r['seed']) != key]
            rows = sorted([*rows, row], key=lambda r: (r['name'], str(r['seed'])))
            with atomic_file(args.out) as draft:
                draft.write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')
        print(table(rows))
        if args.update:
            update_page(args.update, *MARKS, table(rows))


if __name__ == '__main__':
    main()
