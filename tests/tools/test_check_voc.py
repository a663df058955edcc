"""The check of data: each row of the table in docs/reliability.md, and the rest."""

import csv
import json
import os
import random
import re
import shutil
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest

pytest.importorskip('mmdet', reason='compares with what its XMLDataset does')
from tests import ROOT
from tests.helpers.damaged_data import (
    CLASSES,
    LISTS,
    annotation,
    assert_trains,
    data_set,
    encoded,
    write,
)
from tools.dataset_tools.check_voc import main
from tools.dataset_tools.make_demo_voc import digest
from tools.dataset_tools.voc_files import KINDS
from tools.dataset_tools.voc_fix import REPORT
from tools.dataset_tools.voc_lists import read_lines

SHARED = ROOT.parent / 'shared'
SIZE = (48, 36)
BOX = (5, 6, 20, 30)
IMAGE, XML = 'JPEGImages/train0.jpg', 'Annotations/train0.xml'
LIST, OTHER = 'ImageSets/Main/train.txt', 'ImageSets/Main/test.txt'
NAMES = [f'train{i}' for i in range(4)]


def fresh(seed=0, kind='JPEG', **options):
    return encoded(random.Random(seed), SIZE, kind, **options)


@pytest.fixture
def data(tmp_path):
    """A data set in which nothing is wrong."""
    names = {stem: [f'{stem}{i}' for i in range(4)] for stem in LISTS}
    write(tmp_path / 'data', names, random.Random(1))
    (tmp_path / 'data' / IMAGE).write_bytes(fresh())
    (tmp_path / 'data' / XML).write_bytes(objects())
    return tmp_path / 'data'


def objects(box=BOX, name='cat', size=SIZE):
    rest = [(other, BOX) for other in CLASSES if other != name]
    return annotation([(name, box), *rest], size)


def put(file, content):
    """Return a damage that writes a file, or deletes it."""
    if content is None:
        return lambda root: (root / file).unlink()
    content = content.encode() if isinstance(content, str) else content
    return lambda root: (root / file).write_bytes(content)


def sub(old, new):
    return put(XML, objects().replace(old.encode(), new.encode(), 1))


def lines(*names):
    return put(LIST, ''.join(f'{name}\n' for name in names))


def rename(root):
    (root / IMAGE).rename((root / IMAGE).with_suffix('.PNG'))


def without_dogs(root):
    for name in NAMES:
        path = root / f'Annotations/{name}.xml'
        path.write_text(path.read_text().replace('>dog<', '>cat<'))


def copy_image(root):
    shutil.copy(root / IMAGE, root / 'JPEGImages/test0.jpg')


def roboflow(root):
    for stem, split in (('x_jpg.rf.0a1', 'train'), ('x_jpg.rf.b2c', 'test')):
        put(f'JPEGImages/{stem}.jpg', fresh(8 + (split == 'test')))(root)
        put(f'Annotations/{stem}.xml', objects())(root)
        path = root / f'ImageSets/Main/{split}.txt'
        path.write_text(f'{path.read_text()}{stem}\n')


