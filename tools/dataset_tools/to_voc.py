"""Bring images and annotations of your own into PASCAL VOC layout, with splits.

    python tools/dataset_tools/to_voc.py my_data --out data/own

Each SOURCE is a folder or a file, and is never changed: images beside their XML files,
or in a folder of their own (``images``, ``annotations``), or images and COCO's JSON.
OUT gets ``Annotations``, ``JPEGImages`` and ``ImageSets/Main`` with ``train.txt``,
``val.txt``, ``trainval.txt`` and ``test.txt``.

Splits are those of the source, where its folders or its JSON files are named train, val
(or valid) and test. Else they are drawn, with a seed, so that every class is in all of
them as far as that goes, and that images of one source stay together: identical files,
copies that Roboflow made (``NAME_jpg.rf.HASH.jpg``), and images of a folder whose names
differ in a last number alone, like frames of a video, if there are several such groups.

What is damaged is repaired or left out as check_voc.py does it. OUT/to_voc_report.txt
lists all that differs from the source.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import random
import re
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterable, Mapping, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.wrong_calls import Parser, at_least
from tools.dataset_tools.check_voc import report
from tools.dataset_tools.splits import ROBOFLOW
from tools.dataset_tools.voc_data import check
from tools.dataset_tools.voc_files import ANNOTATIONS, IMAGES, Settings, read_file
from tools.dataset_tools.voc_fix import check_out, make_plan, new_folder, write_files
from tools.dataset_tools.voc_images import read_image
from tools.dataset_tools.voc_lists import MAIN, SUFFIXES, ImageList
from tools.dataset_tools.voc_xml import read_xml

SPLITS = ('train', 'val', 'test')
OWN_REPORT = 'to_voc_report.txt'
_TOLD = re.compile(r'(?<![a-z])(train|test|val|valid|validation)(?![a-z])', re.I)
_NUMBER = re.compile(r'[\W_]*(frame|image|img)?[\W_]*\d+$', re.I)


@dataclasses.dataclass
class Item:
    """An image with its annotation.

    Attributes:
        image: Its file.
        name: What the lists call it.
        xml: Its annotation in VOC's XML.
        classes: How many objects of each name it has.
        split: The split that its source tells; empty where it tells none.
        source: What must stay in one split with it, as far as its name tells.
    """

    image: Path
    name: str
    xml: bytes
    classes: Counter[str]
    split: str = ''
    source: str = ''


def _files(sources: Sequence[Path]) -> list[tuple[Path, Path]]:
    """List all files, and the source that each is from; links are not followed."""
    found = {}
    for source in sources:
        if source.is_file():
            found[source] = source.parent
        elif not source.is_dir():
            raise ValueError(f'SOURCE must be a folder or a file, got {source}')
        for folder, folders, names in os.walk(source):
            folders.sort()
            for link in (Path(folder, name) for name in folders):
                if link.is_symlink():
                    found[link] = source  # not followed, and reported
            for path in (Path(folder, name) for name in sorted(names)):
                if path.is_file() and not path.name.startswith('.'):
                    found.setdefault(path, source)
    return list(found.items())


def _told(path: Path, source: Path) -> str:
    """Return the split that folders tell, and a JSON file by its own name."""
    place = path if path.suffix.lower() == '.json' else path.parent
    words = _TOLD.findall(str(place.relative_to(source.parent)))
    word = words[-1].lower() if words else ''
    return 'val' if word.startswith('v') else word


def _counts(root: ET.Element) -> Counter[str]:
    return Counter(str(each.findtext('name')) for each in root.findall('object'))


def _element(parent: ET.Element, tag: str, **children: object) -> ET.Element:
    found = ET.SubElement(parent, tag)
    for key, value in children.items():
        ET.SubElement(found, key).text = str(value)
    return found


def _annotation(image: Path, objects: Iterable[tuple[str, bool, list[int]]]) -> bytes:
    """Write VOC's XML, with the size that the image has."""
    root = ET.Element('annotation')
    ET.SubElement(root, 'filename').text = image.name
    # A damaged image has no size; check_voc.py tells of it.
    picture = read_image(read_file(image))
    if picture:
        width, height = picture.size
        _element(root, 'size', width=width, height=height, depth=3)
    for name, difficult, box in objects:
        found = _element(root, 'object', name=name, difficult=int(difficult))
        _element(found, 'bndbox', **dict(zip(('xmin', 'ymin', 'xmax', 'ymax'), box)))
    return ET.tostring(root, encoding='utf-8')


