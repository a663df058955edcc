"""What can be wrong with one image of a VOC data set, found and repaired at once."""

from __future__ import annotations

import hashlib
import os
import stat
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Sequence, TypeVar

from tools.dataset_tools.voc_images import Picture, look_of, read_image, what_is_wrong
from tools.dataset_tools.voc_xml import (
    boxes_fit,
    check_objects,
    check_size,
    read_xml,
    size_of,
    unfold,
)

IMAGES, ANNOTATIONS = 'JPEGImages', 'Annotations'
# What a training does with each kind; mmdet's XMLDataset and CocoDataset are meant.
KINDS = {
    'image-missing': 'training stops when it comes to the image, maybe hours later',
    'extension': 'XMLDataset reads .jpg and .xml alone: training stops',
    'image-unreadable': 'training stops when it comes to the image',
    'image-rotated': 'OpenCV turns the image as its EXIF says, the boxes stay behind',
    'xml-missing': 'training stops before its first step',
    'xml-unreadable': 'training stops before its first step, and names no file',
    'xml-foreign': 'training takes it for an image without objects',
    'size-mismatch': 'images are grouped and filtered by this size; without a number '
    'training stops and names no file',
    'object-unreadable': 'training stops before its first step, and names no file',
    'box-zero-area': 'makes the box loss NaN, unless it is filtered',
    'box-inverted': 'makes the box loss NaN or stops RoIAlign, unless it is filtered',
    'box-outside': 'resizing clips it to a box without area, and the box loss is NaN',
    'box-over-edge': 'resizing clips it',
    'box-float': 'XMLDataset cuts the fraction off',
    'class-unknown': 'training drops the objects without a word',
    'class-empty': 'is not learned, or has no AP',
    'class-order': 'CocoDataset numbers the classes as the file has them',
    'num-classes': 'labels beyond it count as background, or training stops',
    'list-line': 'XMLDataset takes the whole line as the name: training stops',
    'list-repeats': 'the image counts as often as it is listed',
    'list-empty': 'training stops before its first step',
    'splits-overlap': 'the test sees training images, its AP is too high',
    'splits-same-content': 'the test sees training images, its AP is too high',
    'splits-copies': 'the test sees training images, its AP is too high',
}
_LOST = 'taken out of all lists'


@dataclass(frozen=True)
class Problem:
    """Something wrong, and what ``--fix`` does about it.

    Attributes:
        kind: A key of ``KINDS``.
        file: The file, relative to the root of the data.
        detail: What was found.
        repair: What the repaired copy has instead; empty where nothing is done.
    """

    kind: str
    file: str
    detail: str
    repair: str


@dataclass(frozen=True)
class Settings:
    """What holds for all images of a data set.

    Attributes:
        root: The folder that file names are relative to.
        images: The folder of images in it, mmdet's ``img_subdir``.
        annotations: The folder of XML files in it, mmdet's ``ann_subdir``.
        classes: Names of the classes; None checks no names.
        drop_unknown: Whether the copy has no objects of other names.
        background: Whether an image without XML is one without objects.
        copies: Whether to look for copies of photographs.
    """

    root: Path
    images: str = IMAGES
    annotations: str = ANNOTATIONS
    classes: tuple[str, ...] | None = None
    drop_unknown: bool = False
    background: bool = True
    copies: bool = False


@dataclass(frozen=True)
class Task:
    """An image to examine.

    Attributes:
        settings: What holds for all.
        name: The image as lists name it.
        images: Files that may be the image, the one that training reads first.
        xmls: The same for the annotation.
        frame: What the boxes fit where EXIF turns the image and the annotation does
            not tell: the image as 'stored', or as 'seen'; empty where nobody knows.
    """

    settings: Settings
    name: str
    images: tuple[str, ...]
    xmls: tuple[str, ...]
    frame: str = ''


@dataclass
class Examined:
    """What was found in an image and its annotation.

    Attributes:
        name: The image as lists name it.
        problems: Everything wrong.
        usable: Whether training can use the image, maybe after repairs.
        image: The file of the image; None where there is none.
        xml: The same for the annotation.
        digest: Hash of the image file; None where it cannot be read.
        look: What copies of one photograph share; None where it was not asked for.
        frame: 'stored' or 'seen' if the annotation fits the image without or with the
            turn of its EXIF data, 'unknown' if it may be both, empty without a turn.
        upright: The repaired image, or None.
        new_xml: The repaired annotation; None where it needs no repair.
        objects: How many objects of each name there are, and those that training
            counts: neither dropped by the repair nor difficult.
    """

    name: str
    problems: list[Problem] = field(default_factory=list)
    usable: bool = True
    image: str | None = None
    xml: str | None = None
    digest: bytes | None = None
    look: bytes | None = None
    frame: str = ''
    upright: bytes | None = None
    new_xml: bytes | None = None
    objects: Counter[str] = field(default_factory=Counter)
    counting: Counter[str] = field(default_factory=Counter)

    def note(self, file: str, kind: str, detail: str, repair: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(kind, file, detail, repair))

    def lose(self, file: str, kind: str, detail: str) -> None:
        """Add a problem for which the image cannot be used."""
        self.note(file, kind, detail, _LOST)
        self.usable = False


