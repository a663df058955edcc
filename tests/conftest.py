"""Settings of the property tests, and the same random numbers in every run."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

import rambo_det  # noqa: F401 - before mmdet.models, see rambo_det.mmpretrain_import

# The examples of docstrings are looked for in every file; importing this one would make
# its device that of all tests.
collect_ignore = ['helpers/pretended_device.py']

# A slow machine is no failure; neither is dropping drawn cases in which rounding
# decides an order. In CI the cases are the same every time, elsewhere new ones.
settings.register_profile(
    'rambo_det',
    deadline=None,
    derandomize=os.environ.get('CI') == 'true',
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile('rambo_det')


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
