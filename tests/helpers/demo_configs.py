"""The demo's configs, and the root of the checkout that they are in."""

from tests import ROOT

CE, RAMBO = (
    ROOT / 'configs' / 'demo' / f'faster-rcnn_tiny_fpn_{name}_demo.py'
    for name in ('ce', 'rambo')
)
