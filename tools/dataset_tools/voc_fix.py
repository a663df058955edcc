"""A repaired copy of a VOC data set, and the report of what differs from it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Iterator

from PIL import Image
from tqdm import tqdm

from tools.dataset_tools.voc_data import MAIN, Checked, read_lines
from tools.dataset_tools.voc_files import ANNOTATIONS, IMAGES, ORIENTATION

REPORT = 'check_voc_report.txt'


def changes(checked: Checked) -> Iterator[str]:
    """Tell what the copy has otherwise, a line for each change."""
    for problem in checked.problems:
        if problem.repair:
            yield f'{problem.file}: {problem.kind}: {problem.detail}: {problem.repair}'
    for found in checked.examined.values():
        if not found.usable:
            task = checked.tasks[found.name]
            for file in filter(None, (task.image, task.xml)):
                yield f'{file}: not copied, since {found.name} was taken out'
    kept = {ANNOTATIONS, IMAGES, 'ImageSets'}
    for path in sorted(checked.root.iterdir()):
        if path.name not in kept:
            yield f'{path.name}: not copied, since XMLDataset does not read it'
    stems = {each.stem for each in checked.lists} | set(checked.classwise)
    for path in sorted((checked.root / 'ImageSets').rglob('*')):
        inside = path.parent == checked.root / MAIN and path.suffix == '.txt'
        if path.is_file() and not (inside and path.stem in stems):
            file = path.relative_to(checked.root).as_posix()
            yield f'{file}: not copied, since it was not checked'


def _write_lists(checked: Checked, out: Path) -> None:
    unusable = {found.name for found in checked.examined.values() if not found.usable}
    (out / MAIN).mkdir(parents=True)
    for each in checked.lists:
        lost = unusable | checked.lost.get(each.stem, set())
        lines = [name for name in each.names if name not in lost]
        _write_lines(out / each.file, lines)
    for stem in checked.classwise:
        split = max(
            (each.stem for each in checked.lists if stem.endswith(f'_{each.stem}')),
            key=len,
            default='',
        )
        lost = unusable | checked.lost.get(split, set())
        file = f'{MAIN}/{stem}.txt'
        lines = read_lines(checked.root / file)
        kept = [line for line in lines if line.strip().rsplit(None, 1)[0] not in lost]
        _write_lines(out / file, kept)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_bytes(''.join(f'{line}\n' for line in lines).encode())


def _write_upright(source: Path, target: Path) -> None:
    """Store an image with the same pixels, but no EXIF orientation."""
    content = source.read_bytes()
    with Image.open(source) as image:
        exif, stored = image.getexif(), image.info.get('exif', b'')
        del exif[ORIENTATION]
        if (old := _segment(stored)) in content:  # a JPEG, not to be compressed again
            target.write_bytes(content.replace(old, _segment(exif.tobytes()), 1))
        else:
            image.save(target, image.format, exif=exif, lossless=True)


def _segment(exif: bytes) -> bytes:
    """Return EXIF data as a segment of a JPEG."""
    return b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big') + exif


def _copy(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        target.symlink_to(source.resolve())
    else:
        shutil.copy2(source, target)


def _write_files(checked: Checked, out: Path, link: bool) -> None:
    for folder in (ANNOTATIONS, IMAGES):
        (out / folder).mkdir()
    for name, task in tqdm(checked.tasks.items(), 'copied', mininterval=0.5):
        found = checked.examined[name]
        if not found.usable:
            continue
        image = out / IMAGES / f'{name}.jpg'
        if found.upright:
            image.parent.mkdir(parents=True, exist_ok=True)
            _write_upright(checked.root / task.image, image)
        else:
            _copy(checked.root / task.image, image, link)
        xml = out / ANNOTATIONS / f'{name}.xml'
        if found.new_xml is None:
            _copy(checked.root / task.xml, xml, False)
        else:
            xml.parent.mkdir(parents=True, exist_ok=True)
            xml.write_bytes(found.new_xml)
    for file in checked.unlisted:
        _copy(checked.root / file, out / file, link and file.startswith(IMAGES))


def write_fixed(checked: Checked, out: Path, link: bool = False) -> list[str]:
    """Write the repaired copy, which appears when it is complete.

    Args:
        checked: The data set.
        out: The new folder. It must not exist, or be empty.
        link: Link images instead of copying them.

    Returns:
        The changes, which are also in the folder's ``check_voc_report.txt``.
    """
    report = [*changes(checked)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=out.parent, prefix=f'{out.name}.part'
    ) as folder:
        draft = Path(folder) / 'data'
        draft.mkdir()
        _write_lists(checked, draft)
        _write_files(checked, draft, link)
        head = f'{len(report)} changes of {checked.root}'
        _write_lines(draft / REPORT, [head, *report])
        if out.exists():
            out.rmdir()
        shutil.move(draft, out)
    return report


def check_out(out: Path, root: Path, option: str = '--fix') -> None:
    """Refuse a folder that holds something, or that is in the data.

    Raises:
        ValueError: If it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f'{option} {out} exists and is not empty; name a new folder')
    if root.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f'{option} {out} is inside {root}; name a folder elsewhere')
