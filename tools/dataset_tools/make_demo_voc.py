"""Write a small generated detection data set in PASCAL VOC layout.

Six shapes of any colour, texture, size and rotation lie on noisy gradients,
partly over each other and among marks that look alike and are no objects.
The rarest class has a tenth of the objects of the most frequent one, and tiny
or mostly hidden objects are marked ``difficult``.

    python tools/dataset_tools/make_demo_voc.py --out data/demo_voc

The same arguments give the same files, byte for byte: the pictures are made
of NumPy's seeded generator, of additions, multiplications and comparisons
(no library's sine or power enters), and of baseline JPEG compression.

``--coco`` adds the same annotations in COCO format, with the visible pixels of
every object as its mask, for detectors that need masks and for CocoMetric.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import cv2
import numpy as np

from tools.common.wrong_calls import Parser, writable_folder

VERSION = 1
MANIFEST = 'demo_voc.json'
COCO = 'coco'  # not Annotations: some file systems do not tell cases apart
SPLITS = ('trainval', 'test')
# Objects per class in a round of 36. Labels are dealt from a shuffled round
# after the other, so that a small data set has every class as well.
ROUND = dict(disc=10, square=9, triangle=7, cross=5, ring=4, star=1)
CLASSES = tuple(ROUND)

_SUBPIXELS = 3
_MIN_SIDE = 64
_MIN_VISIBLE = 0.35  # an object is never hidden further than this
_DIFFICULT_VISIBLE = 0.6
_DIFFICULT_SIDE = 14  # pixels of an image 128 pixels high

Mask = np.ndarray
Shape = Callable[[np.ndarray, np.ndarray], Mask]


def _lines_above(u: np.ndarray, v: np.ndarray, corners: int, distance: float) -> Mask:
    """Counts the lines, around the centre, on whose inner side a point is."""
    count = np.zeros(u.shape, dtype=np.int64)
    for k in range(corners):
        angle = 2 * math.pi * k / corners
        # Rounded, because the last bits of a sine differ between platforms.
        x, y = round(math.sin(angle), 6), round(math.cos(angle), 6)
        count += u * x + v * y <= distance
    return count


# A shape says which points of the plane, in units of its radius, are its own.
_OBJECTS: dict[str, Shape] = dict(
    disc=lambda u, v: u * u + v * v <= 0.8,
    square=lambda u, v: np.maximum(abs(u), abs(v)) <= 0.75,
    triangle=lambda u, v: _lines_above(u, v, 3, 0.5) == 3,
    cross=lambda u, v: (
        (np.minimum(abs(u), abs(v)) <= 0.25) & (np.maximum(abs(u), abs(v)) <= 0.9)
    ),
    ring=lambda u, v: (u * u + v * v <= 0.9) & (u * u + v * v >= 0.35),
    # A pentagram: inside all of its five lines but one.
    star=lambda u, v: _lines_above(u, v, 5, 0.309) >= 4,
)
_CLUTTER: dict[str, Shape] = dict(
    bar=lambda u, v: (abs(u) <= 1) & (abs(v) <= 0.12),
    half_disc=lambda u, v: (u * u + v * v <= 0.8) & (v <= 0),
    corner=lambda u, v: (
        (np.maximum(abs(u), abs(v)) <= 0.8) & (np.minimum(u, v) <= -0.35)
    ),
    arc=lambda u, v: (u * u + v * v <= 0.9) & (u * u + v * v >= 0.5) & (u + v <= 0),
)


@dataclass(frozen=True)
class SceneObject:
    """An object as it is seen in the image.

    Attributes:
        name: The class.
        mask: Its visible pixels, shape (height, width), bool.
        box: The box around them, ``(xmin, ymin, xmax, ymax)`` as VOC counts:
            1-based, both ends inside the box.
        truncated: Whether a part is outside the image.
        occluded: Whether a part is behind something else.
        difficult: Whether it is so small or hidden that the evaluation
            ignores it.
    """

    name: str
    mask: Mask
    box: tuple[int, int, int, int]
    truncated: bool
    occluded: bool
    difficult: bool


@dataclass(frozen=True)
class _Stamp:
    """A shape at its place: how much of each pixel it covers."""

    window: tuple[slice, slice]  # rows and columns of the image
    cover: np.ndarray  # of the pixels in the window, 0 to 1
    mask: Mask  # of the image
    area: int  # pixels, those outside the image included


def _stamp(
    shape: Shape,
    rng: np.random.Generator,
    radius: float,
    turn: int,
    size: tuple[int, int],
) -> _Stamp:
    """Puts a shape somewhere, turned by up to some degrees either way."""
    width, height = size
    # A share of the shapes sticks out of the image.
    cx = 0.4 * radius + rng.random() * (width - 0.8 * radius)
    cy = 0.4 * radius + rng.random() * (height - 0.8 * radius)
    angle = math.pi * int(rng.integers(-turn, turn + 1)) / 180
    cos, sin = round(math.cos(angle), 6), round(math.sin(angle), 6)

    left, right = math.floor(cx - radius) - 1, math.ceil(cx + radius) + 1
    top, bottom = math.floor(cy - radius) - 1, math.ceil(cy + radius) + 1
    offsets = (np.arange(_SUBPIXELS) + 0.5) / _SUBPIXELS
    x = (np.arange(left, right)[:, None] + offsets).ravel() - cx
    y = ((np.arange(top, bottom)[:, None] + offsets).ravel() - cy)[:, None]
    inside = shape((x * cos + y * sin) / radius, (y * cos - x * sin) / radius)
    patch = inside.reshape(bottom - top, _SUBPIXELS, right - left, _SUBPIXELS)
    patch = patch.sum(axis=(1, 3)) / _SUBPIXELS**2

    x0, x1, y0, y1 = max(left, 0), min(right, width), max(top, 0), min(bottom, height)
    cover = patch[y0 - top : y1 - top, x0 - left : x1 - left]
    window = (slice(y0, y1), slice(x0, x1))
    mask = np.zeros((height, width), dtype=bool)
    mask[window] = cover >= 0.5
    return _Stamp(window, cover, mask, int((patch >= 0.5).sum()))


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Draws a smooth field between 3 x 3 random colours."""
    width, height = size
    base = rng.integers(50, 206, size=3)
    knots = base + rng.integers(-45, 46, size=(3, 3, 3)).astype(float)

    def weights(length: int) -> np.ndarray:
        position = np.arange(length)[:, None] * 2 / (length - 1)
        return np.maximum(0, 1 - abs(position - np.arange(3)))

    rows = (weights(height)[:, :, None, None] * knots).sum(axis=1)
    return (rows[:, None] * weights(width)[None, :, :, None]).sum(axis=2)


