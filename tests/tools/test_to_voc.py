"""Data of any usual layout becomes VOC's, with splits that share no source."""

import json

import numpy as np
import pytest
from PIL import Image

from tools.dataset_tools import check_voc, to_voc
from tools.dataset_tools.make_demo_voc import digest
from tools.dataset_tools.voc_lists import read_lines

BOXES = [('cat', (2, 3, 20, 25)), ('dog', (5, 5, 15, 12))]


def image(path, number=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def xml(path, objects=BOXES, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = ''.join(
        f'<object><name>{name}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>'
        f'<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>'
        for name, box in objects
    )
    size = f'<size><width>{size[0]}</width><height>{size[1]}</height></size>'
    path.write_text(f'<annotation>{size}{tags}</annotation>')


def coco(path, names, start=0):
    """Two boxes each, as ``BOXES`` has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [dict(id=i, file_name=name) for i, name in enumerate(names, start)]
    annotations = [
        dict(
            id=2 * entry['id'] + category,
            image_id=entry['id'],
            category_id=category + 7,
            bbox=[x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
            iscrowd=0,
        )
        for entry in images
        for category, (_, (x0, y0, x1, y1)) in enumerate(BOXES)
    ]
    categories = [dict(id=7, name='cat'), dict(id=8, name='dog'), dict(id=9, name='x')]
    content = dict(images=images, annotations=annotations, categories=categories)
    path.write_text(json.dumps(content))


def images_and_annotations(root):
    for i in range(10):
        image(root / f'images/p{i:03d}.jpg', i)
        xml(root / f'annotations/p{i:03d}.xml')


def flat(root):
    for i in range(10):
        image(root / f'{i}.png', i)
        xml(root / f'{i}.xml')


def voc_without_lists(root):
    for i in range(10):
        image(root / f'JPEGImages/{i}.JPG', i, format='JPEG')
        xml(root / f'Annotations/{i}.xml')


def coco_in_one(root):
    for i in range(10):
        image(root / f'images/{i}.jpg', i)
    coco(root / 'labels.json', [f'{i}.jpg' for i in range(10)])


def coco_of_two(root):
    """As COCO itself has it; both splits count from 0."""
    for split, first, count in (('train', 0, 7), ('val', 7, 3)):
        for i in range(count):
            image(root / f'images/{split}2017/{i:06d}.jpg', first + i)
        names = [f'{i:06d}.jpg' for i in range(count)]
        coco(root / f'annotations/instances_{split}2017.json', names)


def roboflow(root):
    for split, first, count in (('train', 0, 6), ('valid', 6, 2), ('test', 8, 2)):
        names = [f'{split[:2]}{i}_jpg.rf.{i:03x}a.jpg' for i in range(count)]
        for i, name in enumerate(names):
            image(root / split / name, first + i)
        coco(root / split / '_annotations.coco.json', names)


FORMATS = [
    images_and_annotations,
    flat,
    voc_without_lists,
    coco_in_one,
    coco_of_two,
    roboflow,
]


def convert(source, out, *options):
    return to_voc.main([str(source), '--out', str(out), '--jobs', '1', *options])


def splits(out):
    return {
        name: read_lines(out / f'ImageSets/Main/{name}.txt')
        for name in (*to_voc.SPLITS, 'trainval')
    }


@pytest.mark.parametrize('layout', FORMATS)
def test_every_layout_becomes_voc(layout, tmp_path, capsys):
    source, out = tmp_path / 'source', tmp_path / 'out'
    layout(source)
    before = digest(source)
    assert convert(source, out) == 0
    assert digest(source) == before
    shown = capsys.readouterr().out
    assert 'images: 10 of 10' in shown and "classes = ('cat', 'dog')" in shown
    assert check_voc.main([str(out), '--classes', 'cat', 'dog', '--jobs', '1']) == 0
    assert 'cat 10, dog 10' in capsys.readouterr().out
    found = splits(out)
    assert sorted(found['train'] + found['val']) == found['trainval']
    everything = found['trainval'] + found['test']
    assert len(set(everything)) == len(everything) == 10
    sizes = tuple(len(found[name]) for name in to_voc.SPLITS)
    assert sizes == dict(coco_of_two=(6, 1, 3), roboflow=(6, 2, 2)).get(
        layout.__name__, (7, 1, 2)
    )
    for name in everything:
        text = (out / f'Annotations/{name}.xml').read_text()
        assert '<xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>25</ymax>' in text
    assert {path.name for path in tmp_path.iterdir()} == {'source', 'out'}


def test_the_seed_decides(tmp_path, capsys):
    images_and_annotations(tmp_path / 'source')
    found = []
    for number, seed in enumerate('001'):
        convert(tmp_path / 'source', tmp_path / f'{number}', '--seed', seed)
        found.append(splits(tmp_path / f'{number}'))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    'pattern, options, several',
    [
        ('clip{}_frame_{:03d}', [], 4),
        ('video{}-{:06d}', [], 4),
        ('v{}/{:06d}', [], 4),  # a folder for each video
        ('a{}b_mp4-{}_jpg.rf.0{}f', [], 4),
        ('x{:02d}{}z', ['--source-of', r'^x(\d\d)'], 4),
        ('cat{}_{}', ['--source-of', 'none'], 0),
    ],
)
def test_images_of_one_source_stay_together(
    pattern, options, several, tmp_path, capsys
):
    names = [pattern.format(v, f, f) for v in range(6) for f in range(several or 1)]
    for number, name in enumerate(names):
        image(tmp_path / f'source/{name}.jpg', number)
        xml(tmp_path / f'source/{name}.xml')
    assert convert(tmp_path / 'source', tmp_path / 'out', *options) == 0
    sizes = [len(splits(tmp_path / 'out')[name]) for name in to_voc.SPLITS]
    assert min(sizes) > 0
    if several:
        assert [size % several for size in sizes] == [0, 0, 0]
        assert 'of images: 6' in capsys.readouterr().out


def test_copies_stay_together_whatever_they_are_called(tmp_path, capsys):
    source = tmp_path / 'source'
    for number, name in enumerate('abcdefgh'):
        image(source / f'{name}.jpg', number // 2)  # pairs of identical files
        xml(source / f'{name}.xml')
    assert convert(source, tmp_path / 'out') == 0
    for names in splits(tmp_path / 'out').values():
        assert all(len({*pair} & {*names}) in (0, 2) for pair in ('ab', 'cd', 'ef'))


def test_a_class_is_no_source_and_a_rare_one_is_in_all_splits(tmp_path, capsys):
    source = tmp_path / 'source'
    for number in range(30):
        name = 'dog' if number < 3 else 'cat' if number < 15 else 'cow'
        image(source / f'{name}_{number:02d}.jpg', number)
        xml(source / f'{name}_{number:02d}.xml', [(name, (2, 2, 20, 20))])
    assert convert(source, tmp_path / 'out') == 0  # no class is empty
    assert 'names tell none' in capsys.readouterr().out


def test_splits_of_the_source_that_share_a_source_are_reported(tmp_path, capsys):
    for split, first, count in (('train', 0, 5), ('valid', 5, 1), ('test', 6, 2)):
        for i in range(count):
            name = f'{split}/p{i}_jpg.rf.{split}{i}'
            image(tmp_path / f'source/{name}.jpg', first + i)
            xml(tmp_path / f'source/{name}.xml')
    assert convert(tmp_path / 'source', tmp_path / 'told') == 1  # splits-copies
    assert (
        '3 images of train and val have their source in test' in capsys.readouterr().out
    )
    assert convert(tmp_path / 'source', tmp_path / 'drawn', '--resplit') == 0
    for names in splits(tmp_path / 'drawn').values():
        assert sum(name.startswith('p0_') for name in names) in (0, 3)


def test_what_is_left_out_is_reported(tmp_path, capsys):
    source = tmp_path / 'source'
    flat(source)
    image(source / 'alone.jpg', 98)
    image(source / 'bad.jpg', 99)
    (source / 'bad.xml').write_text('<annotation><obj')
    (source / 'empty.jpg').touch()
    xml(source / 'empty.xml')
    xml(source / 'lonely.xml')
    xml(source / '3.xml', [*BOXES, ('cat', (5, 5, 5, 9)), ('Cat ', (1, 1, 9, 9))])
    (source / 'notes.txt').touch()
    (source / 'loop').symlink_to(source)
    assert convert(source, tmp_path / 'out', '--classes', 'cat', 'dog') == 0
    lines = (tmp_path / 'out' / to_voc.OWN_REPORT).read_text().splitlines()
    assert lines[0] == 'images: 10 of 13'
    for words in (
        'alone.jpg: no annotation',
        'bad.xml: is no readable XML',
        'empty.jpg: image-unreadable: is empty: taken out',
        'lonely.xml: no image of this name',
        '3.xml: box-zero-area: cat (5, 5, 5, 9): dropped',
        "3.xml: class-unknown: 'Cat ', 1 times: renamed 'cat'",
        'notes.txt: no image, XML or JSON',
        'loop: a link to a folder',
    ):
        assert sum(words in line for line in lines) == 1, words
    assert convert(source, tmp_path / 'more', '--background') == 1  # 'Cat ' is a class
    shown = capsys.readouterr().out
    assert "'Cat ' and 'cat' look like one class" in shown
    assert 'images: 12 of 13' in shown


@pytest.mark.parametrize(
    'source, out, message',
    [
        ('data', 'full', 'full exists and is not empty'),
        ('data', 'data/new', 'new is inside'),
        ('gone', 'new', 'SOURCE must be a folder or a file'),
        ('full', 'new', 'expected 3 or more images with an annotation'),
    ],
)
def test_what_cannot_be_done_leaves_everything_alone(
    source, out, message, tmp_path, capsys
):
    flat(tmp_path / 'data')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/other.json').write_text('[]')
    before = digest(tmp_path)
    with pytest.raises(SystemExit, match='2'):
        convert(tmp_path / source, tmp_path / out)
    assert message in capsys.readouterr().err
    assert digest(tmp_path) == before