LOST, LOADS = 'taken out of all lists', 'loads'
# How each kind comes about; the file, what is said of it and what the copy has; and
# what mmdet does with it.
ROWS = {
    'image-missing': (put(IMAGE, None), IMAGE, 'no such file', LOST, FileNotFoundError),
    'extension': (
        *(rename, 'JPEGImages/train0.PNG', 'is not .jpg', f'copied as {IMAGE}'),
        FileNotFoundError,
    ),
    'image-unreadable': (
        *(put(IMAGE, fresh()[:-9]), IMAGE, 'damaged or not complete', LOST),
        AssertionError,
    ),
    'image-rotated': (
        *(put(IMAGE, fresh(turn=6)), IMAGE, 'fit the image without the turn'),
        *('the same pixels', AssertionError),
    ),
    'xml-missing': (put(XML, None), XML, 'no such file', 'without', FileNotFoundError),
    'xml-unreadable': (
        *(put(XML, b'\n<?xml version="1.0"?>' + objects()), XML, 'XML or text decl'),
        *('written anew', ET.ParseError),
    ),
    'xml-foreign': (
        *(put(XML, b'<a>' + objects() + b'</a>'), XML, 'finds 0 of 3', 'put right'),
        AssertionError,
    ),
    'size-mismatch': (
        *(sub('<width>48', '<width>7'), XML, 'says 7 x 36, the image has 48 x 36'),
        *('set to 48 x 36', AssertionError),
    ),
    'object-unreadable': (
        *(sub('<xmin>5</xmin>', ''), XML, 'None 6 20 30', 'dropped'),
        AttributeError,
    ),
    'box-zero-area': (
        *(put(XML, objects((9, 6, 9, 30))), XML, '(9, 6, 9, 30)', 'dropped'),
        AssertionError,
    ),
    'box-inverted': (
        *(put(XML, objects((20, 30, 5, 6))), XML, '(20, 30, 5, 6)'),
        *('swapped: (5, 6, 20, 30)', AssertionError),
    ),
    'box-outside': (
        *(put(XML, objects((60, 6, 90, 30))), XML, 'the image has 48', 'dropped'),
        AssertionError,
    ),
    'box-over-edge': (
        *(put(XML, objects((-5, 6, 90, 30))), XML, '1 to 48 x 1 to 36'),
        *('clipped to (1, 6, 48, 30)', LOADS),
    ),
    'box-float': (
        *(put(XML, objects((5.6, 6, 20, 30))), XML, '(5.6,', 'to (6, 6, 20'),
        LOADS,
    ),
    'class-unknown': (
        *(put(XML, objects(name='cow')), XML, "'cow', 1 times", ''),
        AssertionError,
    ),
    'class-empty': (without_dogs, LIST, 'do not count) of dog', '', LOADS),
    'list-line': (lines(*NAMES, ''), LIST, "line 5: ''", 'dropped', FileNotFoundError),
    'list-repeats': (lines(*NAMES, NAMES[0]), LIST, 'listed 2', 'once', LOADS),
    'list-empty': (lines(), LIST, 'names no image', '', ValueError),
    'splits-overlap': (
        *(lines(*NAMES, 'test0'), LIST, 'test0 is also in test', 'taken out of train'),
        LOADS,
    ),
    'splits-same-content': (
        *(copy_image, LIST, 'same image as test0', 'taken out of train', LOADS),
    ),
    'splits-copies': (roboflow, LIST, 'x_jpg.rf.0a1 shows what x_jpg.rf.b2', '', LOADS),
}
ELSEWHERE = {'class-order', 'num-classes'}  # of COCO and of configs, see below


def run(root, *arguments):
    return main([str(root), '--classes', *CLASSES, '--jobs', '1', *arguments])


def found(root, tmp_path, *arguments):
    """Return what is found, without the copies that more than one damage makes."""
    run(root, '--json', str(tmp_path / 'found.json'), *arguments)
    return json.loads((tmp_path / 'found.json').read_text())['problems']


def test_nothing_is_wrong_with_clean_data(data, capsys):
    assert run(data) == 0
    out = capsys.readouterr().out
    assert '12 images (test 4, train 4, val 4)' in out and 'all well' in out
    assert_trains(data)


@pytest.mark.parametrize('kind', ROWS)
def test_row(kind, data, tmp_path, capsys):
    """What is found, what the copy has instead, and what training does."""
    damage, file, detail, repair, training = ROWS[kind]
    damage(data)
    before, fixed = digest(data), tmp_path / 'fixed'
    assert run(data) == 1
    printed = capsys.readouterr().out
    block = printed.split(f'\n{kind}: ')[1]
    assert f'  {file}: ' in block and detail in block and KINDS[kind] in block
    report = fixed / 'found.json'  # inside of the copy, which is not there yet
    code = run(data, '--fix', str(fixed), '--json', str(report))
    printed, copy = capsys.readouterr().out.split('The copy, checked:')
    assert digest(data) == before  # the data are never changed
    (problem,) = (
        p
        for p in json.loads(report.read_text())['problems']
        if p['kind'] == kind and p['file'] == file
    )
    assert detail in problem['detail'] and repair in problem['repair']
    line = f'{file}: {problem["detail"]}: {problem["repair"] or "as it was"}'
    assert printed.count(line) == 1 == (fixed / REPORT).read_text().count(line)
    assert (code == 0) == bool(repair) == (f'\n{kind}: ' not in copy)
    if training is LOADS:
        assert_trains_loosely(data)
    else:
        with pytest.raises(training):
            assert_trains(data)
    if repair:
        assert_trains(fixed)


