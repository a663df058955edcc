"""Test a detector: mmdet's own ``tools/test.py``, found in the installed package."""

from mmdet_script import run_mmdet_script

if __name__ == '__main__':
    run_mmdet_script('test')
