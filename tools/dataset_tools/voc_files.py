"""What can be wrong with one image of a VOC data set, found and repaired at once."""

from __future__ import annotations

import difflib
import hashlib
import io
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Sequence

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGES, ANNOTATIONS = 'JPEGImages', 'Annotations'
# What a training does with each kind; mmdet's XMLDataset is meant, which all of VOC
# goes through.
KINDS = {
    'image-missing': 'training stops when it comes to the image, maybe hours later',
    'extension': 'XMLDataset reads .jpg and .xml alone: training stops',
    'image-unreadable': 'training stops when it comes to the image',
    'image-truncated': 'training stops when it comes to the image',
    'image-rotated': 'OpenCV turns the image as its EXIF says, the boxes stay behind',
    'xml-missing': 'training stops before its first step',
    'xml-unreadable': 'training stops before its first step, and names no file',
    'size-mismatch': 'images are grouped and filtered by the size in the XML, or '
    'training stops and names no file',
    'object-unreadable': 'training stops before its first step, and names no file',
    'box-zero-area': 'makes the box loss NaN, unless it is filtered',
    'box-inverted': 'makes the box loss NaN or stops RoIAlign, unless it is filtered',
    'box-outside': 'resizing clips it to a box without area, and the box loss is NaN',
    'box-over-edge': 'resizing clips it',
    'box-float': 'XMLDataset cuts the fraction off',
    'class-unknown': 'XMLDataset drops the objects without a word',
    'class-empty': 'is not learned, or has no AP',
    'list-line': 'XMLDataset takes the whole line as the name: training stops',
    'list-repeats': 'the image counts as often as it is listed',
    'list-empty': 'training stops before its first step',
    'splits-overlap': 'the test sees training images, its AP is too high',
    'splits-same-content': 'the test sees training images, its AP is too high',
}
_CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Problem:
    """Something wrong, and what ``--fix`` does about it.

    Attributes:
        kind: A key of ``KINDS``.
        file: The file, relative to the root of the data.
        detail: What was found.
        repair: What the repaired copy has instead; empty where nothing can be done.
    """

    kind: str
    file: str
    detail: str
    repair: str


@dataclass(frozen=True)
class Task:
    """An image to examine.

    Attributes:
        root: The root of the data.
        name: The image as lists name it.
        image: The image file, relative to the root; None where there is none.
        xml: The same for the annotation.
        classes: Names of the classes; None checks no names.
    """

    root: Path
    name: str
    image: str | None
    xml: str | None
    classes: tuple[str, ...] | None


@dataclass
class Examined:
    """What was found in an image and its annotation.

    Attributes:
        name: The image as lists name it.
        problems: Everything wrong.
        usable: Whether the repaired copy can have the image.
        digest: Hash of the image file; None where there is none.
        upright: Whether the copy must not have the image's EXIF orientation.
        new_xml: The repaired annotation; None where it needs no repair.
        objects: How many objects of each name there are, and those that training
            counts: neither dropped by the repair nor difficult.
    """

    name: str
    problems: list[Problem] = field(default_factory=list)
    usable: bool = True
    digest: bytes | None = None
    upright: bool = False
    new_xml: bytes | None = None
    objects: Counter[str] = field(default_factory=Counter)
    counting: Counter[str] = field(default_factory=Counter)


def _plain(name: str) -> str:
    """Reduce a class name to what two spellings of it share."""
    return re.sub(r'[\s_-]+', '', name).casefold()


