"""A data set in COCO format: what mmdet's CocoDataset reads, and its repair."""

from __future__ import annotations

import copy
import json
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from tqdm import tqdm

from tools.common.wrong_calls import read_json
from tools.dataset_tools.voc_data import Checked, empty_classes, frames
from tools.dataset_tools.voc_files import (
    Examined,
    Problem,
    Settings,
    check_turn,
    find_picture,
    in_processes,
)
from tools.dataset_tools.voc_fix import (
    REPORT,
    copy_file,
    new_folder,
    safe_names,
    write_lines,
)
from tools.dataset_tools.voc_lists import ImageList
from tools.dataset_tools.voc_xml import known_name

Entry = dict[str, Any]


@dataclass(frozen=True)
class CocoTask:
    """An image to examine.

    Attributes:
        settings: What holds for all.
        entry: The image in the file.
        objects: Its annotations there.
        names: The class of each category.
        frame: As in :class:`~tools.dataset_tools.voc_files.Task`.
    """

    settings: Settings
    entry: Entry
    objects: list[Entry]
    names: dict[Any, str]
    frame: str = ''

    @property
    def name(self) -> str:
        """The file of the image."""
        return str(self.entry['file_name'])


@dataclass
class ExaminedCoco(Examined):
    """What was found in an image, with its repaired entry and annotations."""

    entry: Entry | None = None
    kept: list[Entry] | None = None


def _numbers(values: Any, count: int) -> list[float] | None:
    """Return finite numbers, or None."""
    good = isinstance(values, list) and len(values) == count
    if good and all(type(v) in (int, float) and math.isfinite(v) for v in values):
        return values
    return None


def _check_object(
    each: Entry, name: str, size: tuple[int, int], found: Examined
) -> bool:
    """Repair an annotation; returns whether it is left."""
    box, file = _numbers(each.get('bbox'), 4), found.name
    if box is None:
        detail = f'{name}: bbox {each.get("bbox")}, expected x, y, width, height'
        found.note(file, 'object-unreadable', detail, 'dropped')
        return False
    shown = f'{name} {box}'
    x, y, width, height = box
    if width < 0 or height < 0:
        x, y, width, height = min(x, x + width), min(y, y + height), *map(abs, box[2:])
        found.note(file, 'box-inverted', shown, f'now {[x, y, width, height]}')
    if width < 1 or height < 1:
        found.note(file, 'box-zero-area', f'{shown}, less than a pixel', 'dropped')
        return False
    left, top = max(x, 0), max(y, 0)
    right, low = min(x + width, size[0]), min(y + height, size[1])
    if right - left < 1 or low - top < 1:
        detail = f'{shown}, the image has {size[0]} x {size[1]}'
        found.note(file, 'box-outside', detail, 'dropped')
        return False
    inside = [left, top, right - left, low - top]
    if any(abs(a - b) >= 1 for a, b in zip(inside, (x, y, width, height))):
        detail = f'{shown}, the image has {size[0]} x {size[1]}'
        found.note(file, 'box-over-edge', detail, f'clipped to {inside}')
        x, y, width, height = inside
    each['bbox'] = [x, y, width, height]
    area = _numbers([each.get('area')], 1)
    if area is None or area[0] <= 0:
        detail = f'{name}: area {each.get("area")}, expected a number above 0'
        found.note(file, 'object-unreadable', detail, 'set to that of the box')
        each['area'] = width * height
    return True