class Reader:
    """Pairs images with annotations, and notes what it leaves out.

    Args:
        files: The files, with the source of each.
        background: Whether images without annotation count as such without objects.

    Attributes:
        items: What was found.
        left: A line for each file that is left out.
        notes: What else is worth knowing.
    """

    def __init__(self, files: Sequence[tuple[Path, Path]], background: bool) -> None:
        self.items: list[Item] = []
        self.left: list[str] = []
        self.notes: list[str] = []
        kinds: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
        for path, source in files:
            suffix = path.suffix.lower()
            kinds['image' if suffix in SUFFIXES else suffix].append((path, source))
        self.images = dict(kinds.pop('image', []))
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in self.images:
            for name in {path.name, path.stem}:
                self._by_name[name].append(path)
        xmls, jsons = kinds.pop('.xml', []), kinds.pop('.json', [])
        if not xmls:
            for path, source in jsons:
                self._read_coco(path, source)
        for path, source in xmls:
            self._read_xml(path, source)
        if xmls and jsons:
            self.left += [
                f'{path}: not read, since there are XML files' for path, _ in jsons
            ]
        used = {item.image for item in self.items}
        for path, source in self.images.items():
            if path in used:
                continue
            if background:
                self._add(path, source, _annotation(path, ()), Counter(), path)
            else:
                self.left.append(
                    f'{path}: no annotation; --background keeps it as an image without '
                    'objects'
                )
        for others in kinds.values():
            for path, _ in others:
                what = (
                    'a link to a folder' if path.is_dir() else 'no image, XML or JSON'
                )
                self.left.append(f'{path}: {what}')
        self._name()

    def _find(self, name: str, near: Path, root: Path) -> Path | None:
        """Return the image of a name in an annotation, from the likeliest folder."""
        name = name.replace('\\', '/')

        def alike(path: Path) -> tuple[bool, bool, int]:
            return (
                f'/{path.as_posix()}'.endswith(f'/{name}'),
                _told(path, self.images[path]) == _told(near, root),
                len({*path.parent.parts} & {*near.parent.parts}),
            )

        found = sorted(self._by_name[Path(name).name], key=alike)
        unique = len(found) == 1 or (found and alike(found[-1]) > alike(found[-2]))
        return found[-1] if unique else None

    def _add(
        self, image: Path, source: Path, xml: bytes, classes: Counter[str], told: Path
    ) -> None:
        split = _told(told, source) or _told(image, self.images[image])
        self.items.append(Item(image, image.stem, xml, classes, split))

    def _read_xml(self, path: Path, source: Path) -> None:
        content = path.read_bytes()
        try:
            root, _ = read_xml(content)
        except ValueError as error:
            self.left.append(f'{path}: {error}')
            return
        if root.tag != 'annotation' and root.find('object') is None:
            self.left.append(f'{path}: XML of another kind, <{root.tag}>')
            return
        image = self._find(path.stem, path, source) or self._find(
            root.findtext('filename') or path.stem, path, source
        )
        if image is None:
            self.left.append(f'{path}: no image of this name, or several')
        else:
            self._add(image, source, content, _counts(root), path)

    def _read_coco(self, path: Path, source: Path) -> None:
        from pycocotools.coco import COCO

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                coco = COCO(path)
            names = {key: str(each['name']) for key, each in coco.cats.items()}
            images = [*coco.imgs.values()]
            if not (names and images):
                raise ValueError('it has no images or no categories')
        except Exception as error:  # whatever another kind of JSON leads to
            self.left.append(f'{path}: not in COCO format: {error!r}')
            return
        for entry in images:
            file = str(entry['file_name'])
            image = self._find(file, path, source)
            if image is None:
                self.left.append(f'{path}: {file}: no image of this name, or several')
                continue
            objects = []
            for each in coco.imgToAnns[entry['id']]:
                x, y, width, height = each.get('bbox') or (0, 0, 0, 0)
                # VOC counts from 1, and both ends are in the box.
                box = [x + 1, y + 1, x + width, y + height]
                name = names.get(each['category_id'], str(each['category_id']))
                rounded = [int(value + 0.5) for value in box]
                objects.append((name, bool(each.get('iscrowd')), rounded))
            classes = Counter(name for name, _, _ in objects)
            self._add(image, source, _annotation(image, objects), classes, path)

    def _name(self) -> None:
        """Give each item a name of its own."""
        once, items = set(), []
        for item in self.items:
            if item.image in once:
                self.left.append(f'{item.image}: a second annotation of this image')
            else:
                once.add(item.image)
                items.append(item)
        self.items = items
        same = Counter(item.name.casefold() for item in items)
        taken: set[str] = set()
        for item in items:
            clean = re.sub(r'\s+', '_', item.name.strip())
            if same[item.name.casefold()] > 1:
                clean = f'{item.image.parent.name}_{clean}'
            name, number = clean, 2
            while name.casefold() in taken:
                name, number = f'{clean}_{number}', number + 1
            taken.add(name.casefold())
            if name != item.name:
                self.notes.append(f'{item.image}: is called {name}')
            item.name = name


