"""Tests of the generated demo data set."""

from __future__ import annotations

import hashlib
from collections import Counter
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from tools.dataset_tools import make_demo_voc

TRAIN, TEST, SIZE = 40, 24, (128, 96)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('demo') / 'voc'
    assert make_demo_voc.generate(root, TRAIN, TEST, SIZE, seed=3)
    return root


def _ids(root, split):
    return (root / 'ImageSets' / 'Main' / f'{split}.txt').read_text().split()


def _objects(root, name):
    tree = ElementTree.parse(root / 'Annotations' / f'{name}.xml')
    return tree.getroot().findall('object')


def test_same_arguments_give_the_same_bytes(data, tmp_path):
    make_demo_voc.generate(tmp_path / 'again', TRAIN, TEST, SIZE, seed=3)
    make_demo_voc.generate(tmp_path / 'other', TRAIN, TEST, SIZE, seed=4)
    assert make_demo_voc.digest(tmp_path / 'again') == make_demo_voc.digest(data)
    assert make_demo_voc.digest(tmp_path / 'other') != make_demo_voc.digest(data)


def test_the_default_scenes_are_those_of_this_version():
    """Elsewhere too; where this fails on purpose, VERSION has to grow.

    Before compression, since another JPEG library may round in another way.
    """
    state = hashlib.sha256()
    for split in make_demo_voc.SPLITS:
        for image, objects in make_demo_voc.iter_scenes(split, 20, (160, 128), 0):
            state.update(image.tobytes())
            for obj in objects:
                state.update(repr((obj.name, obj.box, obj.difficult)).encode())
    assert make_demo_voc.VERSION == 1
    assert state.hexdigest() == (
        'a9343d4cd162c9967eb23218de064d95f4a85836257466ce5d5913c14ac24839'
    )


def test_scenes_do_not_depend_on_how_many_follow():
    few = list(make_demo_voc.iter_scenes('test', 2, SIZE, 0))
    more = list(make_demo_voc.iter_scenes('test', 5, SIZE, 0))
    for (image, _), (same, _) in zip(few, more):
        assert np.array_equal(image, same)


def test_splits_are_disjoint_and_complete(data):
    train, test = _ids(data, 'trainval'), _ids(data, 'test')
    assert (len(train), len(test)) == (TRAIN, TEST)
    everything = sorted(train + test)
    assert len(set(everything)) == TRAIN + TEST
    assert everything == sorted(p.stem for p in (data / 'JPEGImages').iterdir())
    assert everything == sorted(p.stem for p in (data / 'Annotations').iterdir())
    image = cv2.imread(str(data / 'JPEGImages' / f'{test[0]}.jpg'))
    assert image.shape == (SIZE[1], SIZE[0], 3)


def test_splits_hold_different_images(data):
    first = data / 'JPEGImages' / f'{_ids(data, "trainval")[0]}.jpg'
    second = data / 'JPEGImages' / f'{_ids(data, "test")[0]}.jpg'
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize('split', ['trainval', 'test'])
def test_every_class_occurs_and_the_rarest_is_rare(data, split):
    counts = Counter(
        node.findtext('name')
        for name in _ids(data, split)
        for node in _objects(data, name)
    )
    assert set(counts) == set(make_demo_voc.CLASSES)
    assert counts['disc'] >= 5 * counts['star']


def test_some_objects_are_difficult_truncated_or_occluded():
    scenes = make_demo_voc.iter_scenes('trainval', 200, (192, 160), 0)
    objects = [obj for _, objs in scenes for obj in objs]
    for flag, low, high in (
        ('difficult', 0.02, 0.2),
        ('truncated', 0.05, 0.4),
        ('occluded', 0.03, 0.4),
    ):
        share = np.mean([getattr(obj, flag) for obj in objects])
        assert low < share < high, (flag, share)


def test_boxes_are_the_bounds_of_the_visible_masks():
    for image, objects in make_demo_voc.iter_scenes('test', 30, SIZE, 1):
        hidden = np.zeros(image.shape[:2], dtype=int)
        for obj in objects:
            ys, xs = np.nonzero(obj.mask)
            x0, y0, x1, y1 = obj.box
            assert (x0, y0, x1, y1) == (
                *(xs.min() + 1, ys.min() + 1),
                *(xs.max() + 1, ys.max() + 1),
            )
            assert 1 <= x0 < x1 <= SIZE[0] and 1 <= y0 < y1 <= SIZE[1]
            hidden += obj.mask
        assert hidden.max() <= 1, 'two objects are visible at the same pixel'


def test_class_lists_agree_with_the_annotations(data):
    for label in make_demo_voc.CLASSES:
        path = data / 'ImageSets' / 'Main' / f'{label}_test.txt'
        flags = dict(line.split() for line in path.read_text().splitlines())
        assert list(flags) == _ids(data, 'test')
        for name, flag in flags.items():
            difficult = [
                node.findtext('difficult') == '1'
                for node in _objects(data, name)
                if node.findtext('name') == label
            ]
            expected = -1 if not difficult else 0 if all(difficult) else 1
            assert int(flag) == expected