def assert_trains_loosely(root):
    for stem in LISTS:
        assert all(len(sample['inputs']) for sample in data_set(root, stem))


def test_the_table_in_the_docs_has_every_kind():
    page = (ROOT / 'docs' / 'reliability.md').read_text()
    (text,) = (part for part in page.split('\n## ') if part.startswith('Data\n'))
    rows = re.findall(r'^\| `([\w-]+)` \|', text, re.MULTILINE)
    assert rows == [*KINDS] and {*KINDS} == {*ROWS} | ELSEWHERE
    assert 'tests/tools/test_check_voc.py::test_row' in text


FOREIGN, UNREADABLE = 'xml-foreign', 'object-unreadable'
CVAT = '<annotations><image><box label="cat" xtl="1"/></image></annotations>'


@pytest.mark.parametrize(
    'damage, kind, detail, repair',
    [
        (put(IMAGE, b''), 'image-unreadable', 'is empty', LOST),
        (put(IMAGE, b'text'), 'image-unreadable', 'no image for OpenCV', LOST),
        (put(IMAGE, b'%!PS-Adobe-3.0 EPSF'), 'image-unreadable', 'no image', LOST),
        (put(XML, '<annotation><object>'), 'xml-unreadable', 'no element', LOST),
        (put(XML, objects() + b'\0junk'), 'xml-unreadable', 'well-formed', 'written'),
        (put(XML, CVAT), FOREIGN, 'no object of VOC, but', LOST),
        (sub('<annotation>', '<annotation xmlns="u">'), FOREIGN, '0 of 3', 'right'),
        (sub('<object>', '<Object>'), UNREADABLE, '', ''),
        (sub('<difficult>0', '<difficult>true'), UNREADABLE, "'true'", 'set to 1'),
        (sub('<difficult>0', '<difficult>1.0'), UNREADABLE, "'1.0'", 'set to 1'),
        (sub('<difficult>0', '<difficult>?'), UNREADABLE, "'?'", 'set to 0'),
        (sub('<bndbox>', '<bndbox/><bndbox>'), UNREADABLE, 'not as training', 'now'),
        (sub('<size>', '<size/><size>'), 'size-mismatch', 'None x None', 'set to'),
        (sub('>cat<', '> Cat<'), 'class-unknown', "' Cat'", "renamed 'cat'"),
        (sub('>cat<', '>cart<'), 'class-unknown', "did you mean 'cat'?", ''),
        (
            put(XML, annotation([('cat', (9, 9, 9, 9))], SIZE)),
            *(UNREADABLE, 'none of its objects is left', LOST),
        ),
        (put(LIST, '\n'.join(NAMES).encode('utf-16')), 'list-line', 'UTF-8', 'UTF-8'),
    ],
)
def test_what_else_is_found(damage, kind, detail, repair, data, tmp_path):
    damage(data)
    fixed = tmp_path / 'fixed'
    if (kind, detail) == (UNREADABLE, ''):  # <Object> without a closing tag of it
        kind, detail, repair = 'xml-unreadable', 'mismatched tag', LOST
    problems = found(data, tmp_path, '--fix', str(fixed))
    (problem,) = (p for p in problems if p['kind'] == kind)
    assert detail in problem['detail'] and repair in problem['repair']
    if repair:
        assert run(fixed) == 0
        assert_trains(fixed)


@pytest.mark.parametrize(
    'line',
    [
        *(
            'JPEGImages/NAME',
            'JPEGImages\\NAME.JPG',
            '/me/JPEGImages/NAME.jpg',
        ),
        *('Annotations/NAME.xml', './NAME', 'TRÄIN 9', '"NAME"', "'NAME',", 'NAME,1'),
        *(
            'NAME  1',
            'NAME\t0 5 cat',
            ' NAME ',
            '\ufeffNAME',
            'NAME\r',
            'tra\u0308in 9',
        ),
        *('NAME\n' + ' ' * 20000, 'NAME\n\n', '\u202eNAME\u200b'),
    ],
)
def test_what_a_line_means(line, data, tmp_path):
    for path in (data / IMAGE, data / XML):
        path.rename(path.with_stem('träin 9'))
    lines(*NAMES[1:], line.replace('NAME', 'träin 9'))(data)
    run(data, '--fix', str(tmp_path / 'fixed'))
    names = read_lines(tmp_path / 'fixed' / LIST)
    assert names == [*NAMES[1:], 'träin 9']
    assert_trains(tmp_path / 'fixed')


