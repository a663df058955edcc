"""Generated VOC data sets with damages, and what mmdet makes of data."""

import io
import os
import random
import shutil
import xml.etree.ElementTree as ET

import cv2
import numpy as np
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from PIL import Image

import rambo_det  # noqa: F401 - explains some errors of XMLDataset

CLASSES = ('cat', 'red cell', 'dog')
LISTS = ('train', 'val', 'test')
_CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')


def encoded(rng, size, suffix='JPEG', turn=0, **options):
    """Return an image file; ``turn`` is its EXIF orientation."""
    coarse = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (3, 4, 3))
    picture = Image.fromarray(cv2.resize(coarse.astype(np.uint8), size))
    exif = picture.getexif()
    if turn:
        exif[0x0112] = turn
    file = io.BytesIO()
    picture.save(file, suffix, exif=exif, **options)
    return file.getvalue()


def annotation(objects, size):
    """Return VOC's XML for names and boxes."""
    rows = ''.join(
        f'<object><name>{name}</name><difficult>0</difficult><bndbox>'
        + ''.join(f'<{key}>{value}</{key}>' for key, value in zip(_CORNERS, box))
        + '</bndbox></object>'
        for name, box in objects
    )
    size = f'<width>{size[0]}</width><height>{size[1]}</height>'
    return f'<annotation><size>{size}</size>\n{rows}</annotation>'.encode()


def write(root, names_of_lists, rng, images='JPEGImages', annotations='Annotations'):
    """Write a data set in which nothing is wrong; each image has all classes."""
    for names in names_of_lists.values():
        for name in names:
            size = rng.randrange(30, 60), rng.randrange(30, 60)
            boxes = [(1 + 3 * i, 2, 12 + 3 * i, 14 + i) for i in range(3)]
            for folder, end, content in (
                (images, 'jpg', encoded(rng, size)),
                (annotations, 'xml', annotation([*zip(CLASSES, boxes)], size)),
            ):
                path = root / folder / f'{name}.{end}'
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    (root / 'ImageSets/Main').mkdir(parents=True)
    for stem, names in names_of_lists.items():
        text = ''.join(f'{name}\n' for name in names)
        (root / f'ImageSets/Main/{stem}.txt').write_text(text)


def _sub(old, new):
    return lambda rng, content: content.replace(old, new, rng.choice((1, 1, 9)))


def _cut(rng, content):
    return content[: rng.randrange(len(content))]


def _flip(rng, content):
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 30))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _number(rng, content):
    value = rng.choice(['0', '-5', '7.6', '500', 'nan', '1e9', '', ' 9 ', '4,5', 'x'])
    return content.replace(b'<xmax>', f'<xmax>{value}</xmax><was>'.encode(), 1).replace(
        b'</xmax>\n', b'</was>', 1
    )


XMLS = [
    _cut,
    _flip,
    _number,
    *(
        _sub(old, new)
        for old, new in [
            (b'<annotation>', b'\n<?xml version="1.0"?><annotation>'),
            (b'<annotation>', b'<?xml version="1.0" encoding="GBK"?><annotation>'),
            (b'<annotation>', b'<annotation><path>a & b \xe9\x00</path>'),
            (b'<annotation>', b'<annotation xmlns="urn:voc">'),
            (b'<annotation>', b'<annotation><!-- caf\xe9 -->'),
            (b'</annotation>', b'</annotation>\n\x00junk <b>'),
            (b'<object>', b'<Object>'),
            (b'object>', b'item>'),
            (b'bndbox>', b'robndbox>'),
            (b'<name>cat', b'<name> Cat'),
            (b'<name>cat', b'<name>cart'),
            (b'<name>cat</name>', b'<name/>'),
            (b'<name>cat</name>', b''),
            (b'<difficult>0', b'<difficult>true'),
            (b'<difficult>0', b'<difficult>1.0'),
            (b'<difficult>0', b'<difficult>'),
            (b'<bndbox>', b'<bndbox><xmin>3</xmin></bndbox><bndbox>'),
            (b'<bndbox>', b'<bndbox/><bndbox>'),
            (b'<size>', b'<size><width>9</width><height>9</height></size><size>'),
            (b'<size>', b'<size/><size>'),
            (b'<width>', b'<width>1'),
            (b'<xmin>', b'<xmin>1'),
            (b'<xmin>', b'<xmin>-'),
            (b'<ymax>', b'<ymax>99'),
            (b'</xmax>', b'.7</xmax>'),
            (b'<xmax>12', b'<xmax>1'),
        ]
    ),
    lambda rng, content: content.decode('latin-1').encode('utf-16'),
    lambda rng, content: b'\xef\xbb\xbf' + content,
    lambda rng, content: b'<a>' + content + b'</a>',
    lambda rng, content: b'<annotation><filename>x</filename></annotation>',
    lambda rng, content: b'',
]
IMAGES = [
    _cut,
    _cut,
    _flip,
    lambda rng, content: content + b'\0\xff\xd9junk',
    lambda rng, content: b'',
    lambda rng, content: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n',
    lambda rng, content: b'GIF89a' + content,
    *(
        lambda rng, content, kind=kind: encoded(rng, (40, 50), kind)
        for kind in ('PNG', 'BMP', 'WEBP', 'TIFF', 'GIF', 'ICO')
    ),
    *(
        lambda rng, content, kind=kind: encoded(
            rng, (48, 36), kind, turn=rng.randrange(2, 9)
        )
        for kind in ('JPEG', 'JPEG', 'PNG', 'TIFF', 'WEBP')
    ),
]
LINES = [
    lambda rng, line: f'{line}.jpg',
    lambda rng, line: f' {line}\t',
    lambda rng, line: f'"{line}"',
    lambda rng, line: f'JPEGImages/{line}',
    lambda rng, line: f'C:\\data\\JPEGImages\\{line}.JPG',
    lambda rng, line: f'./Annotations/{line}.xml',
    lambda rng, line: f'{line},1',
    lambda rng, line: f'{line}  1',
    lambda rng, line: line.upper(),
    lambda rng, line: f'{line}\n',
    lambda rng, line: f'{line}\n{line}',
    lambda rng, line: f'{line}\r',
    lambda rng, line: f'\ufeff{line}',
    lambda rng, line: f'{line}\n../../{line}',
    lambda rng, line: f'{line}\n{" " * 20000}',
    lambda rng, line: f'{line}\nnowhere',
    lambda rng, line: f'../JPEGImages/{line}',
    lambda rng, line: '\n'.join([line, 'test1']),
]


