"""Check a data set before a training meets what is wrong with it.

    python tools/dataset_tools/check_voc.py data/bccd/BCCD --classes RBC WBC Platelets
    python tools/dataset_tools/check_voc.py --config MY.py

DATA is a folder in PASCAL VOC format, or with the same XML files in other folders or
beside the images; or a JSON file of COCO. Reads all images and annotations, as mmdet
does, and reports what stops a training, makes its loss NaN, or is dropped without a
word. The exit status is 0 where nothing is wrong, 1 where something is, and 2 where
nothing could be checked. ``--config`` checks the data, classes and num_classes that a
config names.

``--fix OUT`` writes a repaired copy, keeps all changes in OUT/check_voc_report.txt, and
checks the copy: the exit status then is the copy's. The data set is never changed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Iterable, Iterator, Mapping, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.atomic_file import atomic_file
from tools.common.wrong_calls import Parser, at_least, readable_file, writable_file
from tools.dataset_tools.coco_data import check_coco, write_fixed_coco
from tools.dataset_tools.config_data import check_config
from tools.dataset_tools.voc_data import Checked, check, find_folders
from tools.dataset_tools.voc_files import KINDS, Problem, Settings
from tools.dataset_tools.voc_fix import (
    REPORT,
    check_out,
    make_plan,
    new_folder,
    write_files,
)


def groups(
    problems: Iterable[Problem],
    changes: Mapping[str, Sequence[str]],
    show: int,
    fix: bool,
) -> Iterator[str]:
    """Yield the lines of a report, so many of each kind; a show of 0 means all."""
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    blocks = []
    for kind in filter(by_kind.get, KINDS):
        found = by_kind[kind]
        files = len({problem.file for problem in found})
        lines = [f'{p.file}: {p.detail}' for p in found]
        if fix:
            repairs = [p.repair or 'as it was' for p in found]
            lines = [f'{line}: {repair}' for line, repair in zip(lines, repairs)]
        head = f'{kind}: {len(found)} in {files} files ({KINDS[kind]})'
        blocks.append((head, lines))
    blocks += [(f'{kind}: {len(lines)}', lines) for kind, lines in changes.items()]
    for head, lines in blocks:
        shown = lines[: show or None]
        yield from ['', head, *(f'  {line}' for line in shown)]
        if len(shown) < len(lines):
            rest = len(lines) - len(shown)
            yield f'  and {rest} more; --show 0 prints, --json FILE keeps all'


def report(
    checked: Checked,
    show: int,
    problems: Sequence[Problem] | None = None,
    changes: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return the report; with ``changes``, say what the repaired copy has instead."""
    problems = checked.problems if problems is None else problems
    lists = ', '.join(f'{each.stem} {len(each.names)}' for each in checked.lists)
    objects = ', '.join(f'{name} {n}' for name, n in checked.objects.most_common())
    lines = [
        f'{checked.file or checked.root}: {len(checked.examined)} images ({lists})',
        f'objects: {objects or "none"}',
        *(f'note: {note}' for note in checked.notes),
        *groups(problems, changes or {}, show, changes is not None),
        '',
    ]
    if checked.classes is None:
        found = ' '.join(repr(name) for name in sorted(checked.objects))
        lines.append(
            'class names: not checked. Name those of your config, spelled as in the '
            f'annotations; found here: --classes {found}'
        )
    total = len(checked.problems)
    lines.append(f'problems: {total}' if total else 'all well')
    return '\n'.join(lines)


def as_json(found: Sequence[Checked], problems: Sequence[Problem]) -> str:
    """Return everything that was found in JSON, one object for one data set."""
    content = [
        dict(
            root=str(checked.file or checked.root),
            classes=checked.classes,
            lists={each.stem: len(each.names) for each in checked.lists},
            images=len(checked.examined),
            objects=checked.objects,
            notes=checked.notes,
            problems=[
                vars(p) for p in (problems if len(found) == 1 else checked.problems)
            ],
        )
        for checked in found
    ]
    return json.dumps(content if len(content) > 1 else content[0], indent=1) + '\n'