@pytest.mark.parametrize(
    'between', [' ', ', ', ';', '.jpg\t', *'\r\x0b\x85\u2028', '","']
)
def test_a_line_of_several_names(between, data, tmp_path):
    lines(f'["{between.join(NAMES)}"]' if between == '","' else between.join(NAMES))(
        data
    )
    run(data, '--fix', str(tmp_path / 'fixed'))
    assert read_lines(tmp_path / 'fixed' / LIST) == NAMES
    assert_trains(tmp_path / 'fixed')


def test_another_image_is_never_meant(data, tmp_path):
    lines(*NAMES, 'other/test0', 'rain0')(data)
    (data / 'JPEGImages/val').mkdir()
    shutil.copy(data / IMAGE, data / 'JPEGImages/val/x.jpg')
    lines(*NAMES, 'test/x')(data)
    kinds = [p['kind'] for p in found(data, tmp_path)]
    assert 'image-missing' in kinds


@pytest.mark.parametrize('turn', range(2, 9))
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'TIFF'])
def test_images_that_exif_turns(kind, turn, data, tmp_path):
    """Boxes fit the image as it is seen or as it is stored; the sizes may tell."""
    content, plain = fresh(kind=kind, turn=turn), fresh(kind=kind)
    seen, stored = (
        cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
        for file in (content, plain)
    )
    put(IMAGE, content)(data)
    assert (seen.shape == stored.shape) == (turn < 5)
    if turn > 4:
        put(XML, objects(size=SIZE[::-1]))(data)
        assert found(data, tmp_path) == []  # it fits what training sees
        assert_trains(data)
    put(XML, objects())(data)
    (problem,) = found(data, tmp_path)
    assert problem['kind'] == 'image-rotated'
    assert ('nothing tells' in problem['detail']) == (turn < 5)
    assert run(data, '--exif', 'seen') == int(turn > 4)
    assert run(data, '--exif', 'stored', '--fix', str(tmp_path / 'fixed')) == 0
    copy = cv2.imread(str(tmp_path / 'fixed' / IMAGE))
    assert np.array_equal(copy, stored)
    assert_trains(tmp_path / 'fixed')


def test_what_other_images_tell_about_turns(data, tmp_path):
    """One by 90 degrees, whose size tells, decides about one by 180 degrees."""
    for name, turn, size in (('train0', 3, SIZE), ('train1', 6, SIZE[::-1])):
        put(f'JPEGImages/{name}.jpg', fresh(turn, turn=turn))(data)
        put(f'Annotations/{name}.xml', objects(size=size))(data)
    assert run(data) == 0
    put('Annotations/train1.xml', objects())(data)
    assert run(data, '--fix', str(tmp_path / 'fixed')) == 0
    assert (tmp_path / 'fixed' / IMAGE).read_bytes() != (data / IMAGE).read_bytes()


def test_nothing_that_was_not_empty_becomes_empty(data, tmp_path):
    everything = [*NAMES, *read_lines(data / OTHER)]
    for stem in LISTS:  # all lists are the same
        put(f'ImageSets/Main/{stem}.txt', '\n'.join(everything))(data)
    assert run(data, '--fix', str(tmp_path / 'same')) == 1
    names = [f'ImageSets/Main/{stem}.txt' for stem in LISTS]
    assert all(read_lines(tmp_path / 'same' / name) == everything for name in names)
    # A name that is misspelt in --classes.
    arguments = ['--classes', 'cats', 'red_cell', 'dog', '--jobs', '1']
    assert main([str(data), *arguments, '--fix', str(tmp_path / 'names')]) == 1
    text = (tmp_path / 'names' / XML).read_text()
    assert text.count('<object>') == 3 and '>red_cell<' in text
    more = [*arguments, '--fix', str(tmp_path / 'asked'), '--drop-unknown']
    main([str(data), *more])
    assert '>cat<' not in (tmp_path / 'asked' / XML).read_text()
    # No image of a list can be read.
    for name in everything:
        (data / f'JPEGImages/{name}.jpg').write_bytes(b'')
    run(data, '--fix', str(tmp_path / 'empty'))
    assert read_lines(tmp_path / 'empty' / LIST) == everything


