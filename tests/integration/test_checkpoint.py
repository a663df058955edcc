"""mmengine's checkpoints load with PyTorch's safe loader, and nothing else does."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip('mmengine', reason='checkpoints are those of mmengine')
pytest.importorskip('mmdet', reason='rambo_det adapts the loader where mmdet is')
from mmengine.logging import MessageHub

import rambo_det  # noqa: F401
from rambo_det.checkpoint import _getattr, allow_mmengine_checkpoints


def message_hub_state():
    hub = MessageHub.get_instance('test_checkpoint')
    for value in (0.5, 1, np.float32(2.0).item()):
        hub.update_scalar('train/loss', value)
    hub.update_info('iter', 3)
    hub.update_info('lr', np.float64(0.1))
    return hub.state_dict()


def test_log_history_round_trip(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(message_hub=message_hub_state(), weight=torch.ones(2)), path)
    allow_mmengine_checkpoints()  # again: must not matter
    loaded = torch.load(path, weights_only=True)
    history = loaded['message_hub']['log_scalars']['train/loss']
    assert history.mean() == pytest.approx(3.5 / 3)
    assert history.statistics('max') == 2


class _Attack:
    """Pickles as ``getattr(HistoryBuffer, '__init__')``: from there, any function."""

    def __reduce__(self):
        from mmengine.logging import HistoryBuffer

        return getattr, (HistoryBuffer, '__init__')


def test_only_the_history_methods_are_reached(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save(_Attack(), path)
    with pytest.raises((pickle.UnpicklingError, TypeError), match='refusing to load'):
        torch.load(path, weights_only=True)


def test_stand_in_for_getattr():
    with pytest.raises(TypeError, match=r"refusing to load getattr\(.*'run'\)"):
        _getattr(subprocess, 'run')


def test_without_the_plugin_the_same_file_is_refused(tmp_path):
    """Shows that the allow-list is what makes the first test pass."""
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(message_hub=message_hub_state()), path)
    code = f'import torch; torch.load({str(path)!r}, weights_only=True)'
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert 'HistoryBuffer' in result.stderr
