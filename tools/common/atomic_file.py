"""Files that are written at once or not at all."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Hand out a draft to write, which then takes the place of the file.

    Being stopped, or an error, leaves the file as it was.
    """
    path = Path(path)
    draft = path.with_name(f'.{path.name}.part')
    yield draft
    draft.replace(path)
