"""A VOC data set as a whole: its lists, what two of them share, and its classes."""

from __future__ import annotations

import io
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence

from tools.dataset_tools.voc_files import (
    ANNOTATIONS,
    IMAGES,
    Examined,
    Problem,
    Task,
    examine_all,
)

MAIN = 'ImageSets/Main'
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif')
_FLAGGED = re.compile(r'(\S.*?)\s+(-1|0|1)')
# From a list to the one that decides: of an image in both, the former loses it.
_ROLES = ('train', 'trainval', 'val', 'test')
_PARTS = {('train', 'trainval'), ('trainval', 'val')}


@dataclass
class ImageList:
    """A list of images.

    Attributes:
        stem: Its file's name without .txt.
        names: The images as the repaired list has them, each once.
        problems: What is wrong with its lines.
    """

    stem: str
    names: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def file(self) -> str:
        """The file, relative to the root of the data."""
        return f'{MAIN}/{self.stem}.txt'

    @property
    def role(self) -> tuple[str, str] | None:
        """One of train, trainval, val and test, and the rest of the name."""
        for role in ('trainval', 'train', 'test', 'val'):
            if role in self.stem.lower():
                return role, self.stem.lower().replace(role, '', 1)
        return None


def _index(folder: Path, suffixes: Sequence[str], usual: str) -> dict[str, str]:
    """Find the files of a folder, by name without suffix, the usual suffix first."""
    files: dict[str, str] = {}
    for place, _, names in os.walk(folder, followlinks=True):
        for file in sorted(names):
            suffix = os.path.splitext(file)[1]
            if suffix.lower() in suffixes:
                path = Path(place, file).relative_to(folder.parent).as_posix()
                key = path[len(folder.name) + 1 : len(path) - len(suffix)]
                if key not in files or suffix == usual:
                    files[key] = path
    return files


