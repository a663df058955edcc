"""A VOC data set as a whole: its lists, what two of them share, and its classes."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence, TypeVar

from tools.dataset_tools.splits import Pair, Part, compare_parts
from tools.dataset_tools.voc_files import (
    ANNOTATIONS,
    IMAGES,
    Examined,
    Problem,
    Settings,
    Task,
    examine,
    in_processes,
)
from tools.dataset_tools.voc_lists import (
    SUFFIXES,
    ImageList,
    Index,
    Names,
    read_list,
    read_lists,
)

_FOLDERS = {
    'images': (IMAGES, 'images', 'image', 'imgs', 'img'),
    'annotations': (ANNOTATIONS, 'annotations', 'annotation', 'xmls', 'xml', 'labels'),
}
_Task = TypeVar('_Task')
# mmdet's VOCDataset has them in this order.
VOC_CLASSES = (
    *('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair'),
    *('cow', 'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant'),
    *('sheep', 'sofa', 'train', 'tvmonitor'),
)


@dataclass
class Checked:
    """A data set and what is wrong with it.

    Attributes:
        settings: Its folders and classes; ``classes`` None where none were expected.
        lists: The lists of images.
        examined: What was found, by the name of the image.
        problems: Everything wrong.
        classwise: Files of VOC's lists of one class.
        lost: For each list the images that its repaired copy loses to another list.
        pairs: Images of different splits that show the same.
        unlisted: Files that no list names, relative to the root.
        notes: What is worth knowing and not wrong.
        file: The JSON file, where the data are in COCO format.
        content: What it has after repairs.
    """

    settings: Settings
    lists: list[ImageList]
    examined: dict[str, Examined]
    problems: list[Problem] = field(default_factory=list)
    classwise: list[Path] = field(default_factory=list)
    lost: dict[str, set[str]] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    file: Path | None = None
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The folder of the data."""
        return self.settings.root

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names that were expected."""
        return self.settings.classes

    @property
    def objects(self) -> Counter[str]:
        """How many objects of each name there are."""
        total: Counter[str] = Counter()
        for found in self.examined.values():
            total.update(found.objects)
        return total

    @property
    def parts(self) -> list[Part]:
        """The lists with what was found in their images."""
        return [(each, self.examined) for each in self.lists]


def find_folders(
    root: Path, images: str | None = None, annotations: str | None = None
) -> tuple[str, str]:
    """Return the folders of images and of annotations, relative to the root.

    Args:
        root: The root of the data.
        images: The folder of the images. Defaults to the first that has a usual name,
            or the root itself where images and XML files lie there.
        annotations: The same for the annotations.

    Raises:
        ValueError: If there is none.
    """
    if not root.is_dir():
        raise ValueError(f'expected a folder with a data set, got {root}')
    inside = {path.name for path in root.iterdir() if path.is_dir()}
    found = dict(images=images, annotations=annotations)
    for part, names in _FOLDERS.items():
        if found[part] is None:
            alike = [d for name in names for d in sorted(inside) if d.lower() == name]
            found[part] = next((n for n in (*names, *alike) if n in inside), None)
        elif not (root / found[part]).is_dir():
            raise ValueError(f'--{part}: expected a folder, got {root / found[part]}')
    flat = any(root.glob('*.[xX][mM][lL]')) or any(root.glob('train/*.xml'))
    for part, other in (('images', 'annotations'), ('annotations', 'images')):
        if found[part] is None and (flat or found[other] is not None):
            # XML files beside the images, or the other way round.
            found[part] = found[other] if found[other] is not None else ''
    if None in found.values():
        inner = [
            path.parent for path in sorted(root.glob('*/*')) if path.name == IMAGES
        ]
        hint = f'; did you mean {inner[0]}?' if inner else ''
        raise ValueError(
            f'expected the folders {ANNOTATIONS} and {IMAGES}, or images with XML, '
            f'in {root}; --images and --annotations name others{hint}'
        )
    return found['images'], found['annotations']


def frames(
    tasks: Sequence[_Task], found: Mapping[str, Examined], frame: str
) -> list[_Task]:
    """Return what to examine again, now that it is known what boxes fit."""
    told = Counter(each.frame for each in found.values() if each.frame)
    unknown = told.pop('unknown', 0)
    known = frame or (next(iter(told)) if len(told) == 1 else '')
    if not (known and unknown):
        return []
    return [
        dataclasses.replace(task, frame=known)
        for task in tasks
        if found[task.name].frame == 'unknown'
    ]


def empty_classes(
    lists: Sequence[ImageList],
    examined: Mapping[str, Examined],
    classes: Sequence[str],
) -> Iterator[Problem]:
    """Find classes that have no object in a list."""
    for each in lists:
        total: Counter[str] = Counter()
        for name in each.names:
            total.update(examined[name].counting)
        empty = [name for name in classes if not total[name]]
        if empty:
            names = ', '.join(empty)
            detail = f'no object (difficult ones do not count) of {names}'
            yield Problem('class-empty', each.place, detail, '')


def check(
    settings: Settings,
    only: Sequence[str] | None = None,
    jobs: int = 1,
    frame: str = '',
    named: Sequence[tuple[Path, str, str]] = (),
) -> Checked:
    """Check a data set.

    Args:
        settings: Its folders and classes. Without classes, those of VOC are taken if
            all names in the data are among them.
        only: The lists to check: files, or names in ImageSets/Main without .txt.
            Defaults to all.
        jobs: Number of processes.
        frame: What boxes fit where EXIF turns an image and nothing else tells it: the
            image as 'stored' or as 'seen'. Defaults to what the other images tell.
        named: The lists, each with its name in reports and with what it is for.

    Raises:
        ValueError: If a folder or a list is missing.
    """
    root = settings.root
    images = Index(root, settings.images, '.jpg', SUFFIXES[1:])
    xmls = Index(root, settings.annotations, '.xml')
    known = Names(images, xmls)
    lists = [read_list(path, file, known, told) for path, file, told in named]
    classwise: list[Path] = []
    notes: list[str] = []
    if not named:
        lists, classwise, notes = read_lists(root, only, known)
    names = sorted({name for each in lists for name in each.names})
    if not any(xmls.find(name) for name in names):
        settings = dataclasses.replace(settings, background=False)
    tasks = [Task(settings, n, images.find(n), xmls.find(n)) for n in names]
    examined = dict(zip(names, in_processes(examine, tasks, jobs)))
    again = frames(tasks, examined, frame)
    if again:
        examined.update(
            zip((t.name for t in again), in_processes(examine, again, jobs))
        )
    checked = Checked(settings, [*lists], examined, [], classwise, notes=notes)
    if settings.classes is None and set(checked.objects) <= {*VOC_CLASSES}:
        checked.settings = dataclasses.replace(settings, classes=VOC_CLASSES)
        notes.append('no --classes: every name is one of the 20 of VOC')
    overlaps, checked.lost, checked.pairs = compare_parts(checked.parts)
    checked.problems = [
        *(problem for each in lists for problem in each.problems),
        *(problem for found in examined.values() for problem in found.problems),
        *overlaps,
        *empty_classes(lists, examined, checked.classes or ()),
    ]
    used = {path for task in tasks for path in (*task.images, *task.xmls)}
    checked.unlisted = sorted(
        path
        for index in (images, xmls)
        for paths in index.files.values()
        for path in paths
        if path not in used
    )
    _write_notes(checked)
    return checked


def _write_notes(checked: Checked) -> None:
    notes, settings = checked.notes, checked.settings
    empty = [n for n, f in checked.examined.items() if f.usable and not f.counting]
    if empty:
        notes.append(
            f'{len(empty)} images without an object that counts, such as {empty[0]}: '
            'training leaves them out where filter_empty_gt is set'
        )
    if checked.unlisted:
        notes.append(
            f'{len(checked.unlisted)} files that no list names, such as '
            f'{checked.unlisted[0]}: not checked, and not used'
        )
    unknown = [each.place for each in checked.lists if each.role is None and each.file]
    if unknown:
        notes.append(
            f'lists whose name says neither train, val nor test: {", ".join(unknown)}; '
            'whether they share images with others was not checked'
        )
    if checked.classwise:
        notes.append(
            f'{len(checked.classwise)} lists of one class, such as '
            f'{checked.classwise[0].stem}: XMLDataset cannot read them'
        )
    usual = (settings.images, settings.annotations) == (IMAGES, ANNOTATIONS)
    main = os.path.join('ImageSets', 'Main', '')
    elsewhere = [
        e.file for e in checked.lists if e.file and not e.file.startswith(main)
    ]
    if not usual or elsewhere:
        notes.append(
            'other folders than VOC: each dataset of a config needs '
            f'img_subdir={settings.images!r}, ann_subdir={settings.annotations!r} and '
            f'its list, as in ann_file={(elsewhere or [main + "train.txt"])[0]!r}; '
            '--fix writes a copy with the usual ones'
        )