def parse(argv: Sequence[str] | None) -> tuple[Parser, argparse.Namespace]:
    """Read the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('data', nargs='?', type=Path, metavar='DATA', help='folder, or JSON of COCO')
    add('--config', type=readable_file, metavar='MY.py', help='check what this names')
    add('--images', metavar='DIR', help='folder of the images (default: JPEGImages)')
    add('--annotations', metavar='DIR', help='of the XML (default: Annotations)')
    add(
        '--classes',
        nargs='+',
        metavar='NAME',
        help='the classes of your config; default: those of VOC, if they all are',
    )
    add(
        '--lists',
        nargs='+',
        metavar='LIST',
        help='check only these: files, or names in ImageSets/Main; default: all',
    )
    add('--fix', type=Path, metavar='OUT', help='write a repaired copy')
    add('--link', action='store_true', help='link images into the copy')
    add(
        '--drop-unknown',
        action='store_true',
        help='leave objects of other classes out of the copy',
    )
    add(
        '--exif',
        default='',
        choices=('stored', 'seen'),
        help='what boxes fit where EXIF turns an image and nothing tells: the image '
        'as it is stored, or as viewers show it',
    )
    add(
        '--copies',
        type=writable_file,
        metavar='FILE',
        help='look for copies of photographs in other splits; write the pairs as CSV',
    )
    add('--json', type=writable_file, metavar='FILE', help='write the report')
    add(
        '--show',
        type=at_least(0),
        default=10,
        metavar='N',
        help='print so many lines of a kind, 0 for all (default: 10)',
    )
    add(
        '--jobs',
        type=at_least(1),
        default=os.cpu_count(),
        metavar='N',
        help='processes (default: one for each core)',
    )
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.config):
        parser.error('expected either DATA or --config MY.py')
    if args.config and (args.classes or args.lists or args.images or args.annotations):
        parser.error('--config names classes, lists and folders: leave the others out')
    if args.classes and len({*args.classes}) < len(args.classes):
        parser.error(f'--classes names a class twice: {" ".join(args.classes)}')
    if (args.link or args.drop_unknown) and not args.fix:
        parser.error('--link and --drop-unknown belong to --fix OUT')
    if args.copies and find_spec('imagehash') is None:
        parser.error('--copies needs the library imagehash: pip install imagehash')
    return parser, args


def find(args: argparse.Namespace) -> list[Checked]:
    """Check what the command line names."""
    if args.config:
        return check_config(args.config, args.jobs, args.exif, bool(args.copies))
    classes = tuple(args.classes) if args.classes else None
    if args.data.is_file():
        settings = (args.images, classes, args.jobs, args.exif, args.drop_unknown)
        return [check_coco(args.data, *settings)]
    images, annotations = find_folders(args.data, args.images, args.annotations)
    settings = Settings(
        args.data,
        images,
        annotations,
        classes,
        drop_unknown=args.drop_unknown,
        copies=bool(args.copies),
    )
    return [check(settings, args.lists, args.jobs, args.exif)]


def fix(checked: Checked, args: argparse.Namespace) -> Checked:
    """Write the repaired copy, and check it."""
    out = args.fix
    if checked.file:
        print(report(checked, args.show, changes={}))
        whole = report(checked, 0, changes={})
        file = write_fixed_coco(checked, out, args.link, whole)
        return check_coco(file, 'images', checked.classes, args.jobs, args.exif)
    plan = make_plan(checked)
    print(report(checked, args.show, plan.problems, plan.changes))
    whole = report(checked, 0, plan.problems, plan.changes)
    with new_folder(out) as draft:
        write_files(checked, plan, draft, args.link, whole)
    return check(
        Settings(out, classes=checked.classes, copies=checked.settings.copies),
        [*plan.lists],
        args.jobs,
        args.exif,
    )


def write_pairs(path: Path, found: Sequence[Checked]) -> None:
    """Write the copies of photographs as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as draft, draft.open('w', newline='') as file:
        rows = [pair for checked in found for pair in checked.pairs]
        head = ('list', 'image', 'other list', 'other image', 'how')
        csv.writer(file).writerows([head, *rows])
    print(f'\n{len(rows)} pairs of copies: {path}')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser, args = parse(argv)
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text
        getattr(stream, 'reconfigure', dict)(errors='backslashreplace')
    with parser.refusing():
        if args.fix:
            check_out(args.fix, args.data or args.config)
        found = find(args)
        if args.fix and len(found) > 1:
            raise ValueError(f'--fix writes one data set, {args.config} names more')
        if args.fix:
            copy = fix(found[0], args)
            print(f'\nAll changes are in {args.fix / REPORT}. The copy, checked:')
        for checked in [copy] if args.fix else found:
            print(report(checked, args.show))
        if args.copies:
            write_pairs(args.copies, found)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(args.json) as draft:
                draft.write_text(as_json(found, found[0].problems))
    last = [copy] if args.fix else found
    return int(any(each.problems or each.classes is None for each in last))


if __name__ == '__main__':
    sys.exit(main())