def _sources(items: Sequence[Item], pattern: str | None) -> str:
    """Note the source of each item, and return how that was found."""
    known = {name.casefold() for item in items for name in item.classes}
    groups: dict[str, list[Item]] = defaultdict(list)
    copies: Counter[str] = Counter()
    for item in items:
        stem, folder = item.image.stem, item.image.parent
        item.source = str(item.image)
        if ROBOFLOW.search(stem):  # also from one folder to another
            stem, folder = ROBOFLOW.sub('', stem), Path('copies')
            item.source = str(folder / stem)
            copies[item.source] += 1
        start = _NUMBER.sub('', stem)
        # Files and folders often begin with what they show: that is no source.
        telling = (start or folder.name).casefold() not in known
        groups[str(folder / f'{start}#') if telling else item.source].append(item)
    extra = copies.total() - len(copies)
    note = f'; {extra} images are copies that Roboflow made' if extra else ''
    if pattern and pattern != 'none':
        for item in items:
            match = re.search(pattern, item.image.stem)
            if match:
                item.source = match[match.re.groups and 1]
        return f'{len({i.source for i in items})}, by --source-of {pattern!r}{note}'
    key, largest = max(groups.items(), key=lambda pair: len(pair[1]))
    few = len(groups) < len(SPLITS) or len(largest) > 0.6 * len(items)
    if pattern == 'none' or few or len(largest) == 1:
        return (
            f'names tell none, so each image counts as its own{note}. If images are '
            'frames of a few videos, the test is too easy, since neighbours are alike: '
            '--source-of REGEX names the part of a file name that tells the video'
        )
    for source, group in groups.items():
        for item in group:
            item.source = source
    return (
        f'{len(groups)}, by what stands before the last number in a name, like '
        f'{Path(key).name.rstrip("#") or Path(key).parent.name!r} with {len(largest)} '
        f'images{note}; --source-of none ignores that'
    )


def _join_identical(items: Sequence[Item], digests: Mapping[str, object]) -> None:
    """Give identical files one source, and all that belongs to them."""
    parent: dict[object, object] = {}

    def root(key: object) -> object:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for item in items:
        parent[root((digests[item.name], 'file'))] = root(item.source)
    for item in items:
        item.source = str(root(item.source))