def examine(task: CocoTask) -> ExaminedCoco:
    """Check an image and its annotations, and repair the latter."""
    settings = task.settings
    found = ExaminedCoco(task.name, entry=copy.deepcopy(task.entry), kept=[])
    file = os.path.join(settings.images, task.name)
    files = [file] if (settings.root / file).is_file() else []
    picture = find_picture(settings.root, files, file, found, settings.copies)
    objects = copy.deepcopy(task.objects)
    names = {key: task.names.get(key) for key in map(_category, objects)}
    found.objects.update(names[_category(each)] or '?' for each in objects)
    if picture is None:
        return found
    told = _numbers([task.entry.get('width'), task.entry.get('height')], 2)
    boxes = [box for each in objects if (box := _numbers(each.get('bbox'), 4))]

    def fits(size: tuple[int, int]) -> bool:
        return all(b[0] + b[2] <= size[0] and b[1] + b[3] <= size[1] for b in boxes)

    size = picture.size
    if objects:
        size = check_turn(found, picture, told and tuple(told), fits, task.frame)
    if told is None or tuple(told) != size:
        shown = f'{size[0]} x {size[1]}'
        detail = f'the file says {told}, the image has {shown}'
        found.note(task.name, 'size-mismatch', detail, f'set to {shown}')
        found.entry.update(width=size[0], height=size[1])
    known = dropped = 0
    for each in objects:
        name, classes = names[_category(each)], settings.classes
        meant = (
            name if not classes or name in classes else known_name(name or '', classes)
        )
        if name is None:
            detail = f'category_id {each.get("category_id")}, which the file has not'
            found.note(task.name, 'object-unreadable', detail, 'dropped')
            continue
        if meant is None:
            if not settings.drop_unknown:
                found.kept.append(each)
            continue
        known += 1
        if not _check_object(each, name, size, found):
            dropped += 1
            continue
        found.kept.append(each)
        if not (each.get('iscrowd') or each.get('ignore')):
            found.counting[meant] += 1
    if known and dropped == known:
        found.lose(task.name, 'object-unreadable', 'none of its objects is left')
    return found


def _category(each: Entry) -> Any:
    key = each.get('category_id')
    return key if isinstance(key, (int, str)) else None


def _numbered(marks: Sequence[Entry]) -> bool:
    """Tell whether each annotation has an id of its own, as CocoDataset needs it."""
    ids = {key for m in marks if isinstance(key := m.get('id'), (int, float, str))}
    return len(ids) == len(marks)


def _entries(content: Entry, part: str, keys: Sequence[str], file: Path) -> list[Entry]:
    entries = content.get(part)
    if not isinstance(entries, list) or not all(
        isinstance(each, dict)
        and all(isinstance(each.get(k), (int, str)) for k in keys)
        for each in entries
    ):
        raise ValueError(
            f'{file}: expected a file of COCO, with a list {part!r} of objects with '
            f'{" and ".join(keys)}'
        )
    return entries


def _find_images(file: Path, images: str | None, names: Sequence[str]) -> str:
    """Return the folder of the images, relative to that of the file."""
    usual = ('', 'images', '..', '../images', f'../{file.stem.rpartition("_")[2]}')
    first = names[:20]
    for folder in (images,) if images is not None else usual:
        for root in (file.parent, Path()):
            if any((root / folder / name).is_file() for name in first):
                return os.path.relpath(root / folder, file.parent)
    raise ValueError(
        f'{file}: expected the folder of its images, as in --images DIR: there is no '
        f'{first[0] if first else "image"} in {images or "usual places"}'
    )


