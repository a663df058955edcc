"""Wrong calls of a tool end in one line that says what is wrong, and exit status 2."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn


class WrongCall(SystemExit):
    """The end of a tool that was called wrongly; its text says how."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Parser(argparse.ArgumentParser):
    """A parser of arguments that prints one line where argparse prints its usage."""

    def error(self, message: str) -> NoReturn:
        """Exit, saying what is wrong."""
        text = '; '.join(filter(None, map(str.strip, str(message).splitlines())))
        print(f'{Path(self.prog).stem}: {text}', file=sys.stderr)
        raise WrongCall(text)

    def add_cfg_options(self) -> None:
        """Add the ``--cfg-options`` of mmdet's scripts."""
        from mmengine.config import DictAction

        self.add_argument(
            '--cfg-options', nargs='+', type=option, action=DictAction, default={}
        )

    @contextmanager
    def refusing(self, *more: type[Exception]) -> Iterator[None]:
        """Treat errors about files and values, and others that are named, as wrong."""
        try:
            yield
        except (ValueError, OSError, *more) as error:
            self.error(str(error))


def readable_file(text: str) -> Path:
    """Accept a file with something in it."""
    path = Path(text)
    try:
        if path.is_file():
            with path.open('rb') as file:
                if file.read(1):
                    return path
            what = 'an empty one'
        elif path.is_dir():
            what = 'a folder'
        else:
            what = 'no regular file' if path.exists() else ''
    except (OSError, ValueError) as error:
        what = str(error)
    shown = f'{text}, which is {what}' if what else f'{text}, which does not exist'
    raise argparse.ArgumentTypeError(f'expected a file, got {shown}')


def _writable(path: Path, shown: str) -> Path:
    """Raise unless something can be created in a folder; it tries."""
    folder = next(each for each in (path, *path.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f'cannot write {shown}: {folder}: {error.strerror}'
        ) from None
    return Path(shown)


def writable_file(text: str) -> Path:
    """Accept a file that can be written, without writing it."""
    path = Path(text).absolute()
    if path.exists() and not path.is_file():
        # A device would be replaced by a file.
        what = 'folder' if path.is_dir() else 'what is no regular file,'
        raise argparse.ArgumentTypeError(f'expected a file to write, got {what} {text}')
    return _writable(path.parent, text)


def writable_folder(text: str) -> Path:
    """Accept a folder that can be written, without creating it."""
    return _writable(Path(text).absolute(), text)


def at_least(
    least: float, kind: type[int | float] = int
) -> Callable[[str], int | float]:
    """Accept numbers from a least one up."""

    def number(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:
            raise argparse.ArgumentTypeError(f'must be {least} or more, got {text}')
        return value

    return number


def option(text: str) -> str:
    """Accept what mmengine's ``DictAction`` can read."""
    from mmengine.config import DictAction

    key, equals, value = text.partition('=')
    try:
        if not (key and equals):
            raise ValueError('no pair')
        DictAction._parse_iterable(value)
    except (AssertionError, LookupError, RecursionError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f'must be KEY=VALUE, got {text} ({error})'
        ) from None
    return text


# What reading other content than was expected raises.
_MISREAD = (
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Say of a file with other content what was expected.

    Raises:
        ValueError: If reading it fails in any way that content can make it fail.
    """
    try:
        yield
    except _MISREAD as error:
        reason = f'{type(error).__name__}: {error}'
        raise ValueError(f'{path}: expected {expected}, got {reason}') from error


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If the file is none.
    """
    with reading(path, expected):
        content = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(content, dict):
            raise TypeError(f'a JSON {type(content).__name__}')
    return content


def read_config(path: str | Path) -> Any:
    """Read a config of mmengine, which may inherit ``rambo_det::...``.

    Raises:
        ValueError: If it cannot be read.
    """
    from mmengine.config import Config
    from mmengine.config.utils import MODULE2PACKAGE

    # As importing the package does, for configs that inherit `rambo_det::...`.
    MODULE2PACKAGE.setdefault('rambo_det', 'rambo_det.version')
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is a program
        message = f'{type(error).__name__}: {next(iter(str(error).splitlines()), "")}'
        raise ValueError(f'{path} is no config that can be read: {message}') from error
