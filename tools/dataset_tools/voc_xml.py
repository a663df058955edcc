"""A VOC annotation as mmdet's XMLDataset reads it, and its repair."""

from __future__ import annotations

import codecs
import difflib
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections import Counter
from typing import Callable, Iterator, Sequence

Note = Callable[[str, str, str], None]  # kind, detail, repair

_CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')
_KNOWN = ('object', 'name', 'difficult', 'bndbox', 'size', 'width', 'height', *_CORNERS)
_BOXES = {'bndbox', 'robndbox', 'box', 'bbox', 'polygon', 'points', 'shape', *_CORNERS}
_BOMS = {
    codecs.BOM_UTF8: 'utf-8-sig',
    codecs.BOM_UTF32_LE: 'utf-32',  # before UTF-16's, which begins it
    codecs.BOM_UTF32_BE: 'utf-32',
    codecs.BOM_UTF16_LE: 'utf-16',
    codecs.BOM_UTF16_BE: 'utf-16',
}
_TEXT = re.compile(r'(utf|iso|gb|big5|euc|shift|windows|cp|koi|latin|us-ascii)[\w-]*')
_DECLARED = re.compile(rb'<\?xml[^>]{0,100}encoding\s*=\s*["\']([\w-]{1,20})')
_FORBIDDEN = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]')
_BARE = re.compile(r'&(?!(?:amp|lt|gt|quot|apos|#\d{1,7}|#x[0-9a-fA-F]{1,6});)')
_YES, _NO = ('true', 'yes', 'y', 't'), ('', 'false', 'no', 'n', 'f', 'none')


def encodings(content: bytes, declared: str = '') -> Iterator[tuple[str, str]]:
    """Yield the text in each encoding that it may have, likely ones first."""
    marked = [name for mark, name in _BOMS.items() if content.startswith(mark)]
    declared = 'gb18030' if declared.startswith('gb') else declared
    told = [declared] if _TEXT.fullmatch(declared) else []
    for name in (*marked[:1], *told, 'utf-8', 'cp1252', 'gb18030', 'latin-1'):
        try:
            yield content.decode(name), name
        except (LookupError, ValueError):
            continue