def draw_splits(
    items: Sequence[Item], shares: Mapping[str, float], seed: int
) -> dict[str, list[Item]]:
    """Deal whole sources to splits, those of the rarest class first.

    Each goes where most of its rarest class is missing, and then most images are
    (Sechidis et al., On the stratification of multi-label data, 2011). The last ones of
    a class go where it does not occur yet.
    """
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.source].append(item)
    content = {
        key: sum((item.classes for item in group), Counter())
        for key, group in groups.items()
    }
    left = Counter(name for classes in content.values() for name in classes)
    total = sum(content.values(), Counter())
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    rarest = {
        key: min(content[key], key=lambda name: (left[name], name), default='')
        for key in order
    }
    left[''] = sum(not classes for classes in content.values())
    order.sort(key=lambda key: left[rarest[key]] if content[key] else len(items))
    splits: dict[str, list[Item]] = {split: [] for split in shares}
    have: dict[str, Counter[str]] = {split: Counter() for split in shares}

    def missing(split: str, name: str) -> tuple[float, float]:
        images = shares[split] - len(splits[split]) / len(items)
        return shares[split] - have[split][name] / max(total[name], 1), images

    for key in order:
        name = rarest[key]
        without = [split for split in shares if not have[split][name]]
        among = without if left[name] <= len(without) else list(shares)
        chosen = max(among, key=lambda split: missing(split, name))
        splits[chosen] += groups[key]
        have[chosen].update(content[key])
        left.subtract(dict.fromkeys(content[key] or [''], 1))
    return splits


def make_splits(
    items: Sequence[Item], shares: Mapping[str, float], seed: int, resplit: bool
) -> tuple[dict[str, list[Item]], str]:
    """Return the splits, and how they were made."""
    told = {name: [item for item in items if item.split == name] for name in SPLITS}
    if resplit or not (all(item.split for item in items) and told['train']):
        return draw_splits(items, shares, seed), f'drawn with seed {seed}'
    if not (told['val'] or told['test']):
        return draw_splits(items, shares, seed), f'drawn with seed {seed}'
    how = 'as folders or files are named in the source'
    if not (told['val'] and told['test']):
        told['test'] = told['test'] or told['val']
        both = shares['train'] + shares['val']
        parts = {name: shares[name] / both for name in ('train', 'val')}
        told.update(draw_splits(told['train'], parts, seed))
        how += f', but val, which was drawn from train with seed {seed}'
    tested = {item.source for item in told['test']}
    both = sum(
        item.source in tested for name in ('train', 'val') for item in told[name]
    )
    if both:
        how += (
            f'. {both} images of train and val have their source in test too, whose AP '
            'is too high then; --resplit draws other splits'
        )
    return told, how


def convert(
    args: argparse.Namespace, folder: Path, out: Path
) -> tuple[list[str], list[str], list[str]]:
    """Write the data set into ``out``, by way of a folder of links.

    Returns:
        The classes, what was done, and what differs from the source, in lines.

    Raises:
        ValueError: If there are too few images with an annotation.
    """
    reader = Reader(_files(args.sources), args.background)
    items = reader.items
    if len(items) < len(SPLITS):
        reasons = ''.join(f'\n  {line}' for line in reader.left[:10])
        raise ValueError(
            f'expected {len(SPLITS)} or more images with an annotation, XML of VOC or '
            f'JSON of COCO, got {len(items)} with and {len(reader.images)} in all. '
            f'Left out:{reasons or " nothing"}'
        )
    found = sum((item.classes for item in items), Counter())
    classes = args.classes or sorted(found)
    draft = folder / 'draft'
    for part in (ANNOTATIONS, IMAGES, MAIN):
        (draft / part).mkdir(parents=True)
    for item in items:
        # Readers go by the content; XMLDataset wants this suffix.
        (draft / IMAGES / f'{item.name}.jpg').symlink_to(item.image.resolve())
        (draft / ANNOTATIONS / f'{item.name}.xml').write_bytes(item.xml)
    every = draft / MAIN / 'all.txt'
    every.write_text(''.join(f'{item.name}\n' for item in items), encoding='utf-8')
    settings = Settings(draft, classes=(*classes,), drop_unknown=True)
    checked = check(settings, jobs=args.jobs)
    every.unlink()

    usable = [item for item in items if checked.examined[item.name].usable]
    for item in usable:
        item.classes = checked.examined[item.name].counting
    how_sources = _sources(usable, args.source_of)
    digests = {item.name: checked.examined[item.name].digest for item in usable}
    _join_identical(usable, digests)
    shares = {name: part / sum(args.split) for name, part in zip(SPLITS, args.split)}
    splits, how = make_splits(usable, shares, args.seed, args.resplit)
    lists = dict(splits, trainval=[*splits['train'], *splits['val']])
    checked = dataclasses.replace(
        checked,
        lists=[
            ImageList(name, sorted(item.name for item in members))
            for name, members in lists.items()
        ],
        problems=[p for p in checked.problems if p.kind != 'class-empty'],
    )
    plan = make_plan(checked)
    write_files(checked, plan, out)
    changes = [
        f'{p.file}: {p.kind}: {p.detail}: {p.repair}' for p in plan.problems if p.repair
    ]
    changes += [line for lines in plan.changes.values() for line in lines]
    renamed = [str(i.image) for i in usable if i.image.suffix.lower() != '.jpg']
    done = [
        f'images: {len(usable)} of {len(reader.images)}',
        f'splits: {how}',
        f'sources of images: {how_sources}',
    ]
    if renamed:
        done.append(
            f'{len(renamed)} images are called .jpg and are as they were, such as '
            f'{renamed[0]}: readers go by the content'
        )
    plain = defaultdict(set)
    for name in found:
        plain[re.sub(r'[\W_]+', '', name).casefold()].add(name)
    done += [
        f'{" and ".join(map(repr, sorted(same)))} look like one class; --classes makes '
        'them one'
        for same in plain.values()
        if len(same) > 1 and not args.classes
    ]
    return classes, done, [*reader.left, *reader.notes, *changes]