def test_copies_of_photographs(data, tmp_path, capsys):
    """By names, and by looks where size and compression differ."""
    roboflow(data)
    picture = cv2.imread(str(data / IMAGE))
    larger = cv2.resize(picture, (100, 75), interpolation=cv2.INTER_CUBIC)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 60]
    cv2.imwrite(str(data / 'JPEGImages/test1.jpg'), larger, quality)
    put('Annotations/test1.xml', objects(size=(100, 75)))(data)
    assert run(data, '--copies', str(tmp_path / 'new/pairs.csv')) == 1
    assert 'splits-copies: 2 in 1 files' in capsys.readouterr().out
    with open(tmp_path / 'new/pairs.csv', newline='') as file:
        rows = [(row['image'], row['other image']) for row in csv.DictReader(file)]
    assert sorted(rows) == [('train0', 'test1'), ('x_jpg.rf.0a1', 'x_jpg.rf.b2c')]


def test_links_pipes_and_ways_out(data, tmp_path, capsys):
    folder = data / 'JPEGImages'
    for i in range(40):  # 2^40 ways through links
        (folder / f'd{i}').mkdir()
        for name in 'ab':
            (folder / f'd{i}/{name}').symlink_to(folder / f'd{(i + 1) % 40}')
    (folder / 'self').symlink_to(folder)
    (data / IMAGE).rename(tmp_path / 'elsewhere.jpg')
    (data / IMAGE).symlink_to(tmp_path / 'elsewhere.jpg')
    assert run(data) == 0
    (folder / 'train1.jpg').unlink()
    os.mkfifo(folder / 'train1.jpg')
    for name, content in (('x.jpg', fresh(3)), ('x.xml', objects())):
        for kind in ('JPEGImages', 'Annotations'):
            (data / kind / '..' / '..' / name).write_bytes(content)
    (data / 'Annotations/up').mkdir()
    put('../x.jpg', fresh(3))(data)
    lines(*NAMES, '../../x')(data)
    fixed = tmp_path / 'deep/fixed'
    assert run(data, '--fix', str(fixed)) == 0
    assert 'a folder, a pipe, or a link to nothing' in capsys.readouterr().out
    assert read_lines(fixed / LIST) == ['train0', 'train2', 'train3', 'x']
    assert not (fixed / IMAGE).is_symlink()
    assert {p.name for p in (tmp_path / 'deep').iterdir()} == {'fixed'}
    assert_trains(fixed)
    assert run(fixed, '--fix', str(tmp_path / 'linked'), '--link') == 0
    assert (tmp_path / 'linked' / IMAGE).resolve() == (fixed / IMAGE).resolve()


def test_lists_of_one_class_and_files_that_no_list_names(data, tmp_path, capsys):
    put('ImageSets/Main/cat_train.txt', 'train0  1\ntrain1 -1\n')(data)
    put(IMAGE, None)(data)
    put('JPEGImages/more.png', b'not checked')(data)
    (data / 'SegmentationClass').mkdir()
    fixed = tmp_path / 'fixed'
    assert run(data, '--fix', str(fixed)) == 0
    out = capsys.readouterr().out
    assert '1 lists of one class' in out and '1 files that no list names' in out
    assert 'not-copied: 2\n' in out and '  SegmentationClass: XMLDataset' in out
    assert (fixed / 'ImageSets/Main/cat_train.txt').read_text() == 'train1 -1\n'
    assert (fixed / 'JPEGImages/more.png').read_bytes() == b'not checked'


