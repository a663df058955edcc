"""Train a detector: mmdet's own ``tools/train.py``, found in the installed package."""

import sys
from pathlib import Path

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.common.mmdet_script import run_mmdet_script

if __name__ == '__main__':
    run_mmdet_script('train')
