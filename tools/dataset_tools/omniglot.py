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
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from PIL import Image
from tqdm import tqdm

from tools.common.wrong_calls import Parser, at_least, readable_file, writable_folder

HELD_BACK = 2


def members(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """Return the files of each alphabet: FOLDER/ALPHABET/CHARACTER/IMAGE.png.

    Raises:
        ValueError: If there is no such file.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(archive.namelist()):
        parts = PurePosixPath(name).parts
        # Not above the folder that is written.
        if len(parts) == 4 and name.endswith('.png') and '..' not in parts:
            found.setdefault(parts[1], []).append(name)
    if not found:
        raise ValueError(
            f'{archive.filename} must hold FOLDER/ALPHABET/CHARACTER/IMAGE.png, as the '
            'archives images_background_small1.zip and images_background_small2.zip do'
        )
    return found


def _open(file: IO[bytes]) -> Image.Image:
    # Of some other formats Pillow would start programs.
    return Image.open(file, formats=['PNG'])


def convert(train: Path, test: Path, out: Path, size: int) -> None:
    """Write images and lists.

    Raises:
        ValueError: If an archive holds something else, or nothing is left to test.
    """
    with zipfile.ZipFile(train) as first, zipfile.ZipFile(test) as second:
        known, others = members(first), members(second)
        own, new = sorted(known), sorted(set(others) - set(known))
        if not new or len(own) <= HELD_BACK:
            raise ValueError(
                f'expected more than {HELD_BACK} alphabets in {train}, got {own}, and '
                f'in {test} others than these, got {new}'
            )
        (out / 'meta').mkdir(parents=True, exist_ok=True)
        for name, archive, files, alphabets in (
            ('train', first, known, own),
            ('test', second, others, new),
            ('tuning-train', first, known, own[:-HELD_BACK]),
            ('tuning-test', first, known, own[-HELD_BACK:]),
        ):
            paths = [PurePosixPath(path) for of in alphabets for path in files[of]]
            lines, numbers = [], {}
            for path in tqdm(paths, desc=name, disable=None):
                number = numbers.setdefault(path.parent, len(numbers))
                lines.append(f'{path.parts[1]}/{path.name} {number}\n')
                target = out / 'imgs' / path.parts[1] / path.name
                if name in ('train', 'test'):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(str(path)) as file, _open(file) as image:
                        gray = image.convert('L')
                    gray.resize((size, size), Image.Resampling.BOX).save(target)
            (out / 'meta' / f'{name}.txt').write_text(''.join(lines), encoding='utf-8')
            print(f'{name}: {len(lines)} images of {len(numbers)} characters')


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('train', type=readable_file, metavar='TRAIN.zip')
    parser.add_argument('test', type=readable_file, metavar='TEST.zip')
    parser.add_argument('--out', type=writable_folder, required=True)
    parser.add_argument(
        '--size', type=at_least(1), default=28, help='pixels (default: 28)'
    )
    args = parser.parse_args(argv)
    # What reading damaged, encrypted or strangely compressed archives raises.
    damages = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
    with parser.refusing(*damages, Image.DecompressionBombError):
        convert(args.train, args.test, args.out, args.size)


if __name__ == '__main__':
    main()
