"""Runs of tools/experiments/converged.py, their rows and what these measure."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests import ROOT
from tests.helpers.demo_configs import CE

pytest.importorskip('mmdet', reason='needs mmdet')

from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from tests.helpers.random_runs import boxes_run, random_run
from tools.analysis_tools.detections import Run, best_f1, coco_class_ap, load_run
from tools.dataset_tools import make_demo_voc
from tools.experiments import converged, runs

VOC = ROOT / 'configs/voc_subset/faster-rcnn_mobilenetv2_fpn-tiny_ce_12e_voc-subset.py'

# What is measured


@pytest.mark.parametrize('decimals', [None, 1])
def test_best_f1_is_the_best_of_all_thresholds(decimals):
    run = random_run(4, decimals=decimals)
    scores = np.concatenate([r[:, 4] for image in run.detections for r in image])
    flags = np.concatenate([found for image in run.flags for found in image])
    objects = sum(curve.objects for curve in run.curves)
    assert {-1, 0, 1} == set(flags)  # there are difficult objects in it

    def f1(threshold):
        kept = flags[scores >= threshold]
        hits, misses = (kept == 1).sum(), (kept == -1).sum()
        return 2 * hits / (hits + misses + objects)

    found, threshold, at_half = best_f1(run)
    assert found == pytest.approx(max(map(f1, scores)))
    assert found == pytest.approx(f1(threshold)) and 0 < found < 1
    assert at_half == pytest.approx(f1(0.5)) and at_half <= found


OBJECT, HARD = [0, 0, 100, 100], [200, 0, 300, 100]
HIT = [*OBJECT, 0.5]


def test_f1_of_nothing_and_of_low_scores():
    assert best_f1(boxes_run([OBJECT], [])) == (0, 0, 0)
    low = best_f1(boxes_run([OBJECT], [[*OBJECT, 0.4]]))
    assert low == (1.0, pytest.approx(0.4), 0.0)


@pytest.mark.parametrize(
    'found, hard, expected',
    [
        ([HIT], [], [1] * 10),
        # IoU 0.72 reaches the thresholds 0.5, 0.55, 0.6, 0.65 and 0.7 of ten.
        ([[0, 0, 72, 100, 0.9]], [], [1] * 5 + [0] * 5),
        ([[0, 0, 72, 100, 0.9], [*OBJECT, 0.1]], [], [1] * 5 + [0.5] * 5),
        # A difficult object is ignored as VOC does it, however often it is found.
        ([[*HARD, 0.9], [*HARD, 0.8], HIT], [HARD], [1] * 10),
        # Inside the difficult object, but not it: a crowd would forgive that.
        ([[200, 0, 240, 40, 0.9], HIT], [HARD], [0.5] * 10),
    ],
)
def test_coco_ap_has_a_value_for_each_iou_and_ignores_difficult_objects(
    found, hard, expected
):
    run = boxes_run([OBJECT], found, hard)
    assert coco_class_ap(run)[:, 0] == pytest.approx(expected)
    assert run.mean_ap == pytest.approx(expected[0])


def test_classes_without_objects_are_left_out():
    run = random_run(3)
    by_class = coco_class_ap(run)
    occur = [False, False, False, True]
    assert np.isnan(by_class).all(axis=0).tolist() == occur
    assert [curve.objects == 0 for curve in run.curves] == occur
    none = [[rows[:0] for rows in image] for image in run.detections]
    empty = Run('none', run.classes, run.images, run.truth, none)
    np.testing.assert_array_equal(coco_class_ap(empty), 0 * by_class)
    assert empty.mean_ap == 0


def test_training_curve_joins_the_parts_of_an_interrupted_run(tmp_path):
    def log(name, *lines, end=''):
        path = tmp_path / name / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(map(json.dumps, lines)) + end)

    def train(epoch, step, loss):
        more = dict(class_ap=0.5, lr=1.0, epoch=epoch, step=step, time=loss)
        return dict(loss=loss, loss_cls=loss / 2, **more)

    log('20250101_000000', train(1, 1, 100.0))
    first, second = ({runs.KEY: ap, 'step': i} for i, ap in ((1, 0.25), (2, 0.5)))
    lines = [train(1, 10, 4.0), train(1, 20, 2.0), first, train(2, 30, 9.0)]
    log('20260101_000000', *lines, end='\n{"loss": 9')
    log('20260102_000000', train(2, 30, 1.0), second)
    assert runs.training_curve(tmp_path, since='20260101_000000') == [
        dict(epoch=1, loss=3.0, loss_cls=1.5, class_ap=0.5, AP50=25.0),
        dict(epoch=2, loss=1.0, loss_cls=0.5, class_ap=0.5, AP50=50.0),
    ]
    assert converged.step_seconds(tmp_path) == 4.0


# Rows and tables


def row(loss, seed, ap50=40.0, **more):
    curve = [dict(epoch=1, loss=2.0), dict(epoch=2, loss=1.0, AP50=ap50)]
    measured = dict(AP50=ap50, AP=ap50 / 2, AP75=20.0, best_f1=50.0, curve=curve)
    measured.update(best_threshold=0.25, f1_at_half=30.0)
    named = dict(data='voc', detector='net-tiny', loss=loss, seed=seed)
    return {**named, **measured, 'config_sha': 'a', **more}


def test_rows_take_the_places_of_those_of_the_same_name(tmp_path):
    path = tmp_path / 'new' / 'rows.json'
    converged.add_rows(path, [row('rambo', 0), row('ce', 1), row('ce', 0)])
    converged.add_rows(path, [row('ce', 1, 50.0), row('ce', 0, data='bccd')])
    found = [(r['data'], r['loss'], r['seed']) for r in converged.read_rows(path)]
    assert found[0] == ('bccd', 'ce', 0)
    assert found[1:] == [('voc', 'ce', 0), ('voc', 'ce', 1), ('voc', 'rambo', 0)]
    assert [r['AP50'] for r in json.loads(path.read_text())['runs']] == [40, 40, 50, 40]
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_processes_that_add_rows_at_once_lose_none(tmp_path):
    path = tmp_path / 'rows.json'
    with ThreadPoolExecutor(8) as pool:  # a lock of the file, not of the process
        list(pool.map(lambda s: converged.add_rows(path, [row('ce', s)]), range(40)))
    assert [r['seed'] for r in converged.read_rows(path)] == list(range(40))


def test_a_table_has_rows_of_the_same_seeds():
    rows = [row('ce', seed, 40.0 + seed) for seed in range(4)]
    rows += [row('rambo', seed, 41.0 + 2 * seed) for seed in range(3)]
    rows += [row('focal', 1, 39.0)]
    text = converged.tables(rows)
    assert text.count('| loss |') == 3
    four, three, one = (
        part.splitlines() for part in text.split('**voc, net-tiny**')[1:]
    )
    assert one[0] == ', seed 1:' and three[0] == ', seeds 0, 1, 2:'
    assert [line.split(' | ')[0] for line in one[4:6]] == ['| ce', '| focal']
    # Differences 1, 2 and 3: 2 ± 4.303 / sqrt(3).
    assert '| rambo | 43.0 ± 2.0 |' in three[5]
    assert '| +2.0 [-0.5, +4.5] | +1.0 [-0.2, +2.2] | 43.0 |' in three[5]
    assert '| -2.0 | -1.0 |' in one[5] and 'rambo' not in ''.join(one + four)


def test_the_docs_show_what_the_file_holds(tmp_path, capsys):
    page = ROOT / 'docs' / 'results.md'
    copy = tmp_path / page.name
    copy.write_text(page.read_text(encoding='utf-8'), encoding='utf-8')
    converged.main(['--table-only', '--update', str(copy)])
    assert copy.read_text(encoding='utf-8') == page.read_text(encoding='utf-8')
    assert (
        converged.tables(converged.read_rows(converged.OUT)) in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    'text',
    [
        None,
        'no markers',
        '{1}\n{0}',
        '{0}{1}{0}{1}',
        '<!-- compare other --><!-- end other -->',
    ],
)
def test_pages_without_their_markers_are_left_alone(tmp_path, text):
    page = tmp_path / 'page.md'
    if text is not None:
        page.write_text(text.format(*converged.MARKS))
    before = page.read_text() if text else None
    said = r"expected (one line '<!-- compare converged|a file)"
    with pytest.raises(SystemExit, match=said):  # before anything is trained
        converged.main([str(VOC), '--update', str(page)])
    assert (page.read_text() if page.exists() else None) == before


# Configs


ONE_KEPT = 'default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))'


def variant(tmp_path, text, name='net_cnn_fpn-tiny_ce_4e_voc.py'):
    path = tmp_path / name
    path.write_text(f'_base_ = {str(CE)!r}\n{text}\n')
    return path


def test_what_counts_is_what_is_trained_not_where_the_data_are(tmp_path, monkeypatch):
    monkeypatch.setenv('RAMBO_DEMO_DATA', str(tmp_path))
    plain = runs.resolve(CE, [])
    assert str(tmp_path) not in json.dumps(plain)
    assert os.environ['RAMBO_DEMO_DATA'] == str(tmp_path)
    monkeypatch.delenv('RAMBO_DEMO_DATA')
    assert runs.resolve(CE, []) == plain
    longer = runs.resolve(CE, ['train_cfg.max_epochs=9'])
    assert runs.changes(plain, longer) == 'train_cfg.max_epochs: 4 -> 9'
    rambo = runs.resolve(CE.with_name(CE.name.replace('_ce_', '_rambo_')), [])
    assert runs.changes(plain, rambo, limit=2).endswith(' and 1 more')
    for text, same in (
        ("custom_imports = dict(_delete_=True, imports=['json'])", True),
        ('randomness = dict(seed=7)', True),
        ("default_hooks = dict(another=dict(type='NumClassCheckHook'))", True),
        ("default_hooks = dict(another=dict(type='InvalidLossHook'))", False),
    ):
        assert (runs.resolve(variant(tmp_path, text), []) == plain) == same


def test_hashes_of_the_rows_are_those_of_their_configs():
    """Otherwise every run would be refused as one of another config."""
    for found in converged.read_rows(converged.OUT):
        resolved = runs.resolve(ROOT / found['config'], found['options'])
        training = runs.Training(ROOT, resolved, 0, ROOT, [])
        assert training.sha == found['config_sha'], found['config']


def test_options_are_parsed_as_mmdet_does():
    found = runs.parse_options(['a.b=1', 'c=[1,2]', 'd=x'])
    assert found == {'a.b': 1, 'c': [1, 2], 'd': 'x'} and not runs.parse_options([])
    for wrong in ('x', 'randomness.seed=3'):
        with pytest.raises(ValueError, match='must be pairs key=value and leave the s'):
            runs.parse_options([wrong])


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], 'expected either CONFIG'),
        ([VOC, '--table-only'], 'expected either CONFIG'),
        ([VOC, '--loss', 'a_b'], 'must be without underscores'),
        (['none.py'], 'expected a file, got none.py, which does not exist'),
        ([CE], 'must be named DETECTOR_BACKBONE_NECK_LOSS_SCHEDULE_DATA'),
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        converged.main([str(part) for part in arguments])
    assert message in f'{error.value} {capsys.readouterr().err}'


@pytest.mark.needs_shared
def test_tuning_trains_and_tests_on_different_images_of_the_training_split():
    cfg = Config.fromfile(VOC)
    cfg.merge_from_dict(runs.parse_options(converged.SPLITS['tuning']))
    if not (ROOT / cfg.data_root / 'VOC2007').is_dir():
        pytest.skip('RAMBO_VOC_SUBSET names no data')
    register_all_modules()
    names = ('train', 'val', 'test')
    loaders = [cfg[f'{name}_dataloader'].dataset for name in names]
    sets = [DATASETS.build(loader) for loader in loaders]
    train, val, test = (
        {d.get_data_info(i)['img_id'] for i in range(len(d))} for d in sets
    )
    assert (len(train), len(val)) == (1600, 400) and val == test
    assert not train & val


# Runs, with a script that stands for mmdet's


FAKE = """
import json, os, sys, time
from pathlib import Path