def parse(argv: Sequence[str] | None) -> tuple[Parser, argparse.Namespace]:
    """Read the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('sources', nargs='+', type=Path, metavar='SOURCE')
    parser.add_argument('--out', required=True, type=Path, help='the new folder')
    parser.add_argument(
        '--classes', nargs='+', metavar='NAME', help='drop others (default: all found)'
    )
    parser.add_argument(
        '--split',
        nargs=3,
        type=float,
        default=(0.7, 0.1, 0.2),
        metavar=('TRAIN', 'VAL', 'TEST'),
        help='shares of the images (default: 0.7 0.1 0.2)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='of the splits (default: 0)'
    )
    parser.add_argument(
        '--resplit', action='store_true', help='draw splits that the source has, anew'
    )
    parser.add_argument(
        '--source-of',
        metavar='REGEX',
        help='the part of a name that tells the source of an image, like ^[^_]+; none: '
        'names tell nothing',
    )
    parser.add_argument(
        '--background',
        action='store_true',
        help='keep images without annotation, as such without objects',
    )
    parser.add_argument('--jobs', type=at_least(1), default=os.cpu_count(), metavar='N')
    args = parser.parse_args(argv)
    if min(args.split) <= 0:
        parser.error(f'--split must be three numbers above 0, got {args.split}')
    try:
        re.compile(args.source_of or '')
    except re.error as error:
        parser.error(
            f'--source-of {args.source_of!r} is no regular expression: {error}'
        )
    return parser, args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser, args = parse(argv)
    with parser.refusing():
        for source in args.sources:
            check_out(args.out, source, '--out')
        with new_folder(args.out) as draft, tempfile.TemporaryDirectory() as folder:
            classes, done, changes = convert(args, Path(folder), draft)
            lines = [*done, f'differences from the source: {len(changes)}', *changes]
            text = '\n'.join([*lines, ''])
            (draft / OWN_REPORT).write_text(text, 'utf-8', 'backslashreplace')
        print('\n'.join(lines[: len(done) + 11]))
        if len(changes) > 10:
            print(f'and {len(changes) - 10} more, in {args.out / OWN_REPORT}')
        checked = check(Settings(args.out, classes=(*classes,)), jobs=args.jobs)
        print(f'\nThe result, checked:\n{report(checked, 10)}')
    names = ', '.join(map(repr, classes)) + ',' * (len(classes) == 1)
    print(
        f'\nIn a config that inherits one of own_data:\n'
        f"data_root = '{args.out.resolve()}/'\nclasses = ({names})"
    )
    return int(bool(checked.problems))


if __name__ == '__main__':
    sys.exit(main())