def read_file(path: Path) -> bytes:
    """Read a file, but no pipe or device, which may have no end.

    Raises:
        OSError: If there is none.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f'{path} is no regular file')
    return path.read_bytes()


def find_picture(
    root: Path, files: Sequence[str], expected: str, found: Examined, copies: bool
) -> Picture | None:
    """Read the first file that training can read as an image; note what is wrong."""
    wrong = ''
    for file in files:
        try:
            content = read_file(root / file)
        except OSError as error:
            wrong = wrong or f'cannot be read: {error.strerror or error}'
            continue
        picture = read_image(content)
        if picture is None:
            wrong = wrong or what_is_wrong(content)
            continue
        found.image = file
        found.digest = hashlib.blake2b(content, digest_size=16).digest()
        found.look = look_of(content, picture) if copies else None
        repair = f'{file} is copied as this, unchanged: readers go by the content'
        if wrong and expected in files:
            found.note(expected, 'image-unreadable', wrong, repair)
        elif file != expected:
            repair = f'copied as {expected}, unchanged: readers go by the content'
            found.note(file, 'extension', 'is not .jpg', repair)
        return picture
    if files:
        found.lose(files[0], 'image-unreadable', wrong)
    else:
        special = os.path.lexists(root / expected)
        what = 'is no file: a folder, a pipe, or a link to nothing'
        detail = what if special else 'is listed, but there is no such file'
        found.lose(expected, 'image-missing', detail)
    return None


def check_turn(
    found: Examined,
    picture: Picture,
    told: tuple[int, int] | None,
    fits: Callable[[tuple[int, int]], bool],
    frame: str,
) -> tuple[int, int]:
    """Find out whether boxes fit an image that EXIF turns.

    Args:
        found: Gets what is wrong.
        picture: The image.
        told: The size that the annotation tells.
        fits: Tells whether its boxes are all inside of an image of a size.
        frame: What is assumed where neither decides.

    Returns:
        The size of the image that the boxes are in.
    """
    if not picture.turned:
        return picture.size
    found.frame = 'unknown'
    sizes = dict(stored=picture.stored, seen=picture.size)
    if picture.stored != picture.size:
        right = [name for name in sizes if told == sizes[name]]
        right = right or [name for name in sizes if fits(sizes[name])]
        found.frame = right[0] if len(right) == 1 else 'unknown'
    frame = frame if found.frame == 'unknown' else found.frame
    if frame == 'seen':
        return picture.size
    if frame == 'stored' and picture.upright:
        found.upright = picture.upright
        detail = 'EXIF turns it, its boxes fit the image without the turn'
        repair = 'stored without the turn, the same pixels'
        found.note(found.image, 'image-rotated', detail, repair)
        return picture.stored
    detail = 'EXIF turns it; whether its boxes fit it so, nothing tells: --exif does'
    found.note(found.image, 'image-rotated', detail, '')
    return picture.size


def _read_annotation(task: Task, found: Examined) -> ET.Element | None:
    """Read the first annotation that can be read; note what is wrong with it."""
    expected = os.path.join(task.settings.annotations, f'{task.name}.xml')
    wrong = ''
    for file in task.xmls:
        try:
            root, repaired = read_xml(read_file(task.settings.root / file))
        except (ValueError, OSError, RecursionError) as error:
            wrong = wrong or str(error)
            continue
        found.xml = file
        if repaired:
            found.note(file, 'xml-unreadable', repaired, 'written anew')
        if file != expected:
            found.note(file, 'extension', 'is not .xml', f'copied as {expected}')
        return root
    if task.xmls:
        found.lose(task.xmls[0], 'xml-unreadable', wrong)
    elif not task.settings.background:
        found.lose(expected, 'xml-missing', 'there is no XML at all')
    elif found.usable:
        detail = 'there is no such file'
        found.note(expected, 'xml-missing', detail, 'written: an image without objects')
        return ET.fromstring('<annotation><size><width/><height/></size></annotation>')
    return None


def examine(task: Task) -> Examined:
    """Check an image and its annotation, and repair the latter."""
    settings, found = task.settings, Examined(task.name)
    expected = os.path.join(settings.images, f'{task.name}.jpg')
    picture = find_picture(settings.root, task.images, expected, found, settings.copies)
    root = _read_annotation(task, found)
    if picture is None or root is None:
        if root is not None:
            names = (obj.findtext('name') for obj in root.findall('object'))
            found.objects.update(name for name in names if name)
        return found
    file = found.xml or os.path.join(settings.annotations, f'{task.name}.xml')

    def note(kind: str, detail: str, repair: str) -> None:
        found.note(file, kind, detail, repair)

    foreign = unfold(root, note)
    if foreign:
        found.lose(file, 'xml-foreign', foreign)
        return found
    size = picture.size
    if root.find('object') is not None:

        def fits(size: tuple[int, int]) -> bool:
            return boxes_fit(root, size)

        size = check_turn(found, picture, size_of(root), fits, task.frame)
    if found.xml is None:  # a background image
        root[0][0].text, root[0][1].text = map(str, size)
    check_size(root, size, note)
    found.objects, found.counting, kept = check_objects(
        root, size, settings.classes, settings.drop_unknown, note
    )
    if not kept:
        found.lose(file, 'object-unreadable', 'none of its objects is left')
    if any(problem.file == file for problem in found.problems):
        try:
            found.new_xml = ET.tostring(root, encoding='utf-8') + b'\n'
        except RecursionError:
            found.lose(file, 'xml-unreadable', 'has too many levels of tags')
    return found


_In, _Out = TypeVar('_In'), TypeVar('_Out')


def in_processes(
    work: Callable[[_In], _Out], tasks: Sequence[_In], jobs: int
) -> list[_Out]:
    """Examine images in several processes, with a progress bar."""
    from concurrent.futures import ProcessPoolExecutor

    from tqdm import tqdm

    bar = dict(total=len(tasks), desc='images', unit='', mininterval=0.5)
    if jobs == 1 or len(tasks) < 100:  # processes take longer to start than that
        return list(tqdm(map(work, tasks), **bar))
    with ProcessPoolExecutor(jobs) as pool:
        return list(tqdm(pool.map(work, tasks, chunksize=16), **bar))
