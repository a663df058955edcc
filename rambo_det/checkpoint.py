"""Checkpoint files: sealed when they are written, checked when they are read.

A seal is the SHA-256 of a file, kept as the comment of the zip archive that it is, so
that PyTorch reads it as any other. A file without one, of mmengine's own hook, has the
archive's checksums, which do not cover every byte.
"""

import functools
import hashlib
import os
import os.path as osp
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, Iterator, Optional, Union

import torch
from mmengine.runner import checkpoint as loading

from .safe_pickle import SAFE_BY_DEFAULT, allow_mmengine_checkpoints

UNFINISHED = '.unfinished'  # ends the names of files that are being written
_LABEL = b'rambo_det sha256 '
_DIGITS = 64
# The last record of an archive without a comment, and where its length is.
_END, _END_SIZE, _BLOCK = b'PK\5\6', 22, 2**20


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, and flush it; seal it if it is an archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    parts = [memoryview(content)]
    if content[-_END_SIZE:].startswith(_END) and content.endswith(b'\0\0'):
        comment = struct.pack('<H', len(_LABEL) + _DIGITS) + _LABEL
        parts = [parts[0][:-2], memoryview(comment)]
        digest = hashlib.sha256(parts[0])
        digest.update(comment)
        parts.append(memoryview(digest.hexdigest().encode()))
    try:
        with open(unfinished, 'wb') as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if os.name == 'posix':  # the new name lasts when its folder is flushed too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def is_whole(path: Union[str, Path]) -> bool:
    """Tell whether a file is a complete checkpoint, as far as it can be told.

    With a seal, that is whether every byte is as it was written.
    """
    try:
        with open(path, 'rb') as file:
            file.seek(-_END_SIZE, os.SEEK_END)
            end = file.read()
            if end.startswith(_END) and end.endswith(b'\0\0'):  # no comment
                with zipfile.ZipFile(file) as archive:
                    return archive.testzip() is None
            size = file.seek(0, os.SEEK_END) - _DIGITS
            if not _is_sealed(file):
                return False
            file.seek(0)
            digest = hashlib.sha256()
            for start in range(0, size, _BLOCK):
                digest.update(file.read(min(_BLOCK, size - start)))
            return file.read() == digest.hexdigest().encode()
    except Exception:  # of any kind, as the bytes may say anything
        return False


def _is_sealed(file: Any) -> bool:
    file.seek(-_DIGITS - len(_LABEL), os.SEEK_END)
    return bool(file.read(len(_LABEL)) == _LABEL)


def newest_whole(folder: Union[str, Path], template: str) -> Optional[str]:
    """Return the complete checkpoint that was written last, if there is one.

    Args:
        folder: Where it is.
        template: Its name, with ``{}`` for a number.
    """
    before, _, after = template.partition('{}')
    name = re.compile(rf'{re.escape(before)}(\d+){re.escape(after)}')

    def age(path: Path) -> Any:
        return path.stat().st_mtime_ns, int(name.findall(path.name)[0])

    found = Path(folder).iterdir() if Path(folder).is_dir() else ()
    files: Iterator[Path] = (path for path in found if name.fullmatch(path.name))
    ordered = sorted(files, key=age, reverse=True)
    return next((str(path) for path in ordered if is_whole(path)), None)


def require_whole(path: str) -> None:
    """Raise unless a file is a complete checkpoint; name another one that is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    if is_whole(path):
        return
    folder, name = osp.split(path)
    number = re.search(r'\d+(?=\D*$)', name)
    template = name[: number.start()] + '{}' + name[number.end() :] if number else ''
    other = newest_whole(folder or '.', template) if number else None
    if other is not None:
        advice = f'the newest complete one there is {other}'
    else:
        advice = f'there is no other complete one in {folder or "."}'
    if not osp.isfile(path):
        raise FileNotFoundError(f'there is no checkpoint {path!r} to load; {advice}')
    raise ValueError(
        f'the checkpoint {path!r} ({osp.getsize(path)} bytes) is damaged, truncated, '
        f'or not written by torch.save; {advice}'
    )


def load_checkpoint(path: Union[str, Path], map_location: Any = None) -> Any:
    """Load a checkpoint file as mmengine does, but no damaged one, and run no code.

    The latter on PyTorch >= 2.6, and unless ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` is
    set. mmengine's fork allows any code where its own allowance is not enough.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    path = osp.expanduser(str(path))
    if not osp.isfile(path):
        require_whole(path)
    with open(path, 'rb') as file:
        archive = file.read(4) == b'PK\3\4'
        short = file.seek(0, os.SEEK_END) < _DIGITS + len(_LABEL)
        if archive or short or _is_sealed(file):  # else of a very old PyTorch
            require_whole(path)
            return _load(path, map_location)
    try:
        return _load(path, map_location)
    except Exception as error:  # of any kind, as the bytes may say anything
        raise ValueError(
            f'the checkpoint {path!r} is damaged, or has more than data: {error}'
        ) from error


def _load(file: Any, map_location: Any = None, weights_only: Any = None) -> Any:
    # Where the fork has loaded anything, it forbids what it has allowed itself.
    allow_mmengine_checkpoints()
    found = torch.load(file, map_location=map_location, weights_only=weights_only)
    return _without_config(found)


def _without_config(checkpoint: Any) -> Any:
    """Drop a config that mmengine would run as Python, and never stores itself."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict):
        meta.pop('config', None)
    return checkpoint


def load_from_local(path: str, map_location: Any = None) -> Any:
    """Load a checkpoint file; mmengine takes what it logs from this name."""
    return load_checkpoint(path, map_location)


def check_what_mmengine_loads() -> None:
    """Let mmengine load checkpoints with :func:`load_checkpoint`; done once."""
    allow_mmengine_checkpoints()
    loading.CheckpointLoader.register_scheme('', load_from_local, force=True)
    loading._safe_torch_load = _load  # the fork's, for what it downloads
    load_url = loading.load_url
    if not SAFE_BY_DEFAULT or hasattr(load_url, '__wrapped__'):
        return

    @functools.wraps(load_url)
    def plain_data_only(*args: Any, **kwargs: Any) -> Any:
        # Its own default is to run what the file says.
        return _without_config(load_url(*args, **{'weights_only': None, **kwargs}))

    loading.load_url = plain_data_only