@pytest.mark.parametrize(
    'lists, loses',
    [
        (dict(train='012', val='45', trainval='01245', test='67'), {}),
        (dict(train='0123', valid='34'), dict(train='3')),
        (dict(train='012', val='4', trainval='0124', test='2'), 2 * '2'),
        (dict(val='012', test='23'), dict(val='2')),
        (dict(train='012', train_small='1'), {}),
        (dict(train_fold1='01', val_fold1='23', train_fold2='23', val_fold2='01'), {}),
        (dict(train_fold1='0124', val_fold1='45'), dict(train_fold1='4')),
        (dict(train='01', fold='12'), {}),
    ],
)
def test_which_lists_may_share_images(lists, loses, data, tmp_path):
    names = [f'{stem}{i}' for stem in LISTS for i in range(4)]
    shutil.rmtree(data / 'ImageSets')
    (data / 'ImageSets/Main').mkdir(parents=True)
    if isinstance(loses, str):
        loses = dict.fromkeys(('train', 'trainval'), loses[0])
    for stem, digits in lists.items():
        text = ''.join(f'{names[int(d)]}\n' for d in digits)
        put(f'ImageSets/Main/{stem}.txt', text)(data)
    fixed = tmp_path / 'fixed'
    assert run(data, '--fix', str(fixed)) == 0
    for stem, digits in lists.items():
        left = [names[int(d)] for d in digits if d not in loses.get(stem, '')]
        assert read_lines(fixed / f'ImageSets/Main/{stem}.txt') == left


def flat(root):
    for path in [*(root / 'Annotations').iterdir(), *(root / 'JPEGImages').iterdir()]:
        path.rename(root / path.name)
    for name in ('Annotations', 'JPEGImages', 'ImageSets'):
        shutil.rmtree(root / name)
    return []


def split_folders(root):
    for path in [*(root / 'Annotations').iterdir(), *(root / 'JPEGImages').iterdir()]:
        (root / path.stem[:-1]).mkdir(exist_ok=True)
        path.rename(root / path.stem[:-1] / path.name)
    for name in ('Annotations', 'JPEGImages', 'ImageSets'):
        shutil.rmtree(root / name)
    return []


def named(root):
    (root / 'JPEGImages').rename(root / 'pictures')
    (root / 'Annotations').rename(root / 'marks')
    (root / LIST).rename(root / 'mine.txt')
    return ['--images', 'pictures', '--annotations', 'marks', '--lists', 'mine.txt']


@pytest.mark.parametrize('layout', [flat, split_folders, named])
def test_other_layouts(layout, data, tmp_path, capsys):
    arguments = layout(data)
    fixed = tmp_path / 'fixed'
    assert run(data, *arguments, '--fix', str(fixed)) == 0
    assert 'img_subdir=' in capsys.readouterr().out
    stems = sorted(path.stem for path in (fixed / 'ImageSets/Main').iterdir())
    assert stems == dict(flat=['all'], named=['mine']).get(
        layout.__name__, [*sorted(LISTS)]
    )
    assert_trains(fixed, stems)


def test_without_classes_it_asks(data, capsys):
    assert main([str(data), '--jobs', '1']) == 1
    assert "--classes 'cat' 'dog' 'red cell'" in capsys.readouterr().out


def test_several_processes_find_the_same(tmp_path, capsys):
    names = {'train': [f'{i}' for i in range(110)]}
    write(tmp_path / 'data', names, random.Random(0))
    put('JPEGImages/7.jpg', b'')(tmp_path / 'data')
    reports = []
    for jobs in '12':
        run(tmp_path / 'data', '--jobs', jobs)
        reports.append(capsys.readouterr().out)
    assert reports[0] == reports[1] and 'image-unreadable: 1 in' in reports[0]


@pytest.mark.needs_shared
def test_blood_cells(tmp_path, capsys):
    """The two boxes without area are found, and nothing else is wrong."""
    root = SHARED / 'data' / 'bccd' / 'BCCD'
    if not root.is_dir():
        pytest.skip('the data are not there: bccd in a folder beside the checkout')
    fixed = ['--fix', str(tmp_path / 'fixed'), '--link']
    assert main([str(root), '--classes', 'RBC', 'WBC', 'Platelets', *fixed]) == 0
    out = capsys.readouterr().out
    assert 'box-zero-area: 2 in 2 files' in out and '\nproblems: 2\n' in out
