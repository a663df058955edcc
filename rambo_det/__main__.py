"""Run a tool that the package carries, as in ``python -m rambo_det train CONFIG``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

MIM = Path(__file__).resolve().parent / '.mim'


def find_tools() -> dict[str, Path]:
    """Return the scripts by name; those that only others import are left out."""
    return {
        path.stem: path
        for room in ('*.py', '*/*.py')
        for path in sorted((MIM / 'tools').glob(room))
        if "__name__ == '__main__'" in path.read_text(encoding='utf-8')
    }


def main() -> None:
    """Become the named script, or say which there are."""
    tools = find_tools()
    name = ''.join(sys.argv[1:2])
    if name not in tools:
        sys.exit(
            'usage: python -m rambo_det TOOL [ARGUMENTS]\n'
            f'tools: {", ".join(tools)}\nconfigs: {MIM / "configs"}'
        )
    # A process of its own, as if called by its path: it must find out by itself whether
    # a config imports this package, which is imported here.
    os.execv(sys.executable, [sys.executable, str(tools[name]), *sys.argv[2:]])


if __name__ == '__main__':
    main()
