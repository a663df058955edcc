"""Where the files of a VOC data set are, and what its lists name."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, Sequence

from tools.dataset_tools.voc_files import Problem, read_file
from tools.dataset_tools.voc_xml import encodings

MAIN = 'ImageSets/Main'
SUFFIXES = (
    *('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif', '.jpe'),
    *('.jfif', '.jp2', '.ppm', '.pgm', '.avif'),
)
_ROLES = re.compile(r'trainval|training|train|validation|valid|val|testing|test', re.I)
_LONGEST = 1000
_BETWEEN = re.compile(r'[\s,;|]+')
_REPORTS = ('check_voc_report.txt', 'to_voc_report.txt')


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder and its files; real folders first, linked ones once."""
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        for place, folders, names in os.walk(waiting.pop()):
            key = (os.stat(place).st_dev, os.stat(place).st_ino)
            if key in seen:
                folders.clear()
                continue
            seen.add(key)
            folders.sort()
            paths = [Path(place, name) for name in folders]
            waiting += [path for path in reversed(paths) if path.is_symlink()]
            yield Path(place), sorted(n for n in names if Path(place, n).is_file())


def _key(name: str) -> str:
    """Reduce a name to what spellings of it on different systems share."""
    content = name.encode('utf-8', 'surrogateescape')
    text, _ = next(iter(encodings(content)))
    return unicodedata.normalize('NFC', text).casefold()


class Index:
    """The files of a kind in a folder, by name without suffix.

    Args:
        root: The root of the data.
        folder: The folder in it.
        suffix: The suffix that XMLDataset wants.
        others: What else may be such a file.
    """

    def __init__(
        self, root: Path, folder: str, suffix: str, others: Sequence[str] = ()
    ) -> None:
        self.root, self.folder, self.suffix = root, folder, suffix
        self.files: dict[str, list[str]] = defaultdict(list)
        order = (suffix, *others)
        for place, names in walk(root / folder):
            for name in names:
                stem, end = os.path.splitext(name)
                if end.lower() in order:
                    stem = os.path.relpath(place / stem, root / folder)
                    path = os.path.join(folder, stem + end)
                    self.files[stem].append(path)
        for paths in self.files.values():
            paths.sort(key=lambda p: (p[-4:] != suffix, order.index(_end(p)), p))
        self.alike: dict[str, set[str]] = defaultdict(set)
        for stem in self.files:
            self.alike[_key(stem)].add(stem)
            # Without its folders, with which no name begins.
            self.alike[f'/{_key(os.path.basename(stem))}'].add(stem)

    def find(self, name: str) -> tuple[str, ...]:
        """Return the files of a name, the one that training reads first."""
        expected = os.path.join(self.folder, f'{name}{self.suffix}')
        found = self.files.get(name, [])
        if expected not in found and os.path.isfile(self.root / expected):
            return (expected, *found)
        return tuple(found)


def _end(path: str) -> str:
    return os.path.splitext(path)[1].lower()


@dataclass
class ImageList:
    """A list of images.

    Attributes:
        stem: Its file's name without .txt.
        names: The images as the repaired list has them, each once.
        problems: What is wrong with its lines.
        file: Its file, relative to the root of the data; empty for what is no list but
            a folder of images.
        told: What else tells its role, such as the part of a config.
    """

    stem: str
    names: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    file: str = ''
    told: str = ''

    @property
    def place(self) -> str:
        """What reports call it."""
        return self.file or f'{MAIN}/{self.stem}.txt'

    @property
    def role(self) -> tuple[str, str] | None:
        """One of train, trainval, val and test, and the rest of the name."""
        found = _ROLES.search(self.told or self.stem)
        if found is None:
            return None
        word = found[0].lower()
        role = 'val' if word.startswith('val') else word.replace('ing', '')
        rest = '' if self.told else self.stem.lower().replace(word, '', 1)
        return role, rest


class Names:
    """Finds the image that a line of a list means."""

    def __init__(self, images: Index, xmls: Index) -> None:
        self.images, self.xmls = images, xmls

    def __contains__(self, name: str) -> bool:
        return bool(name and (self.images.find(name) or self.xmls.find(name)))

    def whole(self, name: str) -> bool:
        """Tell whether there are an image and an annotation of a name."""
        return bool(name and self.images.find(name) and self.xmls.find(name))

    def _unique(self, name: str, alone: bool) -> str | None:
        if name in self:
            return name
        for key in (_key(name), f'/{_key(name)}')[: 1 + alone]:
            for index in (self.images, self.xmls):
                alike = index.alike.get(key, ())
                if len(alike) == 1:
                    return next(iter(alike))
        return None

    def meant(self, line: str) -> str:
        """Return the name that a line probably means."""
        if self.whole(line):
            return line
        if len(line) > _LONGEST:
            return line[:_LONGEST].strip()
        part = line if line in self else ''
        whole = (
            line.replace('\0', '')
            .strip()
            .strip('\ufeff"\'`,;[]')
            .strip()
            .replace('\\', '/')
        )
        columns = _BETWEEN.split(whole)
        texts = (whole, *whole.split(',')[:1], *whole.split('\t')[:1], columns[0])
        # Marks that nobody sees, such as those of the direction of writing.
        visible = ''.join(c for c in whole if unicodedata.category(c) != 'Cf')
        for text in dict.fromkeys((*texts, ' '.join(columns[:-1]), visible)):
            text = text.strip('"\'` ')
            stem, suffix = os.path.splitext(text)
            for name in (text, stem)[: 1 + (suffix.lower() in (*SUFFIXES, '.xml'))]:
                parts = [part for part in name.split('/') if part not in ('', '.')]
                for start in range(min(len(parts), 20)):
                    found = self._unique('/'.join(parts[start:]), start == 0)
                    if found is not None and self.whole(found):
                        return found
                    part = part or found or ''
        return part or whole

    def all_meant(self, line: str) -> list[str]:
        """Return the names that a line probably means, several where it has them."""
        if self.whole(line):
            return [line]
        names = []
        for part in [*filter(None, line.splitlines())] or ['']:
            found = self.meant(part)
            columns = _BETWEEN.split(part.strip())
            # A second column may be a flag of VOC's.
            each = [self.meant(c) for c in columns if c not in ('', '-1', '0', '1')]
            named = _BETWEEN.search(found) and self.whole(found)
            if named or not all(map(self.whole, each)):
                each = []
            names += dict.fromkeys(each) or [found]
        return names

    def lines(self, path: Path) -> tuple[list[str], str]:
        """Read the lines of a list as mmengine does: with all spaces in them.

        Returns:
            The lines, and what is wrong with the whole file.
        """
        content = read_file(path)
        try:
            text = content.decode('utf-8')
        except UnicodeDecodeError as error:
            # The encoding under which most names are found.
            texts = {name: text for text, name in encodings(content)}
            scores = {
                name: sum(self.meant(line) in self for line in text.split('\n')[:200])
                for name, text in texts.items()
            }
            best = max(scores, key=scores.get)
            return split_lines(texts[best]), f'is not UTF-8: {error.reason}; is {best}'
        return split_lines(text), ''