def _paint(image: np.ndarray, stamp: _Stamp, rng: np.random.Generator) -> None:
    """Fills a shape with a plain, striped or speckled colour that stands out."""
    part = image[stamp.window]
    cover = stamp.cover[..., None]
    height, width = stamp.cover.shape
    behind = (part * cover).sum(axis=(0, 1)) / max(cover.sum(), 1)
    while True:
        colour = rng.integers(0, 256, size=3)
        if abs(colour - behind).sum() >= 150:
            break
    other = colour + rng.integers(-50, 51, size=3)
    texture = rng.integers(3)
    if texture == 0:
        second = np.zeros((height, width), dtype=bool)
    elif texture == 1:
        dx, dy = rng.integers(-2, 3, size=2)
        second = (np.arange(width) * dx + np.arange(height)[:, None] * dy) % 8 < 4
    else:
        second = rng.random((height, width)) < 0.3
    part += cover * (np.where(second[..., None], other, colour) - part)


def draw_scene(
    rng: np.random.Generator, names: Sequence[str], size: tuple[int, int]
) -> tuple[np.ndarray, list[SceneObject]]:
    """Draws one image.

    Args:
        rng: The source of all chance.
        names: The classes of the objects, from the rearmost to the foremost.
            One that finds no place without hiding another is left out.
        size: Width and height in pixels.

    Returns:
        The image, RGB, uint8, shape (height, width, 3), and its objects.
    """
    unit = min(size) / 128
    image = _background(rng, size)
    clutter = list(_CLUTTER.values())
    for _ in range(rng.integers(1, 6)):
        shape = clutter[rng.integers(len(clutter))]
        stamp = _stamp(shape, rng, unit * (6 + 14 * rng.random()), 180, size)
        _paint(image, stamp, rng)

    placed: list[tuple[str, _Stamp, Mask]] = []
    for name in names:
        for _ in range(30):
            radius = unit * (10 + 18 * rng.random())
            stamp = _stamp(_OBJECTS[name], rng, radius, 25, size)
            left = [mask & ~stamp.mask for _, _, mask in placed]
            if stamp.mask.sum() >= _MIN_VISIBLE * stamp.area and all(
                mask.sum() >= _MIN_VISIBLE * below.area
                for mask, (_, below, _) in zip(left, placed)
            ):
                placed = [(n, s, mask) for mask, (n, s, _) in zip(left, placed)]
                placed.append((name, stamp, stamp.mask))
                _paint(image, stamp, rng)
                break

    image = image + rng.integers(-10, 11, size=image.shape)
    image = np.rint(image).clip(0, 255).astype(np.uint8)

    objects = []
    for name, stamp, mask in placed:
        ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (int(xs[0]) + 1, int(ys[0]) + 1, int(xs[-1]) + 1, int(ys[-1]) + 1)
        side = min(box[2] - box[0], box[3] - box[1]) + 1
        inside = int(stamp.mask.sum())
        visible = int(mask.sum())
        objects.append(
            SceneObject(
                name=name,
                mask=mask,
                box=box,
                truncated=inside < stamp.area,
                occluded=visible < inside,
                difficult=bool(
                    side < _DIFFICULT_SIDE * unit
                    or visible < _DIFFICULT_VISIBLE * stamp.area
                ),
            )
        )
    return image, objects


