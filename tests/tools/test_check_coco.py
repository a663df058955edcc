"""The check of data in COCO format, and of all that a config names."""

import json
import math
import os
import random
import re

import pytest

pytest.importorskip('mmdet', reason='compares with its CocoDataset')
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules

from tests import ROOT
from tests.helpers.damaged_data import CLASSES, LISTS, encoded, write
from tools.dataset_tools.check_voc import main

COUNT = int(os.environ.get('RAMBO_DAMAGED', 40))
SIZE, BOX = (48, 36), [4, 5, 20, 18]
CONFIG = ROOT / 'configs/own_data/faster-rcnn_mobilenetv2_fpn-p3_rambo_12e_own.py'


def content():
    return dict(
        images=[
            dict(id=i, file_name=f'{i}.jpg', width=48, height=36) for i in range(4)
        ],
        annotations=[
            dict(id=3 * i + c, image_id=i, category_id=c, bbox=BOX, area=360, iscrowd=0)
            for i in range(4)
            for c in range(3)
        ],
        categories=[dict(id=c, name=name) for c, name in enumerate(CLASSES)],
    )


@pytest.fixture
def data(tmp_path):
    (tmp_path / 'data/images').mkdir(parents=True)
    for i in range(4):
        path = tmp_path / f'data/images/{i}.jpg'
        path.write_bytes(encoded(random.Random(i), SIZE))
    return tmp_path / 'data'


def instances(file):
    """Return what mmdet makes of a file: the labels of each image."""
    register_all_modules()
    found = DATASETS.build(
        dict(
            type='CocoDataset',
            data_root=str(file.parent),
            ann_file=file.name,
            data_prefix=dict(img='images'),
            metainfo=dict(classes=CLASSES),
            filter_cfg=dict(filter_empty_gt=False),
            serialize_data=False,  # which collects garbage, slowly
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True),
                dict(type='PackDetInputs'),
            ],
        )
    )
    samples = [found[i]['data_samples'] for i in range(len(found))]
    for sample in samples:
        boxes = sample.gt_instances.bboxes.tensor
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= 1 and boxes.min() >= 0
    return [sample.gt_instances.labels.tolist() for sample in samples]


def first(**values):
    return lambda found: found['annotations'][0].update(values)


@pytest.mark.parametrize(
    'damage, kind, left',
    [
        (lambda found: None, '', 3),
        (first(bbox=[4, 5, 20]), 'object-unreadable', 2),
        (first(bbox=[4, 5, None, 9]), 'object-unreadable', 2),
        (first(bbox=[24, 23, -20, -18]), 'box-inverted', 3),
        (first(bbox=[4, 5, 0.5, 9]), 'box-zero-area', 2),
        (first(bbox=[90, 5, 9, 9]), 'box-outside', 2),
        (first(bbox=[-9, 5, 90, 9]), 'box-over-edge', 3),
        (first(area=None), 'object-unreadable', 3),
        (first(id=1), 'object-unreadable', 3),
        (first(id=[1]), 'object-unreadable', 3),
        (first(category_id=9), 'object-unreadable', 2),
        (first(image_id=77), 'object-unreadable', 2),
        (lambda found: found['images'][0].pop('width'), 'size-mismatch', 3),
        (lambda found: found['images'].append(found['images'][0]), 'list-repeats', 3),
        (lambda found: found['categories'].reverse(), 'class-order', 3),
        (lambda found: found['categories'][0].update(name='Cat'), 'class-unknown', 3),
        (
            lambda found: found['images'][3].update(file_name='x.jpg'),
            'image-missing',
            3,
        ),
    ],
)
def test_what_is_wrong_with_a_coco_file(damage, kind, left, data, tmp_path, capsys):
    found = content()
    damage(found)
    file, fixed = data / 'train.json', tmp_path / 'fixed'
    file.write_text(json.dumps(found))
    arguments = ['--classes', *CLASSES, '--jobs', '1']
    assert main([str(file), *arguments]) == int(bool(kind))
    assert not kind or f'\n{kind}: 1 in 1 files' in capsys.readouterr().out
    assert main([str(file), *arguments, '--fix', str(fixed)]) == 0
    labels = instances(fixed / 'train.json')
    assert sorted(labels[0]) == [*range(3)][3 - left :]
    assert len(labels) == 4 - (kind == 'image-missing')


NAMES = '', '1', 'a', '0.jpg', '../0.jpg', 'a\0b', 'x' * 500, 'cat'
NUMBERS = None, True, -1, 1, 1.5, math.nan, math.inf, 2**70
LISTS_AND_SUCH = [], {}, [1], [5, 6, 0, 10], ['5', '6', '9', '9'], [47.5, 35, 9, 9]
HOSTILE = (*NAMES, *NUMBERS, *LISTS_AND_SUCH)


def places(part):
    """Yield where a value is: what holds it, and its key there."""
    for key in [*part] if isinstance(part, dict) else range(len(part)):
        yield part, key
        if isinstance(part[key], (dict, list)):
            yield from places(part[key])