def read_lines(path: Path) -> list[str]:
    """Read the lines of a list as mmengine does: with all spaces in them.

    Raises:
        ValueError: If the text is not UTF-8, of which mmengine makes an error too.
    """
    try:
        text = path.read_bytes().decode('utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'expected UTF-8 in {path}, got {error}; convert it') from None
    return [line.rstrip('\r\n') for line in io.StringIO(text)]


def _name(line: str, exists: Callable[[str], bool]) -> str:
    """Return the image that a line probably means."""
    name = line.strip().lstrip('\ufeff')
    stem, suffix = os.path.splitext(name)
    flagged = _FLAGGED.fullmatch(name)
    candidates = [name]
    if suffix.lower() in (*SUFFIXES, '.xml'):
        candidates += [stem, stem.rpartition('/')[2]]
    if flagged:
        candidates.append(flagged[1])
    return next(filter(exists, candidates), name)


def per_class(stem: str, lines: Sequence[str], stems: Sequence[str]) -> bool:
    """Tell VOC's lists of one class, like ``cat_train``, whose rows end in a flag."""
    split = any(stem.endswith(f'_{other}') for other in stems)
    return split and all(_FLAGGED.fullmatch(line.strip()) for line in lines)


def read_list(path: Path, exists: Callable[[str], bool]) -> ImageList:
    """Read a list, and repair its lines."""
    found = ImageList(path.stem)
    seen: Counter[str] = Counter()
    for number, line in enumerate(read_lines(path), 1):
        name = _name(line, exists)
        if name != line:
            repair = f'read as {name!r}' if name else 'dropped'
            problem = Problem(
                'list-line', found.file, f'line {number}: {line!r}', repair
            )
            found.problems.append(problem)
        if name:
            seen[name] += 1
    for name, count in seen.items():
        if count > 1:
            detail = f'{name} is listed {count} times'
            problem = Problem('list-repeats', found.file, detail, 'listed once')
            found.problems.append(problem)
    if not seen:
        found.problems.append(Problem('list-empty', found.file, 'names no image', ''))
    found.names = list(seen)
    return found


def read_lists(
    root: Path, only: Sequence[str] | None, exists: Callable[[str], bool]
) -> tuple[list[ImageList], list[str]]:
    """Read all lists, or those named.

    Returns:
        The lists, and the names of VOC's per-class lists.

    Raises:
        ValueError: If there is none, or not one that is named.
    """
    paths = {path.stem: path for path in sorted((root / MAIN).glob('*.txt'))}
    classwise = [
        stem
        for stem, path in paths.items()
        if stem not in (only or ()) and per_class(stem, read_lines(path), [*paths])
    ]
    splits = [stem for stem in paths if stem not in classwise]
    missing = [stem for stem in only or () if stem not in paths]
    if missing or not splits:
        raise ValueError(
            f'expected {" and ".join(missing) or "lists of images"} as .txt in '
            f'{root / MAIN}, found {", ".join(splits) or "none"}'
        )
    lists = [read_list(paths[stem], exists) for stem in only or splits]
    return lists, classwise


def _pairs(lists: Sequence[ImageList]) -> Iterator[tuple[ImageList, ImageList]]:
    """Yield the pairs that must not share images, the one that loses them first."""
    known = sorted(
        (each for each in lists if each.role), key=lambda e: _ROLES.index(e.role[0])
    )
    for position, first in enumerate(known):
        for second in known[position + 1 :]:
            roles = first.role[0], second.role[0]
            # train_fold1 and val_fold2 may share images, train_fold1 and test not.
            rests = {first.role[1], second.role[1]} - {''}
            if roles[0] != roles[1] and roles not in _PARTS and len(rests) < 2:
                yield first, second


def _compare_lists(
    lists: Sequence[ImageList], examined: Mapping[str, Examined]
) -> tuple[list[Problem], dict[str, set[str]]]:
    """Find images that are in two splits, by name or by content.

    Returns:
        The problems, and for each list the images that its repaired copy loses.
    """
    problems: list[Problem] = []
    lost: dict[str, set[str]] = defaultdict(set)
    for first, second in _pairs(lists):
        copies: dict[bytes, str] = {}
        for name in second.names:
            if examined[name].digest is not None:
                copies[examined[name].digest] = name
        others = set(second.names)
        for name in first.names:
            same = copies.get(examined[name].digest)
            if name in others:
                kind, detail = 'splits-overlap', f'{name} is also in {second.stem}'
            elif same is not None:
                kind = 'splits-same-content'
                detail = f'{name} is the same image as {same} in {second.stem}'
            else:
                continue
            lost[first.stem].add(name)
            repair = f'taken out of {first.stem}'
            problems.append(Problem(kind, first.file, detail, repair))
    return problems, lost


def _empty_classes(
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
            yield Problem('class-empty', each.file, detail, '')


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
        root: Its folder.
        classes: The names that were expected; None where none could be.
        lists: The lists of images.
        classwise: Names of VOC's lists of one class.
        tasks: What was examined, by the name of the image.
        examined: What was found there.
        problems: Everything wrong.
        lost: For each list the images that its repaired copy loses to another list.
        unlisted: Files that no list names, relative to the root.
        notes: What is worth knowing and not wrong.
    """

    root: Path
    classes: tuple[str, ...] | None
    lists: list[ImageList]
    classwise: list[str]
    tasks: dict[str, Task]
    examined: dict[str, Examined]
    problems: list[Problem]
    lost: dict[str, set[str]]
    unlisted: list[str]
    notes: list[str]

    @property
    def objects(self) -> Counter[str]:
        """How many objects of each name there are."""
        return sum((found.objects for found in self.examined.values()), Counter())


def check(
    root: Path,
    classes: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    jobs: int = 1,
) -> Checked:
    """Check a data set.

    Args:
        root: The folder with Annotations, ImageSets and JPEGImages.
        classes: Names of the classes. Defaults to those of VOC if all names in the
            data are among them, and else to none.
        only: The lists to check, without .txt. Defaults to all.
        jobs: Number of processes.

    Raises:
        ValueError: If a folder or a list is missing.
    """
    missing = [
        part for part in (ANNOTATIONS, MAIN, IMAGES) if not (root / part).is_dir()
    ]
    if missing:
        inner = [path.parent for path in root.glob(f'*/{IMAGES}')]
        hint = f'; did you mean {inner[0]}?' if inner else ''
        raise ValueError(f'expected the folders {", ".join(missing)} in {root}{hint}')
    images = _index(root / IMAGES, SUFFIXES, '.jpg')
    xmls = _index(root / ANNOTATIONS, ('.xml',), '.xml')
    lists, classwise = read_lists(
        root, only, lambda name: name in images or name in xmls
    )
    names = sorted({name for each in lists for name in each.names})
    wanted = None if classes is None else tuple(classes)
    tasks = {n: Task(root, n, images.get(n), xmls.get(n), wanted) for n in names}
    examined = dict(zip(names, examine_all([*tasks.values()], jobs)))
    checked = Checked(
        root, wanted, lists, classwise, tasks, examined, [], {}, [], notes=[]
    )
    if wanted is None and set(checked.objects) <= set(VOC_CLASSES):
        checked.classes = VOC_CLASSES
        checked.notes.append('no --classes: every name is one of the 20 of VOC')
    overlaps, checked.lost = _compare_lists(lists, examined)
    for each in lists:
        checked.problems += each.problems
    for found in examined.values():
        checked.problems += found.problems
    checked.problems += overlaps
    if checked.classes is not None:
        checked.problems += _empty_classes(lists, examined, checked.classes)
    checked.unlisted = sorted(
        path
        for files in (images, xmls)
        for name, path in files.items()
        if name not in tasks
    )
    _write_notes(checked)
    return checked


def _write_notes(checked: Checked) -> None:
    notes = checked.notes
    empty = [
        found.name
        for found in checked.examined.values()
        if found.usable and not found.counting
    ]
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
    unknown = [each.stem for each in checked.lists if each.role is None]
    if unknown:
        notes.append(
            f'lists whose name says neither train, val nor test: {", ".join(unknown)}; '
            'whether they share images with others was not checked'
        )
    if checked.classwise:
        notes.append(
            f'{len(checked.classwise)} lists of one class, such as '
            f'{checked.classwise[0]}: XMLDataset cannot read them'
        )