def check_coco(
    file: Path,
    images: str | None = None,
    classes: tuple[str, ...] | None = None,
    jobs: int = 1,
    frame: str = '',
    drop_unknown: bool = False,
    copies: bool = False,
) -> Checked:
    """Check a data set in COCO format.

    Args:
        file: The JSON file.
        images: The folder of its images. Defaults to the usual places.
        classes: Names of the classes. Without them, names are not checked.
        jobs: Number of processes.
        frame: As for :func:`~tools.dataset_tools.voc_data.check`.
        drop_unknown: Whether the copy has no objects of other names.
        copies: Whether to look for copies of photographs.

    Raises:
        ValueError: If it is no such file, or its images are nowhere.
    """
    content = read_json(file, 'a JSON file of COCO')
    entries = _entries(content, 'images', ('id', 'file_name'), file)
    marks = _entries(content, 'annotations', ('image_id',), file)
    categories = _entries(content, 'categories', ('id', 'name'), file)
    folder = _find_images(file, images, [str(each['file_name']) for each in entries])
    settings = Settings(
        file.parent, folder, '', classes, drop_unknown=drop_unknown, copies=copies
    )
    names = {each['id']: str(each['name']) for each in categories}
    by_image: dict[Any, list[Entry]] = defaultdict(list)
    for each in marks:
        by_image[each['image_id']].append(each)
    problems: list[Problem] = []

    def note(kind: str, detail: str, repair: str = '') -> None:
        problems.append(Problem(kind, file.name, detail, repair))

    unique = {each['id']: each for each in entries}
    by_name = {str(each['file_name']): each for each in unique.values()}
    for what, left in (('id', unique), ('file', by_name)):
        if len(left) < len(entries if left is unique else unique):
            note('list-repeats', f'images with the same {what}', 'listed once')
    if not _numbered(marks):
        detail = 'ids of annotations are missing, or not unique: training stops'
        note('object-unreadable', detail, 'numbered anew')
    lost = sum(each['image_id'] not in unique for each in marks)
    if lost:
        note('object-unreadable', f'{lost} of an image that is not listed', 'dropped')
    unknown = Counter(names.get(_category(each)) for each in marks)
    unknown.pop(None, None)
    for name in [name for name in unknown if classes and name not in classes]:
        meant = known_name(name, classes)
        drop = 'dropped, as training would' if drop_unknown else ''
        repair = f'renamed {meant!r}' if meant else drop
        note('class-unknown', f'{name!r}, {unknown[name]} times', repair)
    order = [
        str(each['name']) for each in categories if each['name'] in (classes or ())
    ]
    if classes and order != [name for name in classes if name in order]:
        detail = f'the file has {order}, the config {[*classes]}'
        note('class-order', detail, 'in the order of the config')

    tasks = [
        CocoTask(settings, each, by_image[each['id']], names)
        for each in by_name.values()
    ]
    found = dict(zip(by_name, in_processes(examine, tasks, jobs)))
    again = frames(tasks, found, frame)
    found.update(zip((t.name for t in again), in_processes(examine, again, jobs)))
    listed = ImageList(file.stem, [*by_name], file=file.name)
    problems += [problem for each in found.values() for problem in each.problems]
    problems += empty_classes([listed], found, classes or ())
    if classes:
        categories = [
            dict(each, name=known_name(str(each['name']), classes) or each['name'])
            for each in categories
        ]
        place = {name: number for number, name in enumerate(classes)}
        categories.sort(key=lambda each: place.get(each['name'], len(place)))
    if not entries:
        note('list-empty', 'names no image')
    return Checked(
        settings,
        [listed],
        found,
        problems,
        file=file,
        content=dict(content, categories=categories),
    )


def write_fixed_coco(checked: Checked, out: Path, link: bool, report: str) -> Path:
    """Write a repaired copy: the file, and its images in ``images``.

    Returns:
        The copy of the file.
    """
    usable = [found for found in checked.examined.values() if found.usable]
    usable = usable or [*checked.examined.values()]
    names = safe_names([found.name for found in usable])
    marks = [each for found in usable for each in found.kept]
    if not _numbered(marks):
        marks = [dict(each, id=number) for number, each in enumerate(marks, 1)]
    images = [dict(found.entry, file_name=names[found.name]) for found in usable]
    content = dict(checked.content, images=images, annotations=marks)
    with new_folder(out) as draft:
        for found in tqdm(usable, 'copied', mininterval=0.5):
            target = draft / 'images' / names[found.name]
            target.parent.mkdir(parents=True, exist_ok=True)
            if found.upright:
                target.write_bytes(found.upright)
            elif found.image:
                copy_file(checked.root / found.image, target, link)
        (draft / checked.file.name).write_text(json.dumps(content), encoding='utf-8')
        write_lines(draft / REPORT, report.split('\n'))
    return out / checked.file.name
