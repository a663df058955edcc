"""Check a data set in PASCAL VOC format before a training meets what is wrong with it.

    python tools/dataset_tools/check_voc.py data/bccd/BCCD --classes RBC WBC Platelets

Reads all images and annotations that the lists in ImageSets/Main name, and reports what
stops a training, makes its loss NaN, or is dropped without a word. The exit status is 0
where nothing is wrong, 1 where something is, and 2 where nothing could be checked.

``--fix OUT`` writes a repaired copy, prints every change, keeps them in
OUT/check_voc_report.txt, and checks the copy: the exit status then is the copy's. The
data set itself is never changed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.atomic_file import atomic_file
from tools.dataset_tools.voc_data import Checked, check
from tools.dataset_tools.voc_files import KINDS, Problem
from tools.dataset_tools.voc_fix import REPORT, check_out, write_fixed


def by_kind(checked: Checked) -> dict[str, list[Problem]]:
    """Sort the problems into their kinds, in the order of ``KINDS``."""
    sorted_: dict[str, list[Problem]] = defaultdict(list)
    for problem in checked.problems:
        sorted_[problem.kind].append(problem)
    return {kind: sorted_[kind] for kind in KINDS if kind in sorted_}


def report(checked: Checked, show: int) -> str:
    """Return the report, with so many lines of each kind; 0 means all."""
    lists = ', '.join(f'{each.stem} {len(each.names)}' for each in checked.lists)
    objects = ', '.join(f'{name} {n}' for name, n in checked.objects.most_common())
    lines = [
        f'{checked.root}: {len(checked.examined)} images ({lists})',
        f'objects: {objects or "none"}',
        *(f'note: {note}' for note in checked.notes),
    ]
    for kind, problems in by_kind(checked).items():
        files = len({problem.file for problem in problems})
        lines += ['', f'{kind}: {len(problems)} in {files} files ({KINDS[kind]})']
        shown = problems[: show or None]
        lines += [f'  {problem.file}: {problem.detail}' for problem in shown]
        if len(shown) < len(problems):
            rest = len(problems) - len(shown)
            lines.append(f'  and {rest} more; --show 0 prints, --json FILE keeps all')
    lines.append('')
    if checked.classes is None:
        found = ' '.join(repr(name) for name in sorted(checked.objects))
        lines.append(
            'class names: not checked. Name those of your config, spelled as in the '
            f'XML; found here: --classes {found}'
        )
    total = len(checked.problems)
    lines.append(f'problems: {total}' if total else 'all well')
    return '\n'.join(lines)


def as_json(checked: Checked) -> str:
    """Return everything that was found in JSON."""
    content = dict(
        root=str(checked.root),
        classes=checked.classes,
        lists={each.stem: len(each.names) for each in checked.lists},
        images=len(checked.examined),
        objects=checked.objects,
        notes=checked.notes,
        problems=[vars(problem) for problem in checked.problems],
    )
    return json.dumps(content, indent=1) + '\n'


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'root', type=Path, help='folder with Annotations, ImageSets and JPEGImages'
    )
    parser.add_argument(
        '--classes',
        nargs='+',
        metavar='NAME',
        help='the classes of your config; default: those of VOC, if they all are',
    )
    parser.add_argument(
        '--lists',
        nargs='+',
        metavar='LIST',
        help='check only these lists of ImageSets/Main, like trainval; default: all',
    )
    parser.add_argument('--fix', type=Path, metavar='OUT', help='write a repaired copy')
    parser.add_argument('--link', action='store_true', help='link images into the copy')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the report')
    parser.add_argument(
        '--show',
        type=int,
        default=10,
        metavar='N',
        help='print so many problems of a kind, 0 for all (default: 10)',
    )
    parser.add_argument(
        '--jobs',
        type=int,
        default=os.cpu_count(),
        metavar='N',
        help='processes (default: one for each core)',
    )
    args = parser.parse_args(argv)
    for name, least in dict(show=0, jobs=1).items():
        if getattr(args, name) < least:
            parser.error(f'--{name} must be {least} or more, got {getattr(args, name)}')
    if args.classes and len({*args.classes}) < len(args.classes):
        parser.error(f'--classes names a class twice: {" ".join(args.classes)}')
    if args.link and not args.fix:
        parser.error('--link belongs to --fix OUT')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse(argv)
    try:
        if args.fix:
            check_out(args.fix, args.root)
        checked = check(args.root, args.classes, args.lists, args.jobs)
        print(report(checked, args.show))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(args.json) as draft:
                draft.write_text(as_json(checked))
        if args.fix:
            print(f'\n{args.fix}:')
            for change in write_fixed(checked, args.fix, args.link):
                print(f'  {change}')
            print(f'The changes are kept in {args.fix / REPORT}. The copy, checked:')
            lists = [each.stem for each in checked.lists]
            checked = check(args.fix, args.classes, lists, args.jobs)
            print(report(checked, args.show))
    except (ValueError, OSError) as error:
        print(f'check_voc: {error}', file=sys.stderr)
        return 2
    return int(bool(checked.problems) or checked.classes is None)


if __name__ == '__main__':
    sys.exit(main())
