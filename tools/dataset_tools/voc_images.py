"""An image as training reads it: by OpenCV, turned as its EXIF data say."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

_JPEG = b'\xff\xd8'
_TIFF = (b'II*\0', b'MM\0*')
# Where EXIF data begin in JPEG, PNG and WebP: so many bytes after this mark.
_MARKS = {b'Exif\0\0': 6, b'eXIf': 4, b'EXIF': 8}
_ORIENTATION, _SHORT = 0x0112, 3
_STARTS = re.compile(
    rb'\xff\xd8|\x89PNG|BM|RIFF....WEBP|II\*\0|MM\0\*|P[1-6]|\0\0\0\x0cjP', re.DOTALL
)
_THUMB = 16


@dataclass(frozen=True)
class Picture:
    """What OpenCV makes of a file.

    Attributes:
        size: Width and height as training has them.
        stored: The same as they are stored, before EXIF turns the image.
        turned: Whether EXIF turns or mirrors it.
        upright: The file with another orientation in its EXIF data and else the same,
            in which nothing is turned; None where that cannot be had.
        pixels: The pixels that training has, maybe an eighth of the size.
    """

    size: tuple[int, int]
    stored: tuple[int, int]
    turned: bool
    upright: bytes | None
    pixels: np.ndarray


def _decode(content: bytes, flags: int = cv2.IMREAD_COLOR) -> np.ndarray | None:
    """Decode as mmcv does for LoadImageFromFile."""
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # of an empty file, say
        return None


def _orientation(content: bytes) -> tuple[int, str] | None:
    """Return where a file keeps its EXIF orientation, and the order of bytes there."""
    starts = [0]
    for mark, skip in _MARKS.items():
        if (at := content.find(mark)) >= 0:
            starts.append(at + skip)
    for start in starts:
        if content[start : start + 4] not in _TIFF:
            continue
        order = '<' if content[start : start + 1] == b'I' else '>'
        try:
            at = start + struct.unpack_from(f'{order}I', content, start + 4)[0]
            for entry in range(struct.unpack_from(f'{order}H', content, at)[0]):
                place = at + 2 + 12 * entry
                if struct.unpack_from(f'{order}HH', content, place) == (
                    _ORIENTATION,
                    _SHORT,
                ):
                    return place + 8, order
        except struct.error:
            continue
    return None


def _set_upright(content: bytes) -> bytes | None:
    """Change the two bytes of the EXIF orientation, and PNG's checksum of them."""
    found = _orientation(content)
    if found is None:
        return None
    at, order = found
    changed = bytearray(content)
    changed[at : at + 2] = struct.pack(f'{order}H', 1)
    if content.startswith(b'\x89PNG'):
        chunk = content.find(b'eXIf')
        end = chunk + 4 + int.from_bytes(content[chunk - 4 : chunk], 'big')
        changed[end : end + 4] = zlib.crc32(changed[chunk:end]).to_bytes(4, 'big')
    return bytes(changed)


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(content), formats=['JPEG']) as image:
            return image.size
    except Exception:  # Pillow has no common class of errors in a file
        return None


def _read(content: bytes, size: tuple[int, int] | None) -> Picture | None:
    """Decode a JPEG of known size at an eighth of it, and any other file as a whole."""
    flags, factor = (cv2.IMREAD_REDUCED_COLOR_8, 8) if size else (cv2.IMREAD_COLOR, 1)
    pixels = plain = _decode(content, flags)
    if pixels is None:
        return None
    upright = None
    if content[:4] in _TIFF or any(mark in content for mark in _MARKS):
        upright = _set_upright(content)
        plain = None if upright is None else _decode(upright, flags)
        if plain is None:
            upright = None
            plain = _decode(content, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    seen, stored = pixels.shape[1::-1], plain.shape[1::-1]
    if size:
        small = tuple(-(-side // factor) for side in size)
        if stored != small or seen not in (small, small[::-1]):
            return None
        seen, stored = size if seen == small else size[::-1], size
    turned = not np.array_equal(pixels, plain)
    return Picture(seen, stored, turned, upright if turned else None, pixels)


def read_image(content: bytes) -> Picture | None:
    """Return what training reads from a file's content, or None if that fails."""
    size = _jpeg_size(content) if content.startswith(_JPEG) else None
    if size and size[0] * size[1] < 2**28:  # OpenCV refuses very large ones
        found = _read(content, size)
        if found:
            return found
    return _read(content, None)


def what_is_wrong(content: bytes) -> str:
    """Say why training cannot read an image."""
    if not content:
        return 'is empty'
    if _STARTS.match(content):
        return 'is damaged or not complete: OpenCV does not read it'
    return f'{len(content)} bytes that are no image for OpenCV'


def look_of(content: bytes, picture: Picture) -> bytes:
    """Return a perceptual hash (8 bytes) and a grey thumbnail of an image."""
    import imagehash

    small = min(picture.pixels.shape[:2]) < 2 * _THUMB
    pixels = _decode(content) if small else picture.pixels
    grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    code = np.packbits(imagehash.phash(Image.fromarray(grey)).hash).tobytes()
    thumb = cv2.resize(grey, (_THUMB, _THUMB), interpolation=cv2.INTER_AREA)
    return code + thumb.tobytes()
