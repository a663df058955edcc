"""Bring the archives of Omniglot into the layout of mmdet's ReIDDataset.

    python tools/dataset_tools/omniglot.py images_background_small1.zip \\
        images_background_small2.zip --out data/omniglot

The archives are those of https://github.com/brendenlake/omniglot (MIT). Characters of
the first one are to train, those of alphabets that only the second one has to test. OUT
gets images of ``--size`` pixels in ``imgs`` and lists of them in ``meta``, a name and
the number of the character in each line: ``train.txt`` and ``test.txt``, and of the
alphabets to train ``tuning-train.txt`` and, of the last two, ``tuning-test.txt``, to
choose settings by.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Iterable, Sequence

from PIL import Image
from tqdm import tqdm

HELD_BACK = 2
# The names of the images of each character, by alphabet.
Alphabets = dict[str, dict[str, list[str]]]


def alphabets(archive: zipfile.ZipFile) -> Alphabets:
    """Return what an archive holds: FOLDER/ALPHABET/CHARACTER/IMAGE.png.

    Raises:
        ValueError: If it holds no such file.
    """
    found: Alphabets = defaultdict(lambda: defaultdict(list))
    for name in sorted(archive.namelist()):
        parts = PurePosixPath(name).parts
        if len(parts) == 4 and name.endswith('.png'):
            found[parts[1]][parts[2]].append(name)
    if not found:
        raise ValueError(
            f'{archive.filename} must hold FOLDER/ALPHABET/CHARACTER/IMAGE.png, as the '
            'archives images_background_small1.zip and images_background_small2.zip do'
        )
    return found


def write_list(path: Path, names: Iterable[str], parts: Alphabets) -> None:
    """Write the images of some alphabets, and the number of the character of each."""
    lines, number = [], 0
    for name in names:
        for character in parts[name].values():
            lines += [f'{name}/{PurePosixPath(n).name} {number}\n' for n in character]
            number += 1
    path.write_text(''.join(lines), encoding='utf-8')
    print(f'{path}: {len(lines)} images of {number} characters')


def convert(train: Path, test: Path, out: Path, size: int) -> None:
    """Write images and lists.

    Raises:
        ValueError: If an archive holds something else, or nothing is left to test.
    """
    with zipfile.ZipFile(train) as first, zipfile.ZipFile(test) as second:
        known, others = alphabets(first), alphabets(second)
        new = sorted(set(others) - set(known))
        if not new or len(known) <= HELD_BACK:
            raise ValueError(
                f'expected more than {HELD_BACK} alphabets in {train}, got {len(known)}'
                f', and in {test} others than these, got {new}'
            )
        (out / 'meta').mkdir(parents=True, exist_ok=True)
        every = [(first, known, sorted(known)), (second, others, new)]
        for archive, parts, names in every:
            for name in tqdm(names, desc=str(archive.filename), disable=None):
                (out / 'imgs' / name).mkdir(parents=True, exist_ok=True)
                for path in (path for paths in parts[name].values() for path in paths):
                    with archive.open(path) as file, Image.open(file) as image:
                        gray = image.convert('L')
                    small = gray.resize((size, size), Image.Resampling.BOX)
                    small.save(out / 'imgs' / name / PurePosixPath(path).name)
    meta, own = out / 'meta', sorted(known)
    write_list(meta / 'train.txt', own, known)
    write_list(meta / 'tuning-train.txt', own[:-HELD_BACK], known)
    write_list(meta / 'tuning-test.txt', own[-HELD_BACK:], known)
    write_list(meta / 'test.txt', new, others)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('train', type=Path, metavar='TRAIN.zip')
    parser.add_argument('test', type=Path, metavar='TEST.zip')
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--size', type=int, default=28, help='pixels (default: 28)')
    args = parser.parse_args(argv)
    try:
        convert(args.train, args.test, args.out, args.size)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f'omniglot: {error}')


if __name__ == '__main__':
    main()