class _Annotation:
    """Repairs a parsed annotation in place and notes what it did."""

    def __init__(
        self,
        root: ET.Element,
        file: str,
        size: tuple[int, int] | None,
        classes: tuple[str, ...] | None,
    ) -> None:
        self.root, self.file, self.size, self.classes = root, file, size, classes
        self.problems: list[Problem] = []

    def note(self, kind: str, detail: str, repair: str) -> None:
        self.problems.append(Problem(kind, self.file, detail, repair))

    def check_size(self) -> None:
        """Compare the size that the annotation tells with that of the image."""
        told = self.root.find('size')
        if told is None:  # XMLDataset then reads the image
            return
        read = size_of(self.root)
        if read is not None and (self.size is None or read == self.size):
            return
        texts = [told.findtext(key) for key in ('width', 'height')]
        detail = f'says {texts[0]} x {texts[1]}'
        if self.size is None:
            self.note('size-mismatch', f'{detail}, no numbers', 'size removed')
            self.root.remove(told)
            return
        width, height = self.size
        for key, value in zip(('width', 'height'), self.size):
            element = told.find(key)
            if element is None:
                element = ET.SubElement(told, key)
            element.text = str(value)
        self.note(
            'size-mismatch',
            f'{detail}, the image has {width} x {height}',
            f'set to {width} x {height}; look whether the boxes fit the image',
        )

    def check_objects(self) -> tuple[Counter[str], Counter[str]]:
        """Check all objects; returns how many there are and how many count."""
        found: Counter[str] = Counter()
        counting: Counter[str] = Counter()
        unknown: Counter[str] = Counter()
        for obj in self.root.findall('object'):
            name = obj.findtext('name')
            if not name:
                self.note('object-unreadable', 'an object without name', 'dropped')
                self.root.remove(obj)
                continue
            found[name] += 1
            if self.classes is not None and name not in self.classes:
                unknown[name] += 1
                new = self._known_name(name)
                if new is None:
                    self.root.remove(obj)
                    continue
                obj.find('name').text = new
                name = new
            if not self._check_box(obj, name):
                self.root.remove(obj)
            elif self._counts(obj, name):
                counting[name] += 1
        for name, count in unknown.items():
            new = self._known_name(name)
            repair = 'dropped, as training would' if new is None else f'renamed {new!r}'
            like = difflib.get_close_matches(name, self.classes, 1)
            hint = f', did you mean {like[0]!r}?' if like and new is None else ''
            self.note('class-unknown', f'{name!r}, {count} times{hint}', repair)
        return found, counting

    def _known_name(self, name: str) -> str | None:
        same = [known for known in self.classes if _plain(known) == _plain(name)]
        return same[0] if len(same) == 1 else None

    def _counts(self, obj: ET.Element, name: str) -> bool:
        difficult = obj.find('difficult')
        if difficult is None:
            return True
        try:
            return not int(difficult.text)
        except (TypeError, ValueError):
            self.note(
                'object-unreadable',
                f'{name}: difficult is {difficult.text!r}, expected 0 or 1',
                'set to 0',
            )
            difficult.text = '0'
            return True

    def _check_box(self, obj: ET.Element, name: str) -> bool:
        """Repair a box; returns whether there is one left."""
        corners = [obj.find(f'bndbox/{key}') for key in _CORNERS]
        try:
            exact = [float(corner.text) for corner in corners]
            trained = [int(value) for value in exact]
        except (AttributeError, TypeError, ValueError, OverflowError):
            texts = [None if c is None else c.text for c in corners]
            detail = f'{name}: bndbox {" ".join(map(str, texts))}, expected 4 numbers'
            self.note('object-unreadable', detail, 'dropped')
            return False
        shown = f'{name} ({", ".join(corner.text.strip() for corner in corners)})'
        box = [round(value) for value in exact]
        if exact != trained:
            self.note('box-float', shown, f'rounded to {tuple(box)}')
        if box[0] > box[2] or box[1] > box[3]:
            box = [min(box[::2]), min(box[1::2]), max(box[::2]), max(box[1::2])]
            self.note('box-inverted', shown, f'corners swapped: {tuple(box)}')
        if 0 in (
            box[2] - box[0],
            box[3] - box[1],
            trained[2] - trained[0],
            trained[3] - trained[1],
        ):
            self.note('box-zero-area', shown, 'dropped')
            return False
        if self.size is not None:
            width, height = self.size
            inside = [
                *(max(value, 1) for value in box[:2]),
                *(min(value, most) for value, most in zip(box[2:], self.size)),
            ]
            if inside[0] >= inside[2] or inside[1] >= inside[3]:
                detail = f'{shown}, the image has {width} x {height}'
                self.note('box-outside', detail, 'dropped')
                return False
            if inside != box:
                detail = f'{shown}, the image has 1 to {width} x 1 to {height}'
                self.note('box-over-edge', detail, f'clipped to {tuple(inside)}')
                box = inside
        if box != exact:
            for corner, value in zip(corners, box):
                corner.text = str(value)
        return True


def size_of(root: ET.Element) -> tuple[int, int] | None:
    """Return the width and height that an annotation tells, or None."""
    try:
        return tuple(int(root.find(f'size/{key}').text) for key in ('width', 'height'))
    except (AttributeError, TypeError, ValueError):
        return None


