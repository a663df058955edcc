"""Tell what keeps a detector's AP50 down, by kind of error.

    python tools/analysis_tools/error_kinds.py CONFIG PREDICTIONS [--out OUT.json]
    python tools/analysis_tools/error_kinds.py --table OUT.json

PREDICTIONS is the file of ``tools/test.py --out`` or a ``detections.npz`` of
tools/experiments/converged.py. A pair, and --name, may be given several times. A
detection that is counted as false is of the first kind that fits:

- duplicate: it lies on an object of its class (IoU >= 0.5) that a better one has found;
- class: it lies on an object of another class;
- place: it is near an object of its class (0.1 <= IoU < 0.5);
- background: it is near no object (IoU < 0.1);
- other: the rest, near an object of another class.

The table shows AP50 as it is, and without the false detections of each kind: how much
could be gained if those were ranked last. 'all' leaves only what is missed altogether,
and 'any class' is the share of objects that some detection lies on, whatever its class.
The kinds are those of TIDE (Bolya et al., *TIDE: A General Toolbox for Identifying
Object Detection Errors*, ECCV 2020, arXiv 2008.08115), which mends errors instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Callable

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from mmdet.evaluation.functional.bbox_overlaps import bbox_overlaps

from tools.analysis_tools.detections import MISS, Run, load_run
from tools.common.atomic_file import atomic_file
from tools.common.markdown_table import markdown_table
from tools.common.wrong_calls import (
    Parser,
    read_json,
    readable_file,
    reading,
    writable_file,
)

KINDS = ('duplicate', 'class', 'place', 'background', 'other')
HIT_IOU, NEAR_IOU = 0.5, 0.1


def kinds_of(run: Run) -> list[list[np.ndarray]]:
    """Return each detection's kind, an index into ``KINDS`` or -1 for no error.

    Returns:
        Of each image and class an array.
    """
    found = []
    for truth, image, flags in zip(run.truth, run.detections, run.flags):
        boxes = np.vstack([truth['bboxes'], truth['bboxes_ignore']])
        labels = np.concatenate([truth['labels'], truth['labels_ignore']])
        kinds = []
        for label, (rows, flag) in enumerate(zip(image, flags)):
            overlaps = np.zeros((len(rows), len(boxes) + 1), dtype=np.float32)
            if len(boxes) and len(rows):
                overlaps[:, 1:] = bbox_overlaps(
                    rows[:, :4], boxes, use_legacy_coordinate=True
                )
            every = overlaps.max(1)
            overlaps[:, 1:][:, labels != label] = 0
            own = overlaps.max(1)
            kind = np.select(
                [own >= HIT_IOU, every >= HIT_IOU, own >= NEAR_IOU, every < NEAR_IOU],
                [0, 1, 2, 3],
                4,
            )
            kinds.append(np.where(flag == MISS, kind, -1))
        found.append(kinds)
    return found


def analyse(run: Run) -> dict[str, float]:
    """Return AP50 in percent: as it is, without each kind of error and without any."""
    kinds = kinds_of(run)

    def ap50(keep: Callable[[np.ndarray], np.ndarray]) -> float:
        detections = [
            [rows[keep(kind)] for rows, kind in zip(*image)]
            for image in zip(run.detections, kinds)
        ]
        return round(100 * replace(run, detections=detections).mean_ap, 2)

    result = dict(ap50=round(100 * run.mean_ap, 2))
    for index, name in enumerate(KINDS):
        result[name] = ap50(lambda kind, index=index: kind != index)
    result['all'] = ap50(lambda kind: kind < 0)
    result['any class'] = round(100 * _recall(run), 2)
    return result


def _recall(run: Run) -> float:
    """Return the share of objects with a detection of any class on them."""
    hit = total = 0
    for truth, by_class in zip(run.truth, run.detections):
        rows = np.vstack(by_class)
        total += len(truth['bboxes'])
        if len(rows) and len(truth['bboxes']):
            overlaps = bbox_overlaps(
                truth['bboxes'], rows[:, :4], use_legacy_coordinate=True
            )
            hit += int((overlaps.max(1) >= HIT_IOU).sum())
    return hit / max(total, 1)


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the Markdown table, a row per run."""
    head = [
        'AP50',
        'as it is',
        *(f'without {kind}' for kind in KINDS),
        'all',
        'any class',
    ]
    keys = ('ap50', *KINDS, 'all', 'any class')
    rows = [[name, *(f'{row[k]:.1f}' for k in keys)] for name, row in results.items()]
    return markdown_table([head, *rows])


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'files',
        nargs='*',
        type=readable_file,
        metavar='CONFIG PREDICTIONS',
        help='one pair or more',
    )
    parser.add_argument('--name', action='append', default=[], help='one for each pair')
    parser.add_argument('--out', type=writable_file, help='JSON of the results')
    parser.add_argument('--table', type=readable_file, help='print the table of a file')
    args = parser.parse_intermixed_args(argv)
    if args.table:
        expected = 'the results that --out writes'
        with parser.refusing(), reading(args.table, expected):
            results = read_json(args.table, expected)
            print(table(results))
        return results
    pairs = list(zip(args.files[::2], args.files[1::2]))
    names = args.name or [Path(config).stem for config, _ in pairs]
    if not pairs or len(args.files) % 2 or len(set(names)) != len(pairs):
        parser.error(
            f'expected pairs CONFIG PREDICTIONS and a --name of its own for each, got '
            f'{len(args.files)} files and the names {names}'
        )
    results = {}
    for name, (config, predictions) in zip(names, pairs):
        print(f'{name}: matching …', flush=True)
        with parser.refusing():
            run = load_run(config, predictions, name)
        results[name] = analyse(run)
    if args.out:
        with atomic_file(args.out) as draft:
            draft.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    print(table(results))
    return results


if __name__ == '__main__':
    main()
