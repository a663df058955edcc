"""Run a script that mmdet ships, such as its ``tools/train.py``."""

from __future__ import annotations

import argparse
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Container, Iterator

from tools.common.wrong_calls import (
    Parser,
    read_config,
    writable_file,
    writable_folder,
)


def find_mmdet_script(name: str) -> Path:
    """Return the path of mmdet's ``tools/{name}.py``.

    A wheel carries the tools in ``mmdet/.mim/tools``; in a source checkout they lie
    beside the package.

    Raises:
        FileNotFoundError: If mmdet is not installed or has no such script.
    """
    spec = find_spec('mmdet')
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f'tools/{name}.py runs the script of mmdet, which is not installed for '
            f'{sys.executable}. Run `make setup` and use .venv/bin/python, or install '
            'mmdet as the README says'
        )
    package = Path(spec.origin).parent
    candidates = [
        package / '.mim' / 'tools' / f'{name}.py',
        package.parent / 'tools' / f'{name}.py',
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f'mmdet is installed in {package}, but neither '
        + ' nor '.join(str(path) for path in candidates)
        + ' exists. Install mmdet from its wheel or from a source checkout'
    )


def _types(value: Any) -> Iterator[str]:
    """Yield the types that a config names, at any depth."""
    if isinstance(value, dict):
        if isinstance(value.get('type'), str):
            yield value['type']
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for child in value:
            yield from _types(child)


def forgotten_import(cfg: Any, names: Container[str]) -> str | None:
    """Say what a config that imports nothing of rambo_det uses of it, if so.

    Args:
        cfg: The config.
        names: What the package registers.
    """
    used = sorted({name for name in _types(cfg.to_dict()) if name in names})
    if not used:
        return None
    return (
        f'{cfg.filename} uses {", ".join(used)} of rambo_det and does not import it, '
        "so that mmdet's own scripts would not know these types. Add to the config:\n"
        "custom_imports = dict(imports=['rambo_det'], allow_failed_imports=False)"
    )


def _predictions(text: str) -> Path:
    if not text.endswith(('.pkl', '.pickle')):
        raise argparse.ArgumentTypeError(f'must end in .pkl, got {text}')
    return writable_file(text)


def run_mmdet_script(name: str) -> None:
    """Run mmdet's ``tools/{name}.py`` with this process' arguments.

    It runs as ``__main__``, as if called directly, so its options, its defaults and
    its distributed launchers work unchanged.
    """
    parser = Parser(prog=name, add_help=False, allow_abbrev=False)
    parser.add_argument('--out', type=_predictions)
    parser.add_argument('--work-dir', type=writable_folder)
    parser.add_cfg_options()
    parser.parse_known_args()
    argparse.ArgumentParser.error = Parser.error  # mmdet's own parser: one line
    try:
        path = find_mmdet_script(name)
    except FileNotFoundError as error:
        sys.exit(f'tools/{name}.py: {error}')
    from mmengine.config import Config
    from mmengine.runner import Runner

    from_cfg, from_file = Runner.from_cfg.__func__, Config.fromfile

    def read(file: Any, *args: Any, **options: Any) -> Any:
        if file not in sys.argv:  # such as one that a config inherits
            return from_file(file, *args, **options)
        Config.fromfile = staticmethod(from_file)
        with parser.refusing():
            return read_config(file)

    # Without the package PyTorch >= 2.6 refuses mmengine's checkpoints, also those of
    # the cross-entropy twins, whose configs do not import it. It is imported only when
    # the config has been loaded, to see whether that has done it.
    def checked(cls: type[Runner], cfg: Any) -> Runner:
        imported = 'rambo_det' in sys.modules
        import rambo_det

        message = None if imported else forgotten_import(cfg, rambo_det.__all__)
        if message:
            sys.exit(f'tools/{name}.py: {message}')
        start = cfg.get('load_from')
        if start and '://' not in start and not Path(start).is_file():
            parser.error(f'expected a checkpoint, got {start}, which is no file')
        return from_cfg(cls, cfg)

    Runner.from_cfg = classmethod(checked)
    Config.fromfile = staticmethod(read)
    runpy.run_path(str(path), run_name='__main__')
