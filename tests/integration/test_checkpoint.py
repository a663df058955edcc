"""Files from elsewhere: data are loaded, code is not run, changed bytes are found."""

import functools
import io
import os
import pickle

import mmengine
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip('mmdet', reason='rambo_det adapts the loader where mmdet is')
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as loading

from rambo_det.checkpoint import is_whole, load_checkpoint, write_whole
from rambo_det.safe_pickle import load_predictions
from tests.helpers.toy_training import rambo_loss, train
from tools.experiments.runs import parse_options


def message_hub_state():
    hub = MessageHub.get_instance('test_checkpoint')
    for value in (0.5, 1, np.float32(2.0).item()):
        hub.update_scalar('train/loss', value)
    hub.update_info('iter', 3)
    hub.update_info('lr', np.float64(0.1))
    return hub.state_dict()


def test_log_history_round_trip(tmp_path):
    """What is loaded is saved again as what it was, for readers without rambo_det."""
    path, again = tmp_path / 'checkpoint.pth', tmp_path / 'again.pth'
    arrays = [np.arange(6.0).reshape(2, 3).T, np.arange(3), np.array([True, False])]
    saved = dict(message_hub=message_hub_state(), weight=torch.ones(2), arrays=arrays)
    torch.save(saved, path)
    torch.save(torch.load(path, weights_only=True), again)
    for loaded in (
        torch.load(again, weights_only=True),
        torch.load(again, weights_only=False),
        CheckpointLoader.load_checkpoint(str(again)),
    ):
        history = loaded['message_hub']['log_scalars']['train/loss']
        assert type(history) is HistoryBuffer
        assert history.mean() == pytest.approx(3.5 / 3)
        assert history.statistics('max') == 2
        assert loaded['message_hub']['runtime_info']['lr'] == 0.1
        for array, expected in zip(loaded['arrays'], arrays):
            assert array.dtype == expected.dtype
            assert np.array_equal(array, expected)
    assert b'rambo_det' not in again.read_bytes()


# What strangers may write


