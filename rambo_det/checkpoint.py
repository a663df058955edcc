"""Checkpoint files: sealed when they are written, checked when they are read.

A seal is the SHA-256 of a file, kept as the comment of the zip archive that it is, so
that PyTorch reads it as any other. A file without one, of mmengine's own hook, has the
archive's checksums, which do not cover every byte.
"""

import functools
import hashlib
import io
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
_LABEL, _DIGITS = b'rambo_det sha256 ', 64
_END = b'PK\5\6'  # begins the last 22 bytes of an archive without a comment


def _has_no_comment(content: Any) -> bool:
    return bytes(content[-22:-18]) == _END and bytes(content[-2:]) == b'\0\0'


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, and flush it; seal it if it is an archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    if _has_no_comment(content):
        content = content[:-2] + struct.pack('<H', len(_LABEL) + _DIGITS) + _LABEL
        content += hashlib.sha256(content).hexdigest().encode()
    try:
        with open(unfinished, 'wb') as file:
            file.write(content)
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
        content = memoryview(Path(path).read_bytes())
        if _has_no_comment(content):
            return zipfile.ZipFile(io.BytesIO(content)).testzip() is None
        sealed, seal = content[:-_DIGITS], content[-_DIGITS:]
        fits = hashlib.sha256(sealed).hexdigest().encode() == seal
        return fits and bytes(sealed[-len(_LABEL) :]) == _LABEL
    except Exception:  # of any kind, as the bytes may say anything
        return False


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
    if archive:  # else it is from a very old PyTorch, or damaged
        require_whole(path)
        return _load(path, map_location)
    try:
        return _load(path, map_location)
    except Exception:  # of any kind, as the bytes may say anything
        require_whole(path)
        raise


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