def _change(path, rng, damages):
    path.write_bytes(rng.choice(damages)(rng, path.read_bytes()))


def _files(root, rng):
    """Damage where files are: suffixes, links, pipes, folders."""
    path = rng.choice(sorted((root / 'JPEGImages').glob('*.*')))
    other = root / 'Annotations' / f'{path.stem}.xml'
    kind = rng.randrange(9)
    if kind == 0:
        path.rename(path.with_suffix(rng.choice(['.JPG', '.png', '.jpeg'])))
    elif kind == 1:
        path.unlink()
    elif kind == 2 and other.is_file():
        other.unlink()
    elif kind == 3 and other.is_file():
        other.rename(other.with_suffix('.XML'))
    elif kind == 4:
        for name in 'ab':
            (root / 'JPEGImages' / name).symlink_to(root, target_is_directory=True)
    elif kind == 5:
        path.unlink()
        os.mkfifo(path)
    elif kind == 6:
        path.rename(root / 'picture')
        path.symlink_to(root / 'picture')
    elif kind == 7:
        target = root / 'JPEGImages' / f'{path.stem}\udce9.jpg'
        path.rename(target)
    elif path.stem != 'test1':
        shutil.copy(path, root / 'JPEGImages' / f'test1{path.suffix}')


def damage(root, rng):
    """Damage a data set in a few ways."""
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        kind = rng.randrange(5)
        if kind == 0:
            path = root / f'ImageSets/Main/{rng.choice(LISTS)}.txt'
            lines = path.read_text('utf-8', 'surrogateescape').split('\n')
            place = rng.randrange(len(lines))
            lines[place] = rng.choice(LINES)(rng, lines[place])
            encoding = rng.choice(['utf-8', 'utf-8', 'utf-16', 'utf-8-sig'])
            path.write_bytes('\n'.join(lines).encode(encoding, 'surrogatepass'))
            break  # lists are no text any more
        if kind == 1:
            _files(root, rng)
            continue
        folder, damages = rng.choice([('Annotations', XMLS), ('JPEGImages', IMAGES)])
        paths = [p for p in sorted((root / folder).glob('*.*')) if p.is_file()]
        _change(rng.choice(paths), rng, damages)


def data_set(root, stem, images='JPEGImages', annotations='Annotations'):
    """Return mmdet's data set of a list, with all images that it names."""
    register_all_modules()
    return DATASETS.build(
        dict(
            type='XMLDataset',
            data_root=str(root),
            ann_file=f'ImageSets/Main/{stem}.txt',
            data_prefix=dict(sub_data_root=''),
            img_subdir=images,
            ann_subdir=annotations,
            metainfo=dict(classes=CLASSES),
            filter_cfg=dict(filter_empty_gt=False),
            serialize_data=False,  # which collects garbage, slowly
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True),
                dict(type='Resize', scale_factor=1.0),
                dict(type='PackDetInputs'),
            ],
        )
    )


def assert_trains(root, lists=LISTS, **folders):
    """Check that mmdet loads each image, and every object of its XML, with an area."""
    for stem in lists:
        data = data_set(root, stem, **folders)
        for index in range(len(data)):
            info, sample = data.get_data_info(index), data[index]['data_samples']
            assert sample.ori_shape == (info['height'], info['width'])
            boxes, labels = [], []
            for part in (sample.gt_instances, sample.ignored_instances):
                boxes += part.bboxes.tensor.tolist()
                labels += part.labels.tolist()
            assert all(x0 < x1 and y0 < y1 for x0, y0, x1, y1 in boxes), info
            assert all(label in range(len(CLASSES)) for label in labels)
            objects = [*ET.parse(info['xml_path']).iter('object')]
            assert len(boxes) == len(objects), info


def generate(root, seed):
    """Write a damaged data set; returns mmdet's arguments for its folders."""
    rng = random.Random(seed)
    names = {stem: [f'{stem}{i}' for i in range(3)] for stem in LISTS}
    write(root, names, rng)
    damage(root, rng)
    kind = rng.randrange(6)
    if kind == 0:  # as many call them
        (root / 'JPEGImages').rename(root / 'images')
        (root / 'Annotations').rename(root / 'annotations')
        return dict(images='images', annotations='annotations')
    if kind == 1:  # XML beside the images
        for path in [*(root / 'Annotations').iterdir()]:
            path.rename(root / 'JPEGImages' / path.name)
        (root / 'Annotations').rmdir()
        return dict(annotations='JPEGImages')
    return {}
