"""mmdet's ``tools/train.py`` with a faster RoIAlign on a CPU."""

import sys
from pathlib import Path

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.mmdet_script import run_mmdet_script
from tools.experiments import matmul_roi_align

if __name__ == '__main__':
    with matmul_roi_align.installed():
        run_mmdet_script('train')
