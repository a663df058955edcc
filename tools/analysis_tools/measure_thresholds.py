"""Measure what ``score_thr`` costs and leaves, of finished runs.

    python tools/analysis_tools/measure_thresholds.py --out OUT.json \\
        --run NAME CONFIG PREDICTIONS [--run …]
    python tools/analysis_tools/measure_thresholds.py --out OUT.json

AP50 is that of the predictions of a run from each threshold on, what the test would
have found with it. PREDICTIONS is the file of ``tools/test.py --out``, or
``detections.npz`` of tools/experiments/compare.py, with a lower threshold. Without
a run the table of OUT.json is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.analysis_tools.matched_ap import class_ap, match, mean_ap
from tools.analysis_tools.plot_results import Run, load_run
from tools.common.atomic_file import atomic_file
from tools.common.markdown_table import markdown_table

THRESHOLDS = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)


def of_run(run: Run) -> dict[str, dict[str, float]]:
    """Return AP50 and detections per image of a run, for each threshold."""
    found = {}
    for threshold in THRESHOLDS:
        detections = [
            [rows[rows[:, 4] >= threshold] for rows in image]
            for image in run.detections
        ]
        kept = replace(run, detections=detections)
        found[str(threshold)] = dict(
            ap50=100 * float(mean_ap(class_ap(match(kept))[0])),
            detections=sum(len(rows) for image in detections for rows in image)
            / len(detections),
        )
    return found


def table(content: dict[str, Any]) -> str:
    """Return a row for each threshold, and two columns for each run."""
    runs = content['runs']
    head = ['`score_thr`', *(f'{name}: AP50' for name in runs)]
    rows = [[*head, *(f'{name}: detections per image' for name in runs)]]
    for threshold in next(iter(runs.values())):
        found = [run[threshold] for run in runs.values()]
        aps = [f'{row["ap50"]:.1f}' for row in found]
        rows.append([threshold, *aps, *(f'{row["detections"]:.0f}' for row in found)])
    return markdown_table(rows, text_columns=())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, required=True, help='results file')
    parser.add_argument(
        '--run',
        nargs=3,
        action='append',
        metavar=('NAME', 'CONFIG', 'PREDICTIONS'),
        help='a run to measure',
    )
    args = parser.parse_args(argv)
    if args.run:
        content: dict[str, Any] = dict(runs={})
        for name, *files in args.run:
            print(f'{name}: matching …', flush=True)
            content['runs'][name] = of_run(load_run(*files))
        with atomic_file(args.out) as draft:
            draft.write_text(json.dumps(content, indent=1) + '\n')
    print(table(json.loads(args.out.read_text())))


if __name__ == '__main__':
    main()