def split_lines(text: str) -> list[str]:
    """Split a list as mmengine does."""
    lines = text.split('\n')
    return [line.rstrip('\r') for line in (lines if lines[-1] else lines[:-1])]


def read_lines(path: Path) -> list[str]:
    """Read the lines of a list that is in order."""
    return split_lines(path.read_bytes().decode('utf-8'))


def read_list(path: Path, file: str, known: Names, told: str = '') -> ImageList:
    """Read a list, and repair its lines."""
    found = ImageList(path.stem, file=file, told=told)
    lines, wrong = known.lines(path)

    def note(kind: str, detail: str, repair: str) -> None:
        found.problems.append(Problem(kind, file, detail, repair))

    if wrong:
        note('list-line', wrong, 'written in UTF-8')
    seen: Counter[str] = Counter()
    for number, line in enumerate(lines, 1):
        names = known.all_meant(line)
        if names != [line] or not line:
            repair = (
                f'read as {", ".join(map(repr, names))}' if any(names) else 'dropped'
            )
            note('list-line', f'line {number}: {line[:80]!r}', repair)
        seen.update(filter(None, names))
    for name, count in seen.items():
        if count > 1:
            note('list-repeats', f'{name} is listed {count} times', 'listed once')
    if not seen:
        note('list-empty', 'names no image', '')
    found.names = list(seen)
    return found


def per_class(stem: str, lines: Sequence[str], stems: Sequence[str]) -> bool:
    """Tell VOC's lists of one class, like ``cat_train``, whose rows end in a flag."""
    split = any(stem.endswith(f'_{other}') for other in stems)
    flagged = all(line.split()[1:] in (['-1'], ['0'], ['1']) for line in lines)
    return bool(lines) and split and flagged


def _from_folders(known: Names) -> list[ImageList]:
    """Take folders named train, val and test for lists, else all files for one."""
    lists: dict[str, ImageList] = {}
    for name in sorted({*known.images.files, *known.xmls.files}):
        found = _ROLES.findall(os.path.dirname(name))
        stem = ImageList(found[-1]).role[0] if found else 'all'
        lists.setdefault(stem, ImageList(stem)).names.append(name)
    return list(lists.values())


def read_lists(
    root: Path, only: Sequence[str] | None, known: Names
) -> tuple[list[ImageList], list[Path], list[str]]:
    """Read all lists, or those named.

    Returns:
        The lists, VOC's per-class lists, and notes.

    Raises:
        ValueError: If there is not one that is named, or nothing at all.
    """
    folders = [root / MAIN, root / 'ImageSets', root]
    paths: dict[str, Path] = {}
    for folder in folders:
        if not paths:
            found = sorted(folder.glob('*.txt'))
            paths = {p.stem: p for p in found if p.is_file() and p.name not in _REPORTS}
    for name in only or ():
        for path in (root / name, Path(name)):
            if path.is_file():
                paths[name] = path
    missing = [name for name in only or () if name not in paths]
    if missing:
        raise ValueError(
            f'expected {" and ".join(missing)} as .txt in {root / MAIN}, '
            f'found {", ".join(paths) or "none"}'
        )
    lists, classwise, notes = [], [], []
    for stem in only or paths:
        path = paths[stem]
        if not only and per_class(stem, known.lines(path)[0], [*paths]):
            classwise.append(path)
            continue
        found = read_list(path, os.path.relpath(path, root), known)
        if only or found.role or any(name in known for name in found.names):
            lists.append(found)
        else:
            notes.append(f'{found.file} names no image that is here: taken for no list')
    if not lists:
        lists = _from_folders(known)
        notes.append(
            'no lists of images: all files are checked, by their folders. XMLDataset '
            'needs lists; --fix writes them, and to_voc draws splits'
        )
    if not any(each.names for each in lists) and not any(e.file for e in lists):
        raise ValueError(f'{root} has neither lists of images nor images')
    return lists, classwise, notes
