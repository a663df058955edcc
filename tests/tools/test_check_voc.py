"""The check of VOC data: each row of the table in docs/reliability.md, and the rest."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests import ROOT
from tools.dataset_tools.check_voc import main
from tools.dataset_tools.make_demo_voc import CLASSES, digest, generate
from tools.dataset_tools.voc_data import VOC_CLASSES, check, read_lists
from tools.dataset_tools.voc_files import KINDS
from tools.dataset_tools.voc_fix import REPORT

pytest.importorskip('mmdet', reason='compares with what its XMLDataset does')
from mmdet.datasets import VOCDataset
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules

import rambo_det  # noqa: F401 - explains some errors of XMLDataset

SHARED = ROOT.parent / 'shared'
SIZE = (96, 64)
FIRST = '000001'  # in trainval, as 000002 to 000012 are; the rest is in test
FILTER = dict(type='FilterAnnotations', min_gt_bbox_wh=(0, 0), keep_empty=False)


@pytest.fixture(scope='module')
def clean(tmp_path_factory):
    """A data set in which nothing is wrong."""
    root = tmp_path_factory.mktemp('data') / 'shapes'
    generate(root, 12, 12, SIZE)
    (root / 'demo_voc.json').unlink()
    # Every class is in both lists, of objects that count.
    for split in ('trainval', 'test'):
        names = lines(root, split)
        for name, label in zip(names, CLASSES):
            edit(root, name, r'<name>.*?</name>', f'<name>{label}</name>')
            edit(root, name, r'<difficult>1', '<difficult>0')
    return root


@pytest.fixture
def data(clean, tmp_path):
    return Path(shutil.copytree(clean, tmp_path / 'data'))


def xml(root, name=FIRST):
    return root / 'Annotations' / f'{name}.xml'


def image(root, name=FIRST):
    return root / 'JPEGImages' / f'{name}.jpg'


def text_of(root, split):
    return root / 'ImageSets' / 'Main' / f'{split}.txt'


def trainval(root):
    return text_of(root, 'trainval')


def lines(root, split):
    return text_of(root, split).read_text().splitlines()


def edit(root, name, pattern, new):
    """Replace the first match in an annotation."""
    content = xml(root, name).read_text()
    changed = re.sub(pattern, new, content, count=1, flags=re.DOTALL)
    xml(root, name).write_text(changed)


def box(*corners):
    """Give the first object a box."""
    tags = ''.join(
        f'<{key}>{value}</{key}>'
        for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), corners)
    )
    return lambda root: edit(root, FIRST, '<xmin>.*?</ymax>', tags)


def write(path, content):
    mode = Path.write_bytes if isinstance(content, bytes) else Path.write_text
    return lambda root: mode(path(root), content)


def append(split, line):
    return lambda root: text_of(root, split).write_text(
        text_of(root, split).read_text() + line
    )


def truncate(root):
    content = image(root).read_bytes()
    image(root).write_bytes(content[: len(content) // 2])


def rotate(root):
    with Image.open(image(root)) as picture:
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.save(image(root), quality='keep', exif=exif)


def rename(root):
    image(root).rename(root / 'JPEGImages' / f'{FIRST}.JPEG')


def copy_image(root):
    shutil.copy(image(root), image(root, '000013'))


def only_class(root):
    for path in (root / 'Annotations').iterdir():
        path.write_text(path.read_text().replace('<name>star<', '<name>disc<'))


# Training on the data, as far as the data go.


def dataset_of(root, split='trainval', between=(), **filter_cfg):
    register_all_modules()
    return DATASETS.build(
        dict(
            type='XMLDataset',
            data_root=str(root),
            ann_file=f'ImageSets/Main/{split}.txt',
            data_prefix=dict(sub_data_root=''),
            metainfo=dict(classes=CLASSES),
            filter_cfg=dict(filter_empty_gt=False, **filter_cfg),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True),
                dict(type='Resize', scale=SIZE, keep_ratio=True),
                *between,
                dict(type='PackDetInputs'),
            ],
        )
    )


def boxes(item):
    return item['data_samples'].gt_instances.bboxes.tensor.tolist()


def turns_the_image(root):
    sample = dataset_of(root)[0]['data_samples']
    assert sample.ori_shape == SIZE  # height and width
    assert dataset_of(root).get_data_info(0)['width'] == SIZE[0]


def believes_the_xml(root):
    assert dataset_of(root).get_data_info(0)['width'] == 7


def box_without_area(root):
    """The box is in the batch, where nothing filters after the resize."""
    bad = [b for b in boxes(dataset_of(root)[0]) if b[0] >= b[2] or b[1] >= b[3]]
    assert len(bad) == 1
    left = boxes(dataset_of(root, between=[FILTER])[0])
    assert left and all(b[0] < b[2] and b[1] < b[3] for b in left)


def clips(root):
    assert [0, 9, SIZE[0], 39] in boxes(dataset_of(root)[0])


def cuts_fractions(root):
    assert [9, 11, 49, 39] in boxes(dataset_of(root)[0])


def drops_the_object(root):
    data = dataset_of(root)
    assert len(data.get_data_info(0)['instances']) == len(objects(root, FIRST)) - 1


def has_no_star(root):
    data = dataset_of(root)
    labels = Counter(
        instance['bbox_label']
        for index in range(len(data))
        for instance in data.get_data_info(index)['instances']
    )
    assert 5 not in labels and labels[0]


def counts_it_twice(root):
    assert len(dataset_of(root)) == len(set(lines(root, 'trainval'))) + 1 == 13


def sees_the_same(root):
    train, test = dataset_of(root), dataset_of(root, 'test')
    pictures = [train[i]['inputs'] for i in range(len(train))]
    last = [test[i]['inputs'] for i in range(len(test))]
    assert any(a.equal(b) for a in pictures for b in last)


def objects(root, name):
    return ET.parse(xml(root, name)).getroot().findall('object')


NOT_XML = '<annotation><object></annotation>'


def stops(error, match, at=None):
    """The training stops when it reads the list, or an image."""

    def training(root):
        dataset = dataset_of(root) if at == 'image' else None
        with pytest.raises(error, match=match):
            dataset_of(root) if dataset is None else dataset[0]

    return training


def tag(pattern, new):
    return lambda root: edit(root, FIRST, pattern, new)


# How each kind comes about, and what training does.
ROWS = {
    'image-missing': (
        lambda root: image(root).unlink(),
        stops(FileNotFoundError, '000001.jpg', 'image'),
    ),
    'extension': (rename, stops(FileNotFoundError, '000001.jpg', 'image')),
    'image-unreadable': (
        write(image, b'not an image'),
        stops(AssertionError, 'failed to load image.*000001.jpg', 'image'),
    ),
    'image-truncated': (
        truncate,
        stops(AssertionError, 'failed to load image.*000001.jpg', 'image'),
    ),
    'image-rotated': (rotate, turns_the_image),
    'xml-missing': (
        lambda root: xml(root).unlink(),
        stops(FileNotFoundError, '000001.xml'),
    ),
    'xml-unreadable': (
        write(xml, NOT_XML),
        stops(ET.ParseError, '^mismatched tag(?!.*000001)'),
    ),
    'size-mismatch': (tag('<width>.*?<', '<width>7<'), believes_the_xml),
    'object-unreadable': (
        tag('<bndbox>.*?</bndbox>', ''),
        stops(AttributeError, "'NoneType' object(?!.*000001)"),
    ),
    'box-zero-area': (box(10, 12, 10, 12), box_without_area),
    'box-inverted': (box(50, 40, 10, 12), box_without_area),
    'box-outside': (box(100, 12, 140, 40), box_without_area),
    'box-over-edge': (box(-20, 10, 140, 40), clips),
    'box-float': (box(10.7, 12.2, 50.9, 40.0), cuts_fractions),
    'class-unknown': (tag('<name>disc<', '<name>sedan<'), drops_the_object),
    'class-empty': (only_class, has_no_star),
    'list-line': (
        write(trainval, '000001.jpg\n000002 \n\n'),
        stops(FileNotFoundError, '000001.jpg.xml'),
    ),
    'list-repeats': (append('trainval', '000001\n'), counts_it_twice),
    'list-empty': (
        write(trainval, ''),
        stops(ValueError, 'trainval.txt names no image'),
    ),
    'splits-overlap': (append('trainval', '000013\n'), sees_the_same),
    'splits-same-content': (copy_image, sees_the_same),
}
XML, JPEG = 'Annotations/000001.xml', 'JPEGImages/000001.jpg'
LIST = 'ImageSets/Main/trainval.txt'
# The file, what is said of it, and what the copy is said to have instead.
SAID = {
    'image-missing': (JPEG, 'no such file', 'taken out of all lists'),
    'extension': ('JPEGImages/000001.JPEG', 'is not .jpg', f'copied as {JPEG}'),
    'image-unreadable': (JPEG, '12 bytes that are no image', 'taken out'),
    'image-truncated': (JPEG, 'truncated', 'taken out of all lists'),
    'image-rotated': (JPEG, 'turns it to 64 x 96', 'stored without'),
    'xml-missing': (XML, 'no such file', 'taken out of all lists'),
    'xml-unreadable': (XML, 'mismatched tag', 'taken out of all lists'),
    'size-mismatch': (XML, 'says 7 x 64, the image has 96 x 64', 'set to 96'),
    'object-unreadable': (XML, 'None None None None', 'dropped'),
    'box-zero-area': (XML, '(10, 12, 10, 12)', 'dropped'),
    'box-inverted': (XML, '(50, 40, 10, 12)', 'swapped: (10, 12, 50, 40)'),
    'box-outside': (XML, 'the image has 96 x 64', 'dropped'),
    'box-over-edge': (XML, '1 to 96 x 1 to 64', 'clipped to (1, 10, 96, 40)'),
    'box-float': (XML, '(10.7, 12.2, ', 'rounded to (11, 12, 51, 40)'),
    'class-unknown': (XML, "'sedan', 1 times", 'dropped, as training would'),
    'class-empty': (LIST, 'no object', ''),
    'list-line': (LIST, "line 1: '000001.jpg'", "read as '000001'"),
    'list-repeats': (LIST, '000001 is listed 2 times', 'listed once'),
    'list-empty': (LIST, 'names no image', ''),
    'splits-overlap': (LIST, '000013 is also in test', 'taken out of train'),
    'splits-same-content': (LIST, 'same image as 000013', 'taken out of train'),
}
UNREPAIRED = ('class-empty', 'list-empty')


def fix(data, out, *more):
    return main([str(data), '--classes', *CLASSES, '--fix', str(out), *more])


def test_nothing_is_wrong_with_clean_data(clean, capsys):
    assert main([str(clean), '--classes', *CLASSES]) == 0
    out = capsys.readouterr().out
    assert '24 images (test 12, trainval 12)' in out and 'all well' in out


@pytest.mark.parametrize('kind', KINDS)
def test_row(kind, data, tmp_path, capsys):
    """What is found, what the copy has instead, and what training does."""
    (damage, training), (file, detail, repair) = ROWS[kind], SAID[kind]
    damage(data)
    before = digest(data)
    assert main([str(data), '--classes', *CLASSES]) == 1
    printed = capsys.readouterr().out
    block = printed.split(f'\n{kind}: ')[1]
    assert f'{file}: ' in block and detail in block and KINDS[kind] in block

    fixed, report = tmp_path / 'fixed', tmp_path / 'reports' / 'report.json'
    code = fix(data, fixed, '--json', str(report))
    printed = capsys.readouterr().out
    problems = [
        problem
        for problem in json.loads(report.read_text())['problems']
        if problem['kind'] == kind and problem['file'] == file
    ]
    assert detail in problems[0]['detail'] and repair in problems[0]['repair']
    assert digest(data) == before  # the data are never changed
    changes = (fixed / REPORT).read_text().splitlines()
    assert f'{len(changes) - 1} changes of {data}' == changes[0]
    for change in changes[1:]:
        assert f'  {change}\n' in printed
    if kind in UNREPAIRED:
        assert code == 1 and f'\n{kind}: ' in printed.split('The copy, checked:')[1]
    else:
        assert any(f'{file}: {kind}: ' in change for change in changes)
        again = check(fixed, CLASSES).problems
        assert {problem.kind for problem in again} <= {'class-empty'}
        assert code == bool(again)
    # What no change names is as it was.
    named = '\n'.join(changes)
    for path in (*data.glob('Annotations/*'), *data.glob('JPEGImages/*')):
        if path.name not in named:
            other = fixed / path.relative_to(data)
            assert other.read_bytes() == path.read_bytes()

    training(data)
    if kind not in UNREPAIRED:
        data_set = dataset_of(fixed)
        for index in range(len(data_set)):
            for x0, y0, x1, y1 in boxes(data_set[index]):
                assert 0 <= x0 < x1 <= SIZE[0] and 0 <= y0 < y1 <= SIZE[1]


@pytest.mark.parametrize('kind', ['box-zero-area', 'box-inverted'])
def test_the_filter_of_mmdets_voc_config_ignores_them(kind, data):
    ROWS[kind][0](data)
    sample = dataset_of(data, bbox_min_size=8)[0]['data_samples']
    ignored = sample.ignored_instances.bboxes.tensor.tolist()
    assert sum(x0 >= x1 or y0 >= y1 for x0, y0, x1, y1 in ignored) == 1
    for x0, y0, x1, y1 in sample.gt_instances.bboxes.tensor.tolist():
        assert x0 < x1 and y0 < y1


def test_a_list_of_one_class_that_is_asked_for_is_no_list_of_images(data, capsys):
    main([str(data), '--classes', *CLASSES, '--lists', 'disc_trainval'])
    out = capsys.readouterr().out
    assert 'list-line: 12 in 1 files' in out and "line 1: '000001  1'" in out


def test_the_table_in_the_docs_has_every_kind():
    page = (ROOT / 'docs' / 'reliability.md').read_text()
    (text,) = (part for part in page.split('\n## ') if part.startswith('Data\n'))
    rows = re.findall(r'^\| `([\w-]+)` \|', text, re.MULTILINE)
    assert rows == [*KINDS] == [*ROWS] == [*SAID]
    assert 'tests/tools/test_check_voc.py::test_row' in text


LOST, SIZED = 'taken out', 'set to 96 x 64'
UNREADABLE, UNKNOWN = 'object-unreadable', 'class-unknown'


@pytest.mark.parametrize(
    ('damage', 'kind', 'detail', 'repair'),
    [
        (write(image, b''), 'image-unreadable', 'is empty', 'taken out of all lists'),
        (tag('<width>.*?<', '<width>96.0<'), 'size-mismatch', 'says 96.0 x', SIZED),
        (tag('<width>.*?</width>', ''), 'size-mismatch', 'says None x 64', SIZED),
        (box(1, 2, 'nan', 4), UNREADABLE, 'bndbox 1 2 nan 4', 'dropped'),
        (box(1, 2, 'x', 4), UNREADABLE, 'expected 4 numbers', 'dropped'),
        (tag('<name>.*?<', '<name><'), UNREADABLE, 'object without name', 'dropped'),
        (
            tag('<difficult>.', '<difficult>Unspecified'),
            UNREADABLE,
            "disc: difficult is 'Unspecified', expected 0 or 1",
            'set to 0',
        ),
        (tag('<name>disc', '<name> Disc'), UNKNOWN, "' Disc', 1", "renamed 'disc'"),
        (
            tag('<name>disc', '<name>disk'),
            UNKNOWN,
            "'disk', 1 times, did you mean 'disc'?",
            'dropped, as training would',
        ),
        (box(10.2, 3, 10.9, 9), 'box-zero-area', '(10.2, 3, 10.9, 9)', 'dropped'),
        (box(0, 0, 20, 20), 'box-over-edge', '(0, 0, 20, 20)', 'to (1, 1, 20, 20)'),
        (append('test', '\ufeff000013 \n'), 'list-line', 'line 13', "as '000013'"),
        (append('test', '000013  1\n'), 'list-line', "'000013  1'", "as '000013'"),
        (append('test', 'nowhere\n'), 'image-missing', 'is listed', LOST),
    ],
)
def test_what_else_is_found(data, tmp_path, damage, kind, detail, repair):
    damage(data)
    (problem,) = (p for p in check(data, CLASSES).problems if p.kind == kind)
    assert detail in problem.detail and repair in problem.repair
    fix(data, tmp_path / 'fixed')
    assert check(tmp_path / 'fixed', CLASSES).problems == []


@pytest.mark.parametrize(
    ('format', 'settings'),
    [
        ('JPEG', dict(progressive=True)),
        ('JPEG', dict(quality=30)),
        ('PNG', {}),
        ('BMP', {}),
        ('WEBP', {}),
    ],
)
@pytest.mark.parametrize('share', [0.05, 0.5, 0.99])
def test_a_truncated_image_is_found_in_any_format(data, format, settings, share):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    with open(image(data), 'wb') as file:
        Image.fromarray(pixels).save(file, format, **settings)
    assert check(data, CLASSES).problems == []
    content = image(data).read_bytes()
    image(data).write_bytes(content[: int(len(content) * share)])
    (problem,) = check(data, CLASSES).problems
    assert problem.kind in ('image-truncated', 'image-unreadable')


def test_an_image_that_only_pillow_reads_is_unreadable(data):
    with Image.open(image(data)) as picture:
        picture.save(image(data), 'ICO')
    assert cv2.imread(str(image(data))) is None
    assert [p.kind for p in check(data, CLASSES).problems] == ['image-unreadable']


def test_a_turned_image_with_fitting_annotation_is_well(data):
    rotate(data)
    edit(data, FIRST, '<width>.*?</height>', '<width>64</width><height>96</height>')
    allowed = {'box-over-edge', 'box-outside'}
    assert {p.kind for p in check(data, CLASSES).problems} <= allowed
    assert tuple(dataset_of(data)[0]['data_samples'].ori_shape) == SIZE


@pytest.mark.parametrize('format', ['JPEG', 'PNG'])
def test_the_upright_copy_has_the_same_pixels(data, tmp_path, format):
    rotate(data)
    if format == 'PNG':
        with Image.open(image(data)) as picture:
            picture.save(image(data), 'PNG', exif=picture.getexif())
    stored = cv2.imread(str(image(data)), cv2.IMREAD_IGNORE_ORIENTATION | 1)
    fix(data, tmp_path / 'fixed')
    seen = cv2.imread(str(image(tmp_path / 'fixed')))
    assert seen.shape[:2] == SIZE[::-1] and (seen == stored).all()


def test_lists_of_one_class_lose_what_the_others_lose(data, tmp_path, capsys):
    image(data).unlink()
    fix(data, tmp_path / 'fixed')
    assert f'{len(CLASSES) * 2} lists of one class' in capsys.readouterr().out
    for stem in ('trainval', 'disc_trainval', 'star_trainval'):
        before, after = lines(data, stem), lines(tmp_path / 'fixed', stem)
        assert after == [line for line in before if not line.startswith(FIRST)]
        assert len(after) == 11
    assert lines(tmp_path / 'fixed', 'disc_test') == lines(data, 'disc_test')


@pytest.mark.parametrize(
    ('lists', 'loses'),
    [
        (dict(train='12', val='34', trainval='1234', test='56'), {}),
        (dict(train='12', val='23'), dict(train='2')),
        (dict(trainval='12', test='23'), dict(trainval='2')),
        (
            dict(train='12', val='3', trainval='123', test='1'),
            dict.fromkeys(('train', 'trainval'), '1'),
        ),
        (dict(val='12', test='23'), dict(val='2')),
        (dict(train='12', train_small='1'), {}),
        (dict(train_small='1', test='1'), dict(train_small='1')),
        (dict(train_fold1='12', val_fold1='34', train_fold2='34', val_fold2='12'), {}),
        (dict(train_fold1='12', val_fold1='24'), dict(train_fold1='2')),
        (dict(train='12', fold='12'), {}),
    ],
)
def test_which_lists_may_share_images(data, tmp_path, lists, loses):
    shutil.rmtree(data / 'ImageSets' / 'Main')
    (data / 'ImageSets' / 'Main').mkdir()
    for stem, digits in lists.items():
        text_of(data, stem).write_text(''.join(f'00000{d}\n' for d in digits))
    checked = check(data)
    found = {p.file for p in checked.problems if p.kind == 'splits-overlap'}
    assert found == {f'ImageSets/Main/{stem}.txt' for stem in loses}
    assert any('fold' in note for note in checked.notes) == ('fold' in lists)
    main([str(data), '--fix', str(tmp_path / 'fixed')])
    for stem, digits in lists.items():
        left = [f'00000{d}' for d in digits if d not in loses.get(stem, '')]
        assert lines(tmp_path / 'fixed', stem) == left


def test_without_classes_it_asks(clean, capsys):
    assert main([str(clean)]) == 1
    out = capsys.readouterr().out
    assert 'class names: not checked' in out
    assert "--classes 'cross' 'disc' 'ring' 'square' 'star' 'triangle'" in out


def test_without_classes_names_of_voc_are_those_of_voc(data, capsys):
    assert VOCDataset.METAINFO['classes'] == VOC_CLASSES
    names = dict(zip(CLASSES, VOC_CLASSES))
    for path in (data / 'Annotations').iterdir():
        new = re.sub(
            '<name>(.*?)<', lambda m: f'<name>{names[m[1]]}<', path.read_text()
        )
        path.write_text(new)
    assert main([str(data)]) == 1
    out = capsys.readouterr().out
    assert 'every name is one of the 20 of VOC' in out
    assert (
        'class-empty: 2 in 2 files' in out
        and 'no object (difficult ones do not count) of car, cat' in out
    )


def test_files_that_no_list_names_are_copied_as_they_are(data, tmp_path, capsys):
    shutil.copy(image(data), image(data, 'other'))
    xml(data, 'other').write_text(NOT_XML)
    (data / 'JPEGImages' / 'sub').mkdir()
    shutil.copy(image(data), data / 'JPEGImages' / 'sub' / 'more.png')
    (data / 'SegmentationClass').mkdir()
    assert fix(data, tmp_path / 'fixed') == 0
    out = capsys.readouterr().out
    assert '3 files that no list names' in out
    assert 'SegmentationClass: not copied' in out
    fixed = tmp_path / 'fixed'
    assert xml(fixed, 'other').read_text() == NOT_XML
    assert (fixed / 'JPEGImages' / 'sub' / 'more.png').is_file()


def test_images_in_folders(data):
    for folder, suffix in (('JPEGImages', 'jpg'), ('Annotations', 'xml')):
        (data / folder / 'sub').mkdir()
        file = f'{FIRST}.{suffix}'
        (data / folder / file).rename(data / folder / 'sub' / file)
    path = text_of(data, 'trainval')
    path.write_text(path.read_text().replace(FIRST, f'sub/{FIRST}'))
    assert check(data, CLASSES).problems == []
    assert len(dataset_of(data)[0]['data_samples'].gt_instances)


def test_links(data, tmp_path):
    box(50, 40, 10, 12)(data)
    fixed = tmp_path / 'fixed'
    assert fix(data, fixed, '--link') == 0
    assert image(fixed).is_symlink() and image(fixed).resolve() == image(data).resolve()
    assert not xml(fixed).is_symlink() and not xml(fixed, '000002').is_symlink()


def test_only_the_named_lists(data, tmp_path, capsys):
    append('test', 'nowhere\n')(data)
    fixed = tmp_path / 'fixed'
    assert fix(data, fixed, '--lists', 'trainval') == 0
    assert 'ImageSets/Main/test.txt: not copied' in capsys.readouterr().out
    assert not text_of(fixed, 'test').exists()


def test_problems_beyond_show_are_counted(data, capsys):
    (data / 'JPEGImages').rename(data / 'gone')
    (data / 'JPEGImages').mkdir()
    for show, printed in (('3', 3), ('0', 24)):
        main([str(data), '--classes', *CLASSES, '--show', show])
        out = capsys.readouterr().out
        assert 'image-missing: 24 in 24 files' in out
        assert out.count('is listed, but') == printed
        assert ('and 21 more' in out) == (show == '3')


def test_several_processes_find_the_same(tmp_path):
    root = tmp_path / 'data'
    generate(root, 100, 20, (64, 64))
    box(30, 30, 10, 12)(root)
    alone, together = check(root, CLASSES, jobs=1), check(root, CLASSES, jobs=2)
    assert alone == together and len(alone.problems) >= 1


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        (['nowhere'], 'expected the folders Annotations, ImageSets/Main, JPEGImages'),
        (['.'], r'did you mean data\?'),
        (['data', '--lists', 'val'], 'expected val as .txt in .* found test, trainval'),
        (['data', '--fix', 'data'], '--fix data exists and is not empty'),
        (['data', '--fix', 'data/fixed'], '--fix data/fixed is inside data'),
        (['data', '--show', '-1'], '--show must be 0 or more, got -1'),
        (['data', '--jobs', '0'], '--jobs must be 1 or more, got 0'),
        (['data', '--classes', 'a', 'a'], '--classes names a class twice: a a'),
        (['data', '--link'], '--link belongs to --fix OUT'),
    ],
)
def test_bad_arguments(data, monkeypatch, capsys, arguments, match):
    monkeypatch.chdir(data.parent)
    before = digest(data)
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2 and re.search(match, capsys.readouterr().err)
    assert digest(data) == before


def test_a_list_that_is_not_utf8_is_named(data, capsys):
    text_of(data, 'trainval').write_bytes(b'caf\xe9\n')
    assert main([str(data)]) == 2
    assert re.search('expected UTF-8 in .*trainval.txt', capsys.readouterr().err)


def test_no_lists(data):
    shutil.rmtree(data / 'ImageSets' / 'Main')
    (data / 'ImageSets' / 'Main').mkdir()
    with pytest.raises(ValueError, match='expected lists of images .* found none'):
        read_lists(data, None, lambda name: True)


@pytest.mark.needs_shared
def test_blood_cells(tmp_path, capsys):
    """The two boxes without area are found, and nothing else is wrong."""
    root = SHARED / 'data' / 'bccd' / 'BCCD'
    if not root.is_dir():
        pytest.skip('the data are not there: bccd in a folder beside the checkout')
    arguments = ['--classes', 'RBC', 'WBC', 'Platelets']
    assert main([str(root), *arguments]) == 1
    out = capsys.readouterr().out
    assert 'box-zero-area: 2 in 2 files' in out and '\nproblems: 2\n' in out
    fixed = tmp_path / 'fixed'
    assert main([str(root), *arguments, '--fix', str(fixed), '--link']) == 0
    changes = (fixed / REPORT).read_text().splitlines()
    assert [line.split(': ')[0] for line in changes[1:]] == [
        'Annotations/BloodImage_00338.xml',
        'Annotations/BloodImage_00343.xml',
    ]