@pytest.mark.parametrize('block', range(0, COUNT, 20))
def test_the_verdict_is_that_of_cocodataset(block, data, tmp_path, capsys):
    file = data / 'train.json'
    for seed in range(block, block + 20):
        chance, found = random.Random(seed), content()
        for _ in range(chance.choice([1, 1, 2])):
            part, key = chance.choice([*places(found)])
            if chance.random() < 0.3:
                del part[key]
            else:
                part[key] = chance.choice(HOSTILE)
        file.write_text(json.dumps(found))
        fixed, out = tmp_path / f'fixed{seed}', ''
        try:
            code = main(
                [str(file), '--classes', *CLASSES, '--jobs', '1', '--fix', str(fixed)]
            )
            out, copy = capsys.readouterr().out.split('The copy, checked:')
            if out.rstrip().endswith('all well') or '\nall well\n' in out:
                instances(file)
            if code == 0:
                assert copy.rstrip().endswith('all well')
                instances(fixed / 'train.json')
        except SystemExit as refused:
            assert refused.code == 2
            assert len(capsys.readouterr().err.splitlines()) == 1
        except Exception as error:
            raise AssertionError(f'seed {seed}: {found}\n{out}') from error


@pytest.fixture
def config(tmp_path):
    """A config of our own whose data are well."""
    names = {stem: [f'{stem}{i}' for i in range(3)] for stem in LISTS}
    write(tmp_path / 'data', names, random.Random(1))
    path = tmp_path / 'mine.py'
    text = f'_base_ = {str(CONFIG)!r}\ndata_root = {str(tmp_path / "data")!r}\n'
    path.write_text(f'{text}classes = {CLASSES}\n')
    return path


HEAD = 'model = dict(roi_head=dict(bbox_head=dict(num_classes=7)))\n'
TEST_LIST = "val_dataloader = dict(dataset=dict(ann_file='ImageSets/Main/train.txt'))\n"


@pytest.mark.parametrize(
    'more, said',
    [
        ('', ''),
        (HEAD, r'num-classes: 3 in 1 .*\n  mine.py: train_dataloader: .*\(7\)'),
        (
            "classes = ('cat', 'dog')\n",
            "class-unknown: 9 in 9 .*\n.*'red cell', 1",
        ),
        (TEST_LIST, 'splits-overlap: 1 in 1 .*\n.*is used for train and val'),
    ],
)
def test_a_config(more, said, config, tmp_path, capsys):
    config.write_text(config.read_text() + more)
    code = main(['--config', str(config), '--jobs', '1'])
    out = capsys.readouterr().out
    assert '9 images (train 3, val 3, test 3)' in out or more == TEST_LIST
    assert code == int(bool(said)), out
    assert re.search(said, out), out


LAZY = """
from mmdet.datasets import XMLDataset
train_dataloader = dict(
    dataset=dict(
        type=XMLDataset,
        data_root={root!r},
        data_prefix=dict(sub_data_root=''),
        ann_file='ImageSets/Main/train.txt',
        metainfo=dict(classes={classes!r}),
    )
)
"""


def test_a_config_that_imports_its_types(config, tmp_path, capsys):
    data = dict(root=str(tmp_path / 'data'), classes=CLASSES)
    config.write_text(LAZY.format(**data))
    assert main(['--config', str(config), '--jobs', '1']) == 0
    assert '3 images (train 3)' in capsys.readouterr().out


@pytest.mark.parametrize(
    'dataset',
    ['dict(data_root=1)', "['x', 1]", "dict(type='XMLDataset', metainfo=5)", '3'],
)
def test_a_config_of_other_data(dataset, tmp_path, capsys):
    path = tmp_path / 'mine.py'
    path.write_text(f'train_dataloader = dict(dataset={dataset})\n')
    with pytest.raises(SystemExit):
        main(['--config', str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert 'expected a config with data' in line or 'no data of VOC or COCO' in line


def test_a_config_of_several_data_sets(config, tmp_path, capsys):
    """Splits are compared across them; a copy can only be made of one."""
    other = tmp_path / 'other'
    write(other, {'test': ['a', 'b']}, random.Random(2))
    copied = tmp_path / 'data/JPEGImages/train0.jpg'
    (other / 'JPEGImages/a.jpg').write_bytes(copied.read_bytes())
    xml = (tmp_path / 'data/Annotations/train0.xml').read_bytes()
    (other / 'Annotations/a.xml').write_bytes(xml)
    (tmp_path / 'mine.py').write_text(
        f'{config.read_text()}'
        f'test_dataloader = dict(dataset=dict(data_root={str(other)!r}))\n'
    )
    assert main(['--config', str(config), '--jobs', '1']) == 1
    out = capsys.readouterr().out
    assert 'splits-same-content: 1 in 1' in out and 'same image as a in test' in out
    with pytest.raises(SystemExit):
        main(['--config', str(config), '--jobs', '1', '--fix', str(tmp_path / 'new')])
    assert '--fix writes one data set' in capsys.readouterr().err
    (other / 'ImageSets/Main/test.txt').unlink()
    with pytest.raises(SystemExit):
        main(['--config', str(config), '--jobs', '1'])
    assert 'test_dataloader: there is no file' in capsys.readouterr().err
