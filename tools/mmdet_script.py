"""Run a script that mmdet ships, such as its ``tools/train.py``."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


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


def run_mmdet_script(name: str) -> None:
    """Run mmdet's ``tools/{name}.py`` with this process' arguments.

    It runs as ``__main__``, as if called directly, so its options, its defaults and
    its distributed launchers work unchanged.
    """
    try:
        path = find_mmdet_script(name)
    except FileNotFoundError as error:
        sys.exit(f'tools/{name}.py: {error}')
    # Without it PyTorch >= 2.6 refuses mmengine's checkpoints, also those of the
    # cross-entropy twins, whose configs do not import it.
    import rambo_det  # noqa: F401

    runpy.run_path(str(path), run_name='__main__')