class Pickled:
    """Is pickled as a call of a function, and with a state for its result."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def history_state(**changes):
    numbers = np.arange(3.0)
    state = dict(_log_history=numbers, _count_history=numbers, max_length=5)
    return {**state, **changes}


reconstruct = np.empty(0).__reduce__()[0]
scalar = np.float64(0).__reduce__()[0]
GOOD_STATE = np.dtype('f8').__reduce__()[2]
FLOAT = np.dtype('f8')


def crafted_history(state):
    return Pickled(HistoryBuffer, state=state)


def an_array(shape=(2,), dtype=FLOAT, raw=b'\0' * 16, version=1):
    state = (version, shape, dtype, False, raw)
    return Pickled(reconstruct, np.ndarray, (0,), b'b', state=state)


def a_dtype(*args, state=GOOD_STATE):
    return Pickled(np.dtype, *args, state=state)


TRAP = 'TRAP'
# Small in the file, and endless where it is printed.
LAUGHS = functools.reduce(lambda inner, _: (inner, inner), range(60), ())
ATTACKS = dict(
    code=Pickled(os.mkdir, TRAP),
    getattr=Pickled(getattr, HistoryBuffer, '__init__'),
    laughs=Pickled(np.dtype, LAUGHS),
    laughing_state=a_dtype('f8', False, True, state=(3, LAUGHS)),
    getattr_of_another=Pickled(getattr, np.ndarray, 'max'),
    object_dtype=a_dtype('O8', False, True, state=(3, '|', *[None] * 3, -1, -1, 63)),
    structured=a_dtype('V8', state=(3, '|', None, ('a',), {'a': (FLOAT, 9)}, 8, 1, 0)),
    foreign_state=a_dtype('f8', False, True, state=(3, '<', None, None, None, 9, 9, 0)),
    long_array=an_array(shape=(3,)),
    huge_array=an_array(shape=(2**62, 4), raw=b''),
    negative_array=an_array(shape=(-2,)),
    no_bytes=an_array(raw=[1, 2]),
    no_dtype=an_array(dtype=None),
    truth=an_array(dtype=np.dtype(bool), raw=b'\1\7'),
    an_array_of_memory=Pickled(np.ndarray, (4,), FLOAT),
    a_short_number=Pickled(scalar, FLOAT, b'\0'),
    history=crafted_history(history_state(_log_history=[1.0])),
    length=crafted_history(history_state(max_length='5')),
    no_state=crafted_history(3),
)


@pytest.mark.parametrize('kind', ATTACKS)
@pytest.mark.parametrize('how', ['checkpoint', 'torch', 'predictions'])
def test_no_file_runs_code_or_gets_at_memory(tmp_path, monkeypatch, kind, how):
    monkeypatch.chdir(tmp_path)
    content = [dict(img_id=ATTACKS[kind])]
    with pytest.raises((pickle.UnpicklingError, ValueError), match='refusing|nsupp'):
        if how == 'predictions':
            mmengine.dump(content, 'found.pkl')
            load_predictions('found.pkl')
        else:
            torch.save(content, 'checkpoint.pth')
            if how == 'torch':
                torch.load('checkpoint.pth')
            CheckpointLoader.load_checkpoint('checkpoint.pth')
    assert not os.path.exists(TRAP)


def test_methods_of_all_histories_stay_as_they_are(tmp_path):
    methods = dict(HistoryBuffer._statistics_methods)
    state = history_state(statistics_methods=dict(mean=torch.Tensor))
    torch.save(crafted_history(state), tmp_path / 'checkpoint.pth')
    assert torch.load(tmp_path / 'checkpoint.pth').statistics('mean') == 1.0
    assert HistoryBuffer._statistics_methods == methods


def test_a_config_in_a_checkpoint_is_not_run(tmp_path):
    runner, _ = train(rambo_loss(), [], tmp_path, 1)
    runner.train()
    path = tmp_path / 'epoch_1.pth'
    checkpoint = load_checkpoint(path)
    checkpoint['meta']['config'] = f'import os\nos.mkdir({str(tmp_path / TRAP)!r})'
    torch.save(checkpoint, path)
    runner, _ = train(rambo_loss(), [], tmp_path, 2, resume=True)
    runner.train()
    assert runner.epoch == 2 and not (tmp_path / TRAP).exists()


def test_downloads_are_loaded_as_safely(monkeypatch, tmp_path):
    torch.save(ATTACKS['code'], tmp_path / 'weights.pth')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        loading.load_from_http((tmp_path / 'weights.pth').as_uri())
    assert not os.path.exists(TRAP)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.lists(inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(['f8', 'O8', 'V8', 'U2', 'i4', 'M8', '|b1', 'f8,i4', ''])
states = st.tuples(
    st.sampled_from([1, 3, 4, -1]),
    st.sampled_from(['<', '>', '|', '=', 'x', 1]),
    *[st.none() | plain] * 3,
    *[st.integers(-2, 99)] * 3,
)
dtypes = st.builds(
    a_dtype, names | plain, st.just(False), st.just(True), state=states | plain
) | st.just(FLOAT)
shapes = st.lists(st.integers(-1, 5), max_size=3).map(tuple) | plain
arrays = st.builds(an_array, shapes, dtypes | plain, st.binary(max_size=40), plain)
scalars = st.builds(lambda *args: Pickled(scalar, *args), dtypes, st.binary(max_size=9))


def loaded_both_ways(content, folder):
    """Load what may be anything; the process lives, and only data come out."""
    for load in (load_predictions, functools.partial(torch.load, weights_only=True)):
        path = folder / 'fuzzed'
        path.write_bytes(content[load is not load_predictions])
        try:
            found = load(path)
        except Exception:
            continue
        str(found), pickle.dumps(found)


@settings(max_examples=100, deadline=None)
@given(st.lists(dtypes | arrays | scalars, max_size=3))
def test_fuzzed_states_of_numpy_types(tmp_path_factory, crafted):
    zipped = io.BytesIO()
    torch.save(crafted, zipped)
    content = pickle.dumps(crafted, protocol=2), zipped.getvalue()
    loaded_both_ways(content, tmp_path_factory.getbasetemp())


HONEST = dict(
    found=[dict(img_id=1, scores=torch.rand(3), box=np.ones((2, 2)), n=np.float32(1))],
    hub=HistoryBuffer([1.0, 2.0], [1, 1]),
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_fuzzed_bytes_of_pickles(tmp_path_factory, data):
    buffer = io.BytesIO()
    torch.save(HONEST, buffer, _use_new_zipfile_serialization=False)
    contents = []
    for honest in (pickle.dumps(HONEST['found'], protocol=2), buffer.getvalue()):
        content = bytearray(honest)
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] = data.draw(st.integers(0, 255))
        contents.append(bytes(content))
    loaded_both_ways(contents, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize('protocol', [2, 4])
def test_predictions_round_trip(tmp_path, protocol):
    boxes = torch.rand(3, 4)[:, 1:]  # a view
    sample = dict(bboxes=boxes, labels=torch.tensor([1, 2]), none=torch.zeros(0, 4))
    sample.update(array=np.ones((2, 3), 'f4'), rle=b'\xff\0', shape=(3, 4.5, None))
    mmengine.dump([sample], tmp_path / 'found.pkl', protocol=protocol)
    (found,) = load_predictions(tmp_path / 'found.pkl')
    assert found.keys() == sample.keys()
    for key, value in sample.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value) and found[key].dtype == value.dtype
        else:
            assert np.array_equal(found[key], value)


# Bytes that change


def sealed(path):
    buffer = io.BytesIO()
    torch.save(dict(weight=torch.rand(3)), buffer)
    write_whole(path, buffer.getvalue())
    return path.read_bytes()


def test_a_changed_byte_is_found_wherever_it_is(tmp_path):
    path = tmp_path / 'epoch_2.pth'
    content = bytearray(sealed(path))
    sealed(tmp_path / 'epoch_1.pth')
    assert is_whole(path) and load_checkpoint(path)['weight'].shape == (3,)
    # All of the seal, and a third of what is before it.
    for place in sorted({*range(0, len(content), 3), *range(len(content))[-110:]}):
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        assert not is_whole(path), place
        if place % 99 == 0:
            with pytest.raises(ValueError, match=r'epoch_2.pth.*damaged.*epoch_1.pth'):
                CheckpointLoader.load_checkpoint(str(path))
        content[place] ^= 1 << place % 8
    for length in range(0, len(content), 15):
        path.write_bytes(content[:length])
        assert not is_whole(path), length


def test_without_a_seal_a_changed_byte_is_found_or_does_no_harm(tmp_path):
    path = tmp_path / 'stock.pth'
    weight = torch.rand(3)
    torch.save(dict(weight=weight), path)
    honest = path.read_bytes()
    found = 0
    for place in range(0, len(honest), 5):
        path.write_bytes(honest[:place] + b'\x5a' + honest[place + 1 :])
        try:
            loaded = CheckpointLoader.load_checkpoint(str(path))
        except (ValueError, RuntimeError, pickle.UnpicklingError):
            found += 1
        else:
            assert torch.equal(loaded['weight'], weight), place
    assert found > len(honest) / 10


def test_option_strings_are_not_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = f"__import__('os').mkdir('{TRAP}')"
    for value in (call, f'[{call}]', f'({call},)'):
        parse_options([f'model.{TRAP}={value}'])
    assert not os.path.exists(TRAP)