argv = sys.argv[1:]
work = Path(argv[argv.index('--work-dir') + 1])
threads, resumed = os.environ['OMP_NUM_THREADS'], '--resume' in argv
with open(os.environ['FAKE_CALLS'], 'a') as calls:
    calls.write(json.dumps(dict(argv=argv, pid=os.getpid(), threads=threads)) + '\\n')
if '--out' in argv:
    sys.exit(0)
at = argv[argv.index('--resume') + 1] if resumed else '_0'
for epoch in range(1 + int(Path(at).stem.split('_')[-1]), 5):
    if os.environ.get('FAKE_FAIL') == str(epoch):
        sys.exit('CUDA error: none of it')
    if os.environ.get('FAKE_HANG') == str(epoch):
        child = os.fork()
        if child:
            Path(work, 'child').write_text(str(child))
        time.sleep(60)
    Path(work, f'epoch_{epoch}.pth').write_text('')
    Path(work, 'last_checkpoint').write_text(f'/moved/since/epoch_{epoch}.pth')
"""


class Fakes:
    """Runs converged.main with a training that takes no time and finds nothing."""

    def __init__(self, folder):
        self.out, self.work = folder / 'rows.json', folder / 'work'
        self.config, self.log = variant(folder, ONE_KEPT), folder / 'calls'

    def arguments(self, *more):
        parts = [self.config, '--out', self.out, '--work-dir', self.work, *more]
        return [str(part) for part in parts]

    def main(self, *more):
        self.log.write_text('')
        before = signal.getsignal(signal.SIGTERM)
        converged.main(self.arguments(*more))
        assert signal.getsignal(signal.SIGTERM) is before
        return self.steps()

    def calls(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def steps(self):
        """For each call: what was tested, or trained from a checkpoint or anew."""
        found = []
        for argv in (call['argv'] for call in self.calls()):
            resumed = '--resume' in argv and argv[argv.index('--resume') + 1]
            begun = Path(resumed).stem if resumed else 'train'
            found.append('test' if '--out' in argv else begun)
        return found

    def folder(self, seed=0, loss='ce'):
        return self.work / f'voc_net-tiny_{loss}' / f'seed_{seed}'


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    script, fakes = tmp_path / 'fake.py', Fakes(tmp_path)
    script.write_text(FAKE)
    monkeypatch.setattr(runs, 'TRAIN', script)
    monkeypatch.setattr(runs, 'TEST', script)
    monkeypatch.setenv('FAKE_CALLS', str(fakes.log))
    measured = row('', 0, 50.0)
    for key in (*converged.KEY, 'config_sha'):
        del measured[key]
    monkeypatch.setattr(runs, 'evaluate', lambda training, dump: dict(measured))
    return fakes


def test_a_run_becomes_a_row_and_is_not_made_again(fakes, capsys):
    assert fakes.main('--seeds', 0, 1) == 2 * ['train', 'test']
    assert {call['threads'] for call in fakes.calls()} == {'1'}
    # The checkpoint before is kept while the next is written.
    options = ['randomness.seed=1', 'default_hooks.checkpoint.max_keep_ckpts=2']
    assert fakes.calls()[2]['argv'][-2:] == options
    assert fakes.calls()[3]['argv'][-1] == options[0]
    assert fakes.main('--seeds', 0, 2) == ['train', 'test']
    assert 'seed 0: done before, AP50 50.0' in capsys.readouterr().out
    first, *_, last = converged.read_rows(fakes.out)
    assert [first[key] for key in converged.KEY] == ['voc', 'net-tiny', 'ce', 0]
    assert (first['AP50'], first['split'], first['threads']) == (50.0, 'test', 1)
    assert last['seed'] == 2 and last['config'] == fakes.config.name

    longer = ['--cfg-options', 'train_cfg.max_epochs=5']
    with pytest.raises(SystemExit, match=r'has a row of .* of another config'):
        fakes.main(*longer)
    assert fakes.main('--loss', 'ce-5e', *longer) == ['train', 'test']
    assert converged.read_rows(fakes.out)[-1]['loss'] == 'ce-5e'


def test_a_failed_run_goes_on_from_its_checkpoint_and_loses_no_other(
    fakes, monkeypatch, capsys
):
    fakes.main('--seeds', 1)
    monkeypatch.setenv('FAKE_FAIL', '3')
    with pytest.raises(SystemExit, match='2 runs failed'):
        fakes.main('--seeds', 0, 1, 2)
    assert fakes.steps() == ['train', 'train']
    log = fakes.folder() / 'train.log'
    said = capsys.readouterr().err
    assert f'fake.py ended with status 1; log: {log}\n' in said
    assert '    CUDA error: none of it' in said
    monkeypatch.delenv('FAKE_FAIL')
    assert fakes.main('--seeds', 0, 1) == ['epoch_2', 'test']
    state = json.loads((fakes.folder() / 'run.json').read_text())
    assert state['sessions'] == 2 and state['trained'] and state['train_seconds'] > 0


def test_a_failed_evaluation_needs_no_training_again(fakes, monkeypatch):
    def failing(training, dump):
        raise runs.RunError('AP50 is not what it was')

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match='1 runs fail'):
        patch.setattr(runs, 'evaluate', failing)
        fakes.main()
    assert fakes.main() == ['test']


def test_checkpoints_of_another_config_are_refused_before_anything_is_trained(
    fakes, tmp_path, monkeypatch
):
    monkeypatch.setenv('FAKE_FAIL', '2')
    with pytest.raises(SystemExit):
        fakes.main()
    monkeypatch.delenv('FAKE_FAIL')
    other = 'optim_wrapper = dict(optimizer=dict(lr=0.5))'
    variant(tmp_path, f'{ONE_KEPT}\n{other}')
    said = r'another config than it is now \(optim_wrapper\.optimizer\.lr: .* -> 0\.5\)'
    with pytest.raises(SystemExit, match=said):
        fakes.main('--seeds', 1, 0)
    assert not fakes.steps()
    (fakes.folder() / 'run.json').unlink()
    with pytest.raises(SystemExit, match=r'trained with no run\.json says'):
        fakes.main()
    assert not fakes.steps()
    # An attempt that left no checkpoint is forgotten.
    (fakes.folder() / 'last_checkpoint').unlink()
    assert fakes.main() == ['train', 'test']
    assert json.loads((fakes.folder() / 'run.json').read_text())['sessions'] == 1


def test_two_programs_do_not_train_the_same_run(fakes, capsys):
    fakes.folder().mkdir(parents=True)
    lock = os.open(fakes.folder(), os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(SystemExit, match='1 runs failed'):
        fakes.main('--seeds', 0, 1)
    assert 'another process is at work in' in capsys.readouterr().err
    assert fakes.steps() == ['train', 'test']
    os.close(lock)
    assert fakes.main('--seeds', 0, 1) == ['train', 'test']


def gone(pid):
    """Whether a process has ended, perhaps not yet fetched by its parent."""
    try:
        return (
            Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
        )
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='looks at processes in /proc')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_processes_and_the_next_call_goes_on(fakes, number):
    script = (
        'import sys; from tools.experiments import converged, runs;'
        f'runs.TRAIN = runs.TEST = {str(runs.TRAIN)!r}; converged.main(sys.argv[1:])'
    )
    environment = {**os.environ, 'FAKE_HANG': '2', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-W', 'ignore', '-c', script, *fakes.arguments()]
    program = subprocess.Popen(command, env=environment, cwd=fakes.work.parent)
    child = fakes.folder() / 'child'
    wait_until(lambda: child.is_file() and child.read_text())
    pids = [int(child.read_text()), *(call['pid'] for call in fakes.calls())]
    assert len(pids) == 2 and not any(map(gone, pids))
    program.send_signal(number)
    assert program.wait(60) != 0
    wait_until(lambda: all(map(gone, pids)), 5)
    assert fakes.main() == ['epoch_1', 'test']


@pytest.mark.slow
def test_a_real_training_end_to_end(tmp_path, monkeypatch, capsys):
    data = tmp_path / 'voc'
    make_demo_voc.generate(data, train=8, test=6, size=(96, 96))
    monkeypatch.setenv('RAMBO_DEMO_DATA', str(data))
    fakes = Fakes(tmp_path)
    options = ['train_cfg.max_epochs=2', 'train_cfg.val_interval=1']
    options += ['default_hooks.logger.interval=1']
    converged.main(fakes.arguments('--seeds', 3, '--cfg-options', *options))
    (found,) = converged.read_rows(fakes.out)
    assert found['images'] == 6 and found['sessions'] == 1
    assert found['seconds'] > 0 and set(found['versions']) > {'torch', 'mmdet'}
    assert [point['epoch'] for point in found['curve']] == [1, 2]
    # AP50 of the test is that of the last validation, as mmdet printed it.
    assert found['curve'][-1]['AP50'] == pytest.approx(found['AP50'], abs=1e-3)
    assert {'loss_cls', 'loss_bbox'} < set(found['curve'][0])
    assert len(found['class_AP50']) == len(found['class_AP']) == 6
    config = next(fakes.folder(3).glob('2*/vis_data/config.py'))
    assert 'randomness = dict(seed=3)' in config.read_text()
    run = load_run(config, fakes.folder(3) / 'detections.npz')
    assert 100 * run.mean_ap == pytest.approx(found['AP50'], abs=1e-3)
    assert '**voc, net-tiny**, seed 3:' in capsys.readouterr().out
    # What mmdet has printed is looked at.
    report = max((fakes.folder(3) / 'test').glob('2*/2*.json'))
    report.write_text(json.dumps({runs.KEY: 2.0}))
    dump = fakes.folder(3) / 'detections.npz'
    training = runs.Training(fakes.config, {}, 3, fakes.folder(3), [])
    with pytest.raises(runs.RunError, match=r'AP50 is .*, but 2\.000000 in '):
        runs.evaluate(training, dump)