def test_mmdet_reads_what_was_written(data):
    datasets = pytest.importorskip('mmdet.datasets', reason='needs mmdet')
    dataset = datasets.XMLDataset(
        data_root=str(data),
        ann_file='ImageSets/Main/trainval.txt',
        data_prefix=dict(sub_data_root=''),
        metainfo=dict(classes=make_demo_voc.CLASSES),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[],
    )
    scenes = list(make_demo_voc.iter_scenes('trainval', TRAIN, SIZE, 3))
    ids = _ids(data, 'trainval')
    kept = 0
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        assert (info['width'], info['height']) == SIZE
        _, objects = scenes[ids.index(info['img_id'])]
        assert len(info['instances']) == len(objects)
        for instance, obj in zip(info['instances'], objects):
            assert make_demo_voc.CLASSES[instance['bbox_label']] == obj.name
            assert instance['ignore_flag'] == int(obj.difficult)
            assert instance['bbox'] == [value - 1 for value in obj.box]
            x0, y0, x1, y1 = instance['bbox']
            assert 0 <= x0 < x1 < SIZE[0] and 0 <= y0 < y1 < SIZE[1]
        kept += 1
    assert kept == sum(1 for _, objects in scenes if objects)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(train=0), 'train must be at least 1 image, got 0'),
        (dict(test=-2), 'test must be at least 1 image, got -2'),
        (dict(seed=-1), 'seed must be 0 or more, got -1'),
        (dict(size=(192, 10)), r'size must be .* got \(192, 10\)'),
    ],
)
def test_bad_arguments_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_demo_voc.generate(tmp_path / 'voc', **change)
    assert not (tmp_path / 'voc').exists()


def test_the_same_data_are_not_written_again(data):
    before = make_demo_voc.digest(data)
    assert not make_demo_voc.generate(data, TRAIN, TEST, SIZE, seed=3)
    assert make_demo_voc.digest(data) == before


def test_other_contents_are_not_overwritten(data, tmp_path):
    before = make_demo_voc.digest(data)
    with pytest.raises(FileExistsError, match='delete it or choose another'):
        make_demo_voc.generate(data, TRAIN, TEST, SIZE, seed=5)
    assert make_demo_voc.digest(data) == before

    (tmp_path / 'precious.txt').write_text('keep me')
    with pytest.raises(FileExistsError, match='other files'):
        make_demo_voc.generate(tmp_path, TRAIN, TEST, SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ['precious.txt']


def test_an_empty_folder_is_filled_and_nothing_is_left_beside_it(tmp_path):
    (tmp_path / 'voc').mkdir()
    assert make_demo_voc.generate(tmp_path / 'voc', 1, 1, (64, 64))
    assert [path.name for path in tmp_path.iterdir()] == ['voc']


def test_command_line_explains_a_refusal(tmp_path, capsys):
    make_demo_voc.main(['--out', str(tmp_path / 'voc'), '--train', '2', '--test', '1'])
    assert '2 + 1 images written to' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='train must be at least 1'):
        make_demo_voc.main(['--out', str(tmp_path / 'new'), '--train', '0'])


def test_coco_annotations_are_those_of_voc(tmp_path):
    pytest.importorskip('pycocotools', reason='reads COCO annotations')
    from pycocotools.coco import COCO

    make_demo_voc.generate(tmp_path / 'voc', 6, 3, (128, 96), seed=3)
    before = make_demo_voc.digest(tmp_path / 'voc')
    paths = make_demo_voc.write_coco(tmp_path / 'voc')
    for split, path in zip(make_demo_voc.SPLITS, paths):
        data = COCO(str(path))
        count, first = (6, 1) if split == 'trainval' else (3, 7)
        scenes = make_demo_voc.iter_scenes(split, count, (128, 96), 3)
        for number, (image, objects) in enumerate(scenes, start=first):
            entry = data.loadImgs(number)[0]
            assert (tmp_path / 'voc' / entry['file_name']).is_file()
            assert (entry['height'], entry['width']) == image.shape[:2]
            annotations = data.loadAnns(data.getAnnIds(number))
            assert len(annotations) == len(objects)
            for annotation, obj in zip(annotations, objects):
                assert np.array_equal(data.annToMask(annotation), obj.mask)
                assert annotation['area'] == obj.mask.sum()
                assert annotation['iscrowd'] == obj.difficult
                (category,) = data.loadCats(annotation['category_id'])
                assert category['name'] == obj.name
                x, y, width, height = annotation['bbox']
                assert (x + 1, y + 1, x + width, y + height) == obj.box
    # Nothing else has changed.
    for path in paths:
        path.unlink()
    paths[0].parent.rmdir()
    assert make_demo_voc.digest(tmp_path / 'voc') == before


def test_coco_needs_the_data(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no generated data set'):
        make_demo_voc.write_coco(tmp_path)