def iter_scenes(
    split: str, count: int, size: tuple[int, int], seed: int
) -> Iterator[tuple[np.ndarray, list[SceneObject]]]:
    """Draws the images of one split, one after the other.

    The first images of a split do not depend on how many follow.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    stack: list[str] = []
    for _ in range(count):
        number = int(rng.integers(1, 6))
        if len(stack) < number:
            labels = [name for name, many in ROUND.items() for _ in range(many)]
            stack += [labels[i] for i in rng.permutation(len(labels))]
        names, stack = stack[:number], stack[number:]
        yield draw_scene(rng, names, size)


def _annotation(name: str, size: tuple[int, int], objects: list[SceneObject]) -> str:
    """Writes an image's objects in VOC's XML."""
    lines = [
        '<annotation>',
        '\t<folder>demo_voc</folder>',
        f'\t<filename>{name}.jpg</filename>',
        '\t<source><database>generated shapes</database></source>',
        f'\t<size><width>{size[0]}</width><height>{size[1]}</height>'
        '<depth>3</depth></size>',
        '\t<segmented>0</segmented>',
    ]
    for obj in objects:
        xmin, ymin, xmax, ymax = obj.box
        lines += [
            '\t<object>',
            f'\t\t<name>{obj.name}</name>',
            '\t\t<pose>Unspecified</pose>',
            f'\t\t<truncated>{obj.truncated:d}</truncated>',
            f'\t\t<occluded>{obj.occluded:d}</occluded>',
            f'\t\t<difficult>{obj.difficult:d}</difficult>',
            f'\t\t<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin>'
            f'<xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>',
            '\t</object>',
        ]
    return '\n'.join([*lines, '</annotation>', ''])


def _write_split(
    root: Path, split: str, first: int, count: int, size: tuple[int, int], seed: int
) -> None:
    """Writes the images, annotations and lists of one split."""
    lists: dict[str, list[str]] = {split: []}
    lists.update({f'{name}_{split}': [] for name in CLASSES})
    for index, (image, objects) in enumerate(iter_scenes(split, count, size, seed)):
        name = f'{first + index:06d}'
        ok, jpeg = cv2.imencode(
            '.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]
        )
        if not ok:
            raise RuntimeError(f'OpenCV could not compress image {name} to JPEG')
        (root / 'JPEGImages' / f'{name}.jpg').write_bytes(jpeg.tobytes())
        xml = _annotation(name, size, objects)
        (root / 'Annotations' / f'{name}.xml').write_bytes(xml.encode())
        lists[split].append(name)
        for label in CLASSES:
            # VOC's flags: present 1, present but difficult only 0, absent -1.
            here = [obj.difficult for obj in objects if obj.name == label]
            flag = -1 if not here else 0 if all(here) else 1
            lists[f'{label}_{split}'].append(f'{name} {flag:2d}')
    for stem, lines in lists.items():
        path = root / 'ImageSets' / 'Main' / f'{stem}.txt'
        path.write_bytes(''.join(f'{line}\n' for line in lines).encode())


def generate(
    out: str | Path,
    train: int = 2000,
    test: int = 300,
    size: tuple[int, int] = (160, 128),
    seed: int = 0,
) -> bool:
    """Writes the data set, unless it is already there.

    The folder appears when it is complete, so that a run that was stopped
    leaves nothing that could be mistaken for the data.

    Args:
        out: The folder that gets ``Annotations``, ``JPEGImages`` and
            ``ImageSets``. It must not exist, be empty, or hold this data set.
        train: Number of images in ``trainval``.
        test: Number of images in ``test``.
        size: Width and height of the images in pixels.
        seed: Another seed gives other images.

    Returns:
        Whether anything was written.

    Raises:
        ValueError: If a number is out of range.
        FileExistsError: If ``out`` holds something else.
    """
    for name, value in dict(train=train, test=test).items():
        if value < 1:
            raise ValueError(f'{name} must be at least 1 image, got {value}')
    if seed < 0:
        raise ValueError(f'seed must be 0 or more, got {seed}')
    if len(size) != 2 or min(size) < _MIN_SIDE:
        raise ValueError(
            f'size must be a width and a height of at least {_MIN_SIDE} pixels, '
            f'got {tuple(size)}'
        )
    out = Path(out)
    settings = dict(version=VERSION, train=train, test=test, size=list(size), seed=seed)
    manifest = out / MANIFEST
    if manifest.is_file() and json.loads(manifest.read_text()) == settings:
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = manifest.read_text() if manifest.is_file() else 'other files'
        raise FileExistsError(
            f'{out} exists and holds {found.strip()}, not the data set asked for '
            f'({json.dumps(settings)}); delete it or choose another folder'
        )

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=out.parent, prefix=f'{out.name}.part'
    ) as folder:
        root = Path(folder) / 'data'
        for part in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
            (root / part).mkdir(parents=True)
        _write_split(root, 'trainval', 1, train, size, seed)
        _write_split(root, 'test', train + 1, test, size, seed)
        (root / MANIFEST).write_text(json.dumps(settings) + '\n')
        if out.exists():
            out.rmdir()
        shutil.move(root, out)
    return True


def write_coco(root: str | Path) -> list[Path]:
    """Writes the annotations of a generated data set in COCO format.

    Difficult objects become crowds, which evaluation ignores, as mmdet's converter
    has it. Boxes hold whole pixels: their width is that of VOC's, both ends counted.

    Args:
        root: The folder that :func:`generate` wrote.

    Returns:
        The files ``coco/trainval.json`` and ``coco/test.json`` in it.

    Raises:
        FileNotFoundError: If ``root`` holds no generated data set.
    """
    # Imported here: nothing else in this file needs it.
    from pycocotools import mask as rle

    root = Path(root)
    manifest = root / MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(
            f'{root} holds no generated data set: {manifest.name} is not there; '
            'write it first, with --out alone'
        )
    settings = json.loads(manifest.read_text())
    width, height = settings['size']
    (root / COCO).mkdir(exist_ok=True)
    paths, first = [], 1
    for split, count in zip(SPLITS, (settings['train'], settings['test'])):
        images, annotations = [], []
        scenes = iter_scenes(split, count, (width, height), settings['seed'])
        for number, (_, objects) in enumerate(scenes, start=first):
            file = f'JPEGImages/{number:06d}.jpg'
            images.append(dict(id=number, file_name=file, width=width, height=height))
            for obj in objects:
                mask = rle.encode(np.asfortranarray(obj.mask, dtype=np.uint8))
                x0, y0, x1, y1 = obj.box
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=number,
                        category_id=CLASSES.index(obj.name) + 1,
                        bbox=[x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
                        area=int(obj.mask.sum()),
                        iscrowd=int(obj.difficult),
                        segmentation=dict(
                            size=[height, width], counts=mask['counts'].decode()
                        ),
                    )
                )
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
        content = dict(images=images, annotations=annotations, categories=categories)
        paths.append(root / COCO / f'{split}.json')
        paths[-1].write_text(json.dumps(content) + '\n')
        first += count
    return paths


def digest(root: str | Path) -> str:
    """Hashes all files of a folder, names and contents, with SHA-256."""
    root = Path(root)
    state = hashlib.sha256()
    for path in sorted(p for p in root.rglob('*') if p.is_file()):
        state.update(os.fsencode(f'{path.relative_to(root).as_posix()}\n'))
        state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--out', type=writable_folder, required=True, help='folder to write'
    )
    parser.add_argument('--train', type=int, default=2000, help='training images')
    parser.add_argument('--test', type=int, default=300, help='test images')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(160, 128), metavar=('WIDTH', 'HEIGHT')
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--coco', action='store_true', help=f'also write {COCO}/, with masks'
    )
    args = parser.parse_args(argv)
    with parser.refusing():
        written = generate(args.out, args.train, args.test, tuple(args.size), args.seed)
        if args.coco:
            write_coco(args.out)
    state = 'written to' if written else 'already in'
    print(f'{args.train} + {args.test} images {state} {args.out}')
    print(f'SHA-256 of the folder: {digest(args.out)}')


if __name__ == '__main__':
    main()