def read_xml(content: bytes) -> tuple[ET.Element, str]:
    """Parse XML, and repair it where that takes no guess about what it holds.

    Returns:
        The root, and why training cannot read it, empty where it can.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        return ET.fromstring(content), ''
    except (ET.ParseError, ValueError, LookupError) as error:
        reason = str(error)
    found = _DECLARED.search(content[:300].replace(b'\0', b''))
    for text, name in encodings(content, found[1].decode().lower() if found else ''):
        text = re.sub(r'<\?xml[^>]{0,200}\?>', '', text, count=1)
        text = text[max(text.find('<'), 0) :]
        text = _BARE.sub('&amp;', _FORBIDDEN.sub('', text))
        tag = re.search(r'<([^\W\d][\w.:-]*)', text)
        end = text.find(f'</{tag[1]}>') + len(tag[1]) + 3 if tag else 0
        # What stands behind the end is junk, unless it has objects of its own.
        if '<object' not in text[end:]:
            text = text[:end]
        try:
            return ET.fromstring(text), f'{reason}; read as {name}'
        except (ET.ParseError, ValueError):
            continue
    raise ValueError(f'is no readable XML: {reason}')


def _local(element: ET.Element) -> str:
    return str(element.tag).rpartition('}')[2].casefold()


def _objects(element: ET.Element) -> Iterator[ET.Element]:
    """Yield what looks like an object, at any depth, but not inside another one."""
    stack = [element]
    while stack:
        element = stack.pop()
        if _local(element) == 'object':
            yield element
        else:
            stack += reversed(element)


def unfold(root: ET.Element, note: Note) -> str:
    """Bring objects to where XMLDataset looks for them.

    Returns:
        Why the annotation cannot be used; empty if it is VOC's, or has no objects.
    """
    objects = [*_objects(root)]
    tags = {_local(element) for element in root.iter()}
    exact = all(e.tag == _local(e) or _local(e) not in _KNOWN for e in root.iter())
    if objects == root.findall('object') and exact:
        attributes = {key.casefold() for each in root.iter() for key in each.attrib}
        foreign = tags & _BOXES or attributes & {*_CORNERS, 'xtl', 'points', 'bbox'}
        if objects or not (foreign or _local(root) != 'annotation'):
            return ''
        return f'no object of VOC, but {", ".join(sorted(tags)[:6])}'
    if sum(_local(element) == 'annotation' for element in root.iter()) > 1:
        return 'annotations of several images in one file'
    seen = len(root.findall('object'))
    detail = f'XMLDataset finds {seen} of {len(objects)} objects, or not all of one'
    note('xml-foreign', detail, 'objects and names of tags put right')
    for element in [*root.iter()]:
        if _local(element) in _KNOWN:
            element.tag = _local(element)
    for parent in [*root.iter()]:
        for child in [*parent]:
            if parent is not root and any(child is each for each in objects):
                parent.remove(child)
                root.append(child)
    sizes = [e for e in root.iter('size') if e.find('width') is not None]
    if root.find('size') is None and sizes:
        root.insert(0, sizes[0])
    return ''


def size_of(root: ET.Element) -> tuple[int, int] | None:
    """Return the width and height that an annotation tells, or None."""
    try:
        size = root.find('size')
        return int(size.find('width').text), int(size.find('height').text)
    except (AttributeError, TypeError, ValueError):
        return None


def check_size(root: ET.Element, size: tuple[int, int], note: Note) -> None:
    """Compare the size that the annotation tells with that of the image."""
    told = root.find('size')
    if told is None or size_of(root) == size:  # without one XMLDataset reads the image
        return
    texts = [told.findtext(key) for key in ('width', 'height')]
    for key, value in zip(('width', 'height'), size):
        element = told.find(key)
        if element is None:
            element = ET.SubElement(told, key)
        element.text = str(value)
    shown = f'{size[0]} x {size[1]}'
    note(
        'size-mismatch',
        f'says {texts[0]} x {texts[1]}, the image has {shown}',
        f'set to {shown}; look whether the boxes fit the image',
    )


def plain(name: str) -> str:
    """Reduce a class name to what two spellings of it share."""
    return re.sub(r'[\s_-]+', '', unicodedata.normalize('NFKC', name)).casefold()


def known_name(name: str, classes: Sequence[str]) -> str | None:
    """Return the one class that a name can only mean."""
    same = [known for known in classes if plain(known) == plain(name)]
    return same[0] if len(same) == 1 else None


def check_objects(
    root: ET.Element,
    size: tuple[int, int],
    classes: Sequence[str] | None,
    drop_unknown: bool,
    note: Note,
) -> tuple[Counter[str], Counter[str], bool]:
    """Check all objects, and repair or drop them.

    Returns:
        How many of each name there are, how many of each class training learns, and
        whether a class' object is left where there was one.
    """
    found: Counter[str] = Counter()
    counting: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    known, dropped = 0, 0
    for obj in root.findall('object'):
        tag = obj.find('name')
        name = tag.text if tag is not None else None
        if not (name and name.strip()):
            note('object-unreadable', 'an object without name', 'dropped')
            root.remove(obj)
            continue
        found[name] += 1
        known += 1
        if classes is not None and name not in classes:
            unknown[name] += 1
            new = known_name(name, classes)
            if new is None:  # training does not read the rest of it
                known -= 1
                if drop_unknown:
                    root.remove(obj)
                continue
            tag.text = name = new
        if not _check_box(obj, name, size, note):
            root.remove(obj)
            dropped += 1
        elif not _is_difficult(obj, name, note):
            counting[name] += 1
    for name, count in unknown.items():
        new = known_name(name, classes)
        like = difflib.get_close_matches(name, classes, 1)
        hint = f', did you mean {like[0]!r}?' if like and new is None else ''
        drop = 'dropped, as training would' if drop_unknown else ''
        repair = drop if new is None else f'renamed {new!r}'
        note('class-unknown', f'{name!r}, {count} times{hint}', repair)
    return found, counting, dropped < known or not known


def _is_difficult(obj: ET.Element, name: str, note: Note) -> bool:
    difficult = obj.find('difficult')
    if difficult is None:
        return False
    try:
        return bool(int(difficult.text))
    except (TypeError, ValueError):
        text = (difficult.text or '').strip().casefold()
    try:
        value = text in _YES or (text not in _NO and float(text) != 0)
    except ValueError:
        value = False
    detail = f'{name}: difficult is {difficult.text!r}, expected 0 or 1'
    difficult.text = str(int(value))
    note('object-unreadable', detail, f'set to {difficult.text}')
    return value


def _corners(obj: ET.Element) -> list[ET.Element | None]:
    """Return the corners that XMLDataset reads, or else those of another box."""
    boxes = [[box.find(key) for key in _CORNERS] for box in obj.findall('bndbox')]
    whole = [corners for corners in boxes if None not in corners]
    return [*whole, *boxes, [None] * 4][0]


def _check_box(obj: ET.Element, name: str, size: tuple[int, int], note: Note) -> bool:
    """Repair a box; returns whether there is one left."""
    corners = _corners(obj)
    texts = [None if each is None else each.text for each in corners]
    try:
        commas = [text.replace(',', '.') for text in texts]
        exact = [float(text) for text in commas]
        trained = [int(value) for value in exact]
        read = commas == texts and corners[0] in [*obj.find('bndbox')]
    except (AttributeError, ValueError, OverflowError):
        detail = f'{name}: bndbox {" ".join(map(str, texts))}, expected 4 numbers'
        note('object-unreadable', detail, 'dropped')
        return False
    shown = f'{name} ({", ".join(text.strip() for text in texts)})'
    box = [round(value) for value in exact]
    if not read:
        for other in [each for each in obj.findall('bndbox')]:
            if corners[0] not in [*other]:
                obj.remove(other)
        note('object-unreadable', f'{shown}, not as training reads it', f'now {box}')
    if exact != trained:
        note('box-float', shown, f'rounded to {tuple(box)}')
    if box[0] > box[2] or box[1] > box[3]:
        box = [min(box[::2]), min(box[1::2]), max(box[::2]), max(box[1::2])]
        note('box-inverted', shown, f'corners swapped: {tuple(box)}')
    sides = [end - start for each in (box, trained) for start, end in _sides(each)]
    if 0 in sides:
        note('box-zero-area', shown, 'dropped')
        return False
    width, height = size
    inside = [
        *(max(value, 1) for value in box[:2]),
        *(min(value, most) for value, most in zip(box[2:], size)),
    ]
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        note('box-outside', f'{shown}, the image has {width} x {height}', 'dropped')
        return False
    if inside != box:
        detail = f'{shown}, the image has 1 to {width} x 1 to {height}'
        note('box-over-edge', detail, f'clipped to {tuple(inside)}')
    if inside != exact or not read:
        for corner, value in zip(corners, inside):
            corner.text = str(value)
    return True


def _sides(box: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return (box[0], box[2]), (box[1], box[3])


def boxes_fit(root: ET.Element, size: tuple[int, int]) -> bool:
    """Tell whether all boxes that can be read are in an image of this size."""
    for obj in root.findall('object'):
        try:
            right, low = (float(each.text) for each in _corners(obj)[2:])
        except (AttributeError, TypeError, ValueError):
            continue
        if right > size[0] or low > size[1]:
            return False
    return True
