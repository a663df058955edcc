"""A repaired copy of a VOC data set, and the report of what differs from it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

from tqdm import tqdm

from tools.dataset_tools.voc_data import Checked
from tools.dataset_tools.voc_files import ANNOTATIONS, IMAGES, Problem
from tools.dataset_tools.voc_lists import MAIN, read_lines

REPORT = 'check_voc_report.txt'


@dataclass(frozen=True)
class Plan:
    """What a copy will have.

    Attributes:
        lists: The lines of each list, by its name without .txt.
        names: What each image is called there, by its name here.
        problems: What was found, without the repairs that would leave a list empty.
        changes: What else differs, by kind.
    """

    lists: dict[str, list[str]]
    names: dict[str, str]
    problems: list[Problem]
    changes: dict[str, list[str]]


def safe_names(names: Sequence[str]) -> dict[str, str]:
    """Give names that lead out of the folder, or are no UTF-8, others."""
    safe: dict[str, str] = {}
    taken = {*names}
    for name in names:
        clean = name.encode('utf-8', 'backslashreplace').decode()
        parts = [part for part in clean.split('/') if part not in ('', '.', '..')]
        clean = re.sub(r'[\\\0-\x1f]', '_', '/'.join(parts)) or '_'
        while clean != name and clean in taken:
            clean += '_'
        taken.add(clean)
        safe[name] = clean
    return safe


def make_plan(checked: Checked) -> Plan:
    """Decide what the copy will have; no list that names images becomes empty."""
    unusable = {name for name, found in checked.examined.items() if not found.usable}
    lists, kept = {}, set()
    for each in checked.lists:
        left = [name for name in each.names if name not in unusable]
        if not left:  # nothing to train with: it stays as it is
            left = each.names
            kept.update(left)
        lost = checked.lost.get(each.place, set())
        lists[each.stem] = [name for name in left if name not in lost] or left
    names = safe_names([*checked.examined])
    problems = [
        Problem(p.kind, p.file, p.detail, '') if _keeps(p, checked, kept) else p
        for p in checked.problems
    ]
    changes: dict[str, list[str]] = {}
    renamed = [f'{old}: is called {new}' for old, new in names.items() if old != new]
    gone = [
        f'{file}: since {name} was taken out'
        for name in unusable - kept
        for found in [checked.examined[name]]
        for file in filter(None, (found.image, found.xml))
    ]
    for kind, lines in dict(
        renamed=renamed, not_copied=[*gone, *_left(checked)]
    ).items():
        if lines:
            changes[kind.replace('_', '-')] = sorted(lines)
    return Plan(lists, names, problems, changes)


def _keeps(problem: Problem, checked: Checked, kept: set[str]) -> bool:
    """Tell a repair that is not made, since a list would be empty without the image."""
    return 'taken out of all' in problem.repair and any(
        problem in checked.examined[name].problems for name in kept
    )


def _left(checked: Checked) -> Iterator[str]:
    """Tell what is not copied, since XMLDataset does not read it."""
    settings = checked.settings
    folders = {settings.images.split('/')[0], settings.annotations.split('/')[0]}
    if '' not in folders:
        for path in sorted(checked.root.iterdir()):
            listed = any(each.file == path.name for each in checked.lists)
            if path.name not in {*folders, 'ImageSets'} and not listed:
                yield f'{path.name}: XMLDataset does not read it'
    used = {each.file for each in checked.lists}
    used |= {os.path.relpath(path, checked.root) for path in checked.classwise}
    for path in sorted((checked.root / 'ImageSets').rglob('*')):
        file = os.path.relpath(path, checked.root)
        if path.is_file() and file not in used:
            yield f'{file}: was not checked'


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    text = ''.join(f'{line}\n' for line in lines)
    _write(path, text.encode('utf-8', 'backslashreplace'))


def copy_file(source: Path, target: Path, link: bool) -> None:
    """Copy a file, or link to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        target.symlink_to(source.resolve())
    else:
        shutil.copy2(source, target)


def _write_lists(checked: Checked, plan: Plan, out: Path) -> None:
    for stem, names in plan.lists.items():
        write_lines(out / MAIN / f'{stem}.txt', [plan.names[name] for name in names])
    for path in checked.classwise:
        ends = (stem for stem in plan.lists if path.stem.endswith(f'_{stem}'))
        split = plan.lists.get(max(ends, key=len, default=''), [])
        rows = dict(line.split()[:2] for line in read_lines(path))
        lines = [f'{plan.names[n]} {rows[n]:>2}' for n in split if n in rows]
        write_lines(out / MAIN / path.name, lines)


def write_files(
    checked: Checked, plan: Plan, out: Path, link: bool = False, report: str = ''
) -> None:
    """Write the repaired copy into an empty folder.

    Args:
        checked: The data set.
        plan: What the copy will have.
        out: The folder.
        link: Link images instead of copying them.
        report: The text of ``check_voc_report.txt``; empty writes none.
    """
    for folder in (ANNOTATIONS, IMAGES, MAIN):
        (out / folder).mkdir(parents=True)
    if report:
        write_lines(out / REPORT, report.split('\n'))
    _write_lists(checked, plan, out)
    listed = {name for names in plan.lists.values() for name in names}
    for name, found in tqdm(checked.examined.items(), 'copied', mininterval=0.5):
        if not (found.usable or name in listed):
            continue
        image = out / IMAGES / f'{plan.names[name]}.jpg'
        if found.upright:
            _write(image, found.upright)
        elif found.image:
            copy_file(checked.root / found.image, image, link)
        xml = out / ANNOTATIONS / f'{plan.names[name]}.xml'
        if found.new_xml is not None:
            _write(xml, found.new_xml)
        elif found.xml:
            copy_file(checked.root / found.xml, xml, False)
    settings = checked.settings
    for file in checked.unlisted:
        xml = file.lower().endswith('.xml')
        folder = settings.annotations if xml else settings.images
        inside = os.path.relpath(file, folder or '.')
        target = out / (ANNOTATIONS if xml else IMAGES) / inside
        if not target.exists():
            copy_file(checked.root / file, target, link and not xml)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Hand out a folder that takes the place of ``out`` when all is done."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=out.parent, prefix=f'{out.name}.part'
    ) as folder:
        draft = Path(folder) / 'data'
        draft.mkdir()
        yield draft
        if out.exists():
            out.rmdir()
        shutil.move(draft, out)


def check_out(out: Path, root: Path, option: str = '--fix') -> None:
    """Refuse a folder that holds something, or that is in the data.

    Raises:
        ValueError: If it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f'{option} {out} exists and is not empty; name a new folder')
    if root.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f'{option} {out} is inside {root}; name a folder elsewhere')