def _read_image(content: bytes) -> tuple[tuple[int, int], int]:
    """Decode an image as far as it takes to know that it is whole.

    Returns:
        Its size as stored, and its EXIF orientation.

    Raises:
        UnidentifiedImageError: If it is no image that OpenCV reads.
        OSError: If a part of it is missing.
    """
    Image.MAX_IMAGE_PIXELS = None  # the user's own data, whatever their size
    with Image.open(io.BytesIO(content)) as image:
        size, turn = image.size, image.getexif().get(ORIENTATION, 1)
        if image.format == 'JPEG':
            # All data are read, but an eighth of the size is computed.
            image.draft('RGB', (max(size[0] // 8, 1), max(size[1] // 8, 1)))
            image.load()
        else:
            image.load()
            if cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is None:
                raise UnidentifiedImageError(f'OpenCV does not read {image.format}')
    return size, turn


def _examine_image(
    task: Task, found: Examined
) -> tuple[tuple[int, int] | None, int, str]:
    """Return the size, EXIF orientation and file of the image; note what is wrong."""
    expected = f'{IMAGES}/{task.name}.jpg'
    file = task.image or expected

    def note(kind: str, detail: str, repair: str = 'taken out of all lists') -> None:
        found.problems.append(Problem(kind, file, detail, repair))
        found.usable = found.usable and kind == 'extension'

    if task.image is None:
        note('image-missing', 'is listed, but there is no such file')
        return None, 1, file
    if file != expected:
        repair = f'copied as {expected}, which image readers take by its content'
        note('extension', 'is not .jpg', repair)
    try:
        content = (task.root / file).read_bytes()
    except OSError as error:
        note('image-unreadable', f'cannot be read: {error.strerror}')
        return None, 1, file
    found.digest = hashlib.blake2b(content, digest_size=16).digest()
    try:
        size, turn = _read_image(content)
    except UnidentifiedImageError:
        what = f'{len(content)} bytes that are no image' if content else 'is empty'
        note('image-unreadable', what)
        return None, 1, file
    except Exception as error:  # Pillow has no common class of errors in a file
        note('image-truncated', f'is damaged: {error}')
        return None, 1, file
    return size, turn, file


def examine(task: Task) -> Examined:
    """Check an image and its annotation, and repair the latter."""
    found = Examined(task.name)
    size, turn, image = _examine_image(task, found)
    file = task.xml or f'{ANNOTATIONS}/{task.name}.xml'
    lost = 'taken out of all lists'
    if task.xml is None:
        detail = 'is listed, but there is no such file'
        found.problems.append(Problem('xml-missing', file, detail, lost))
        found.usable = False
        return found
    if not file.endswith('.xml'):
        repair = f'copied as {ANNOTATIONS}/{task.name}.xml'
        found.problems.append(Problem('extension', file, 'is not .xml', repair))
    try:
        tree = ET.parse(task.root / file)
    except (ET.ParseError, ValueError, LookupError, OSError) as error:
        detail = f'is no readable XML: {error}'
        found.problems.append(Problem('xml-unreadable', file, detail, lost))
        found.usable = False
        return found
    if size is not None and turn in _TURNED:
        turned = size[::-1]
        if size_of(tree.getroot()) == size != turned:
            detail = f'EXIF turns it to {turned[0]} x {turned[1]}, unlike its XML'
            repair = 'stored without the turn'
            found.problems.append(Problem('image-rotated', image, detail, repair))
            found.upright = True
        else:
            size = turned
    annotation = _Annotation(tree.getroot(), file, size, task.classes)
    annotation.check_size()
    found.objects, found.counting = annotation.check_objects()
    if annotation.problems:
        found.problems += annotation.problems
        content = io.BytesIO()
        tree.write(content, encoding='utf-8')
        found.new_xml = content.getvalue() + b'\n'
    return found


def examine_all(tasks: Sequence[Task], jobs: int) -> list[Examined]:
    """Examine images in several processes, with a progress bar."""
    from concurrent.futures import ProcessPoolExecutor

    from tqdm import tqdm

    bar = dict(total=len(tasks), desc='images', unit='', mininterval=0.5)
    if jobs == 1 or len(tasks) < 100:  # processes take longer to start than that
        return list(tqdm(map(examine, tasks), **bar))
    with ProcessPoolExecutor(jobs) as pool:
        return list(tqdm(pool.map(examine, tasks, chunksize=16), **bar))
