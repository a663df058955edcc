"""Runs of compare.py, the AP of resampled images, tables and pictures."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests import ROOT
from tests.helpers.demo_configs import CE, RAMBO

pytest.importorskip('mmdet', reason='needs mmdet')

from tools.analysis_tools import matched_ap
from tools.analysis_tools.plot_results import Run
from tools.common.atomic_file import atomic_file
from tools.common.markdown_table import update_page
from tools.dataset_tools import make_demo_voc
from tools.experiments import compare, compare_configs, compare_report

# AP


def random_run(seed, images=12, classes=4, decimals=None):
    """A run with hits, misses, doubles and difficult objects; class 3 is rare."""
    rng = np.random.default_rng(seed)
    truth, detections = [], []
    for image in range(images):
        count = rng.integers(0, 6)
        corners = rng.uniform(0, 60, (count, 2))
        boxes = np.hstack([corners, corners + rng.uniform(10, 30, (count, 2))])
        boxes = boxes.astype(np.float32)
        labels = rng.integers(0, classes - 1, count)
        if image == 0:
            labels[:1] = classes - 1
        hard = rng.random(count) < 0.3
        truth.append(
            dict(
                bboxes=boxes[~hard],
                labels=labels[~hard],
                bboxes_ignore=boxes[hard],
                labels_ignore=labels[hard],
            )
        )
        near = np.repeat(boxes, 2, axis=0) + rng.normal(0, 3, (2 * count, 4))
        stray = rng.uniform(0, 40, (3, 4)) + np.array([0, 0, 40, 40])
        found = np.vstack([near, stray])
        scores = rng.random(len(found))
        if decimals is not None:
            scores = scores.round(decimals)
        kinds = np.append(np.repeat(labels, 2), rng.integers(0, classes, 3))
        rows = np.hstack([found, scores[:, None]]).astype(np.float32)
        detections.append([rows[kinds == label] for label in range(classes)])
    names = tuple('abcdefgh'[:classes])
    return Run('run', names, {i: '' for i in range(images)}, truth, detections)


def expected(run):
    """AP by class as mmdet's eval_map has it, NaN where there is no object."""
    return [curve.ap if curve.objects else np.nan for curve in run.curves]


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('decimals', [None, 1])
def test_ap_with_weights_of_one_is_that_of_eval_map(seed, decimals):
    run = random_run(seed, decimals=decimals)
    matches = matched_ap.match(run)
    assert {-1, 0, 1} == set(matches.flags)  # there are difficult objects in it
    found = matched_ap.class_ap(matches)[0]
    assert found == pytest.approx(expected(run), abs=1e-6, nan_ok=True)
    assert matched_ap.mean_ap(found) == pytest.approx(run.mean_ap, abs=1e-6)
    assert 0.05 < run.mean_ap < 0.95


@pytest.mark.parametrize('seed', range(6))
def test_weighted_ap_is_that_of_the_duplicated_data_set(seed):
    run = random_run(seed)
    images = len(run.truth)
    drawn = np.random.default_rng(seed).integers(images, size=images)
    copies = Run(
        'copies',
        run.classes,
        dict.fromkeys(range(images), ''),
        [run.truth[i] for i in drawn],
        [run.detections[i] for i in drawn],
    )
    weights = np.bincount(drawn, minlength=images)
    assert weights.max() > 1 and weights.min() == 0
    per_class = matched_ap.class_ap(matched_ap.match(run), weights[None])[0]
    assert per_class == pytest.approx(expected(copies), abs=1e-6, nan_ok=True)
    assert matched_ap.mean_ap(per_class) == pytest.approx(copies.mean_ap, abs=1e-6)
    assert abs(copies.mean_ap - run.mean_ap) > 1e-3  # the resample makes a difference


def test_many_weights_at_once_are_each_on_its_own(monkeypatch):
    matches = matched_ap.match(random_run(0))
    weights = np.random.default_rng(0).integers(0, 3, (7, 12))
    single = [matched_ap.class_ap(matches, row[None])[0] for row in weights]
    monkeypatch.setattr(matched_ap, '_CHUNK_VALUES', 50)
    np.testing.assert_array_equal(matched_ap.class_ap(matches, weights), single)
    with pytest.raises(ValueError, match=r'shape \(resamples, 12\).*got \(7, 3\)'):
        matched_ap.class_ap(matches, weights[:, :3])


def test_a_resample_without_an_object_of_a_class_leaves_the_class_out():
    matches = matched_ap.match(random_run(1))
    weights = np.ones((1, 12))
    weights[0, matches.objects[:, 3] > 0] = 0
    per_class = matched_ap.class_ap(matches, weights)[0]
    assert np.isnan(per_class).tolist() == [False, False, False, True]
    assert matched_ap.mean_ap(per_class) == pytest.approx(np.mean(per_class[:3]))
    assert matched_ap.mean_ap(np.full(3, np.nan)) == 0


def test_matches_are_stored_and_read(tmp_path):
    matches = matched_ap.match(random_run(2))
    # Nothing of a class is found: none of its detections matters.
    flags = np.where(matches.labels == 1, matched_ap.MISS, matches.flags)
    matches = matched_ap.Matches(**{**vars(matches), 'flags': flags})
    matches.save(tmp_path / 'matches.npz')
    read = matched_ap.Matches.load(tmp_path / 'matches.npz')
    np.testing.assert_array_equal(read.objects, matches.objects)
    drawn = np.random.default_rng(0).integers(0, 3, (20, 12))
    for measure in (
        matched_ap.class_ap,
        matched_ap.mean_precision,
        lambda found: matched_ap.class_ap(found, drawn),
    ):
        np.testing.assert_array_equal(measure(read), measure(matches))
    # Without what comes after the last hit of each class.
    for found, whole in zip(read.by_class(), matches.by_class()):
        kept, flags = read.flags[found], matches.flags[whole]
        assert kept.tolist() == flags[: len(kept)].tolist()
        assert matched_ap.HIT not in flags[len(kept) :]
        assert not len(kept) or kept[-1] == matched_ap.HIT
    assert 0 < len(read.flags) < len(matches.flags)
    assert [path.name for path in tmp_path.iterdir()] == ['matches.npz']


def test_a_write_that_is_stopped_leaves_the_file(tmp_path):
    path = tmp_path / 'record.json'
    path.write_text('old')
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as draft:
        draft.write_text('ne')
        raise KeyboardInterrupt
    assert path.read_text() == 'old'
    with atomic_file(path) as draft:
        draft.write_text('new')
    assert path.read_text() == 'new'
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_without_detections_has_ap_0():
    run = random_run(0)
    none = [[rows[:0] for rows in image] for image in run.detections]
    empty = Run('none', run.classes, run.images, run.truth, none)
    matches = matched_ap.match(empty)
    assert matched_ap.mean_ap(matched_ap.class_ap(matches)[0]) == 0
    assert matched_ap.coco_ap(empty) == 0
    assert matched_ap.mean_precision(matches).max() == 0


def test_mean_precision_is_the_highest_at_that_recall_or_a_greater_one():
    run = random_run(3)
    total = np.zeros(101)
    curves = [curve for curve in run.curves if curve.objects]
    assert len(curves) == 3  # a class that does not occur has no precision
    for curve in curves:
        for place in range(101):
            reached = curve.recall >= place / 100 - 1e-6
            total[place] += curve.precision[reached].max() if reached.any() else 0
    found = matched_ap.mean_precision(matched_ap.match(run))
    assert found == pytest.approx(total / len(curves), abs=1e-6)
    assert found[0] > found[-1]


def test_resamples_are_the_same_for_all_runs_and_repeatable():
    a, b = (matched_ap.match(random_run(5)) for _ in range(2))
    flags = b.flags.copy()
    flags[flags == 1] = np.where(np.arange((flags == 1).sum()) % 2, 1, -1)
    b = matched_ap.Matches(b.labels, b.images, flags, b.objects)
    ap = matched_ap.resampled_ap([a, a, b], 300, seed=1)
    assert ap.shape == (3, 300)
    np.testing.assert_array_equal(ap[0], ap[1])
    assert np.all(ap[2] <= ap[0] + 1e-12) and np.mean(ap[2] < ap[0]) > 0.9
    np.testing.assert_array_equal(matched_ap.resampled_ap([a], 300, seed=1)[0], ap[0])
    assert np.any(matched_ap.resampled_ap([a], 300, seed=2)[0] != ap[0])
    # Images are drawn: some resamples are better and some worse than the data.
    whole = matched_ap.mean_ap(matched_ap.class_ap(a)[0])
    assert ap[0].min() < whole < ap[0].max()


def test_runs_on_other_images_cannot_be_resampled_together():
    runs = [matched_ap.match(random_run(seed)) for seed in (0, 1)]
    with pytest.raises(ValueError, match='tested on different images'):
        matched_ap.resampled_ap(runs, 100)


def test_interval_draws_images_and_seeds():
    images = np.linspace(0, 1, 1001)[None]
    assert matched_ap.paired_interval(images) == pytest.approx((0.025, 0.975))
    # Images make no difference here: what is left is the choice of the seeds.
    seeds = np.repeat([[0.0], [1.0]], 4000, axis=1)
    assert matched_ap.paired_interval(seeds) == (0.0, 1.0)
    same = np.full((3, 200), 0.25)
    assert matched_ap.paired_interval(same) == (0.25, 0.25)


def boxes_run(truth, found, difficult=()):
    """One image of one class; a found box is x1, y1, x2, y2 and score."""
    annotation = dict(
        bboxes=np.array(truth, np.float32).reshape(-1, 4),
        labels=np.zeros(len(truth), int),
        bboxes_ignore=np.array(difficult, np.float32).reshape(-1, 4),
        labels_ignore=np.zeros(len(difficult), int),
    )
    rows = np.array(found, np.float32).reshape(-1, 5)
    return Run('boxes', ('a',), {0: ''}, [annotation], [[rows]])


OBJECT = [0, 0, 100, 100]


def test_coco_ap_is_the_mean_over_ious():
    assert matched_ap.coco_ap(boxes_run([OBJECT], [[*OBJECT, 0.9]])) == pytest.approx(1)
    # IoU 0.72 reaches the thresholds 0.5, 0.55, 0.6, 0.65 and 0.7 of ten.
    shifted = boxes_run([OBJECT], [[0, 0, 72, 100, 0.9]])
    assert matched_ap.coco_ap(shifted) == pytest.approx(0.5)
    missed = boxes_run([OBJECT], [[0, 0, 72, 100, 0.9], [*OBJECT, 0.1]])
    assert matched_ap.coco_ap(missed) == pytest.approx(0.5 + 0.5 * 0.5)


def test_coco_ap_ignores_difficult_objects_as_voc_does():
    hard, hit = [200, 0, 300, 100], [*OBJECT, 0.5]
    twice = boxes_run([OBJECT], [[*hard, 0.9], [*hard, 0.8], hit], [hard])
    assert matched_ap.coco_ap(twice) == pytest.approx(1.0)
    assert matched_ap.class_ap(matched_ap.match(twice))[0, 0] == 1.0
    # Inside the difficult object, but not it: a crowd would forgive that.
    inside = boxes_run([OBJECT], [[200, 0, 240, 40, 0.9], hit], [hard])
    assert matched_ap.coco_ap(inside) == pytest.approx(0.5)
    assert matched_ap.class_ap(matched_ap.match(inside))[0, 0] == 0.5


# Tables, pages and pictures


def record(stem, seed, ap50, ap=0.2, images=12, **more):
    return {
        'config': stem,
        'config_sha': f'sha of {stem}',
        'seed': seed,
        'versions': {},
        'images': images,
        'ap50': ap50,
        'ap': ap,
        'curve': [
            dict(epoch=1, loss_cls=2.0),
            dict(epoch=2, loss_cls=0.5 + ap50, val_ap50=ap50),
        ],
        'pr_curve': np.linspace(1, ap50, 101).tolist(),
        **more,
    }


@pytest.fixture
def compared(tmp_path):
    """A folder with two configs of two seeds, and one seed of the second more."""
    matches = matched_ap.match(random_run(0))
    groups = {
        'net_ce_voc': {
            0: record('net_ce_voc', 0, 0.5),
            1: record('net_ce_voc', 1, 0.6),
        },
        'net_rambo_voc': {
            seed: record('net_rambo_voc', seed, ap50, 0.3)
            for seed, ap50 in ((0, 0.62), (1, 0.58), (2, 0.9))
        },
    }
    comparison = compare_report.compare(
        'voc', groups, {s: dict.fromkeys(g, matches) for s, g in groups.items()}, 200
    )
    for stem, records in groups.items():
        for seed, one in records.items():
            path = tmp_path / compare_report.run_name(stem, seed)
            compare_report.write_json(path, one)
    compare_report.write_json(tmp_path / compare_report.COMPARISON, comparison)
    return tmp_path


def test_table_pairs_seeds_and_reads_back_what_was_written(compared):
    comparison, groups = compare_report.read_comparison(compared)
    # The same matches for all: no difference in any resample.
    assert comparison['intervals'] == {'net_rambo_voc': [0.0, 0.0]}
    lines = compare_report.table(comparison, groups).splitlines()
    assert lines[0].startswith('| config | seeds | AP50 | AP | Δ AP50 [95 % interval]')
    assert lines[2] == '| ce | 2 | 55.0 ± 7.1 | 20.0 ± 0.0 |  |  |'
    # Δ: the mean of +12 and -2 with the seeds 0 and 1; seed 2 has no pair.
    assert lines[3] == (
        '| rambo | 3 | 70.0 ± 17.4 | 30.0 ± 0.0 | +5.0 [+0.0, +0.0] | +10.0 |'
    )
    assert 'on 12 test images' in lines[-1] and '`ce`' in lines[-1]
    assert '200 resamples' in lines[-1]


def test_intervals_hold_the_difference():
    runs = [matched_ap.match(random_run(4)) for _ in range(2)]
    worse = np.where(np.arange(len(runs[1].flags)) % 3, runs[1].flags, -1)
    runs[1] = matched_ap.Matches(**{**vars(runs[1]), 'flags': worse})
    aps = [float(matched_ap.mean_ap(matched_ap.class_ap(run)[0])) for run in runs]
    groups = {name: {0: record(name, 0, ap)} for name, ap in zip('ab', aps)}
    matches = {name: {0: run} for name, run in zip('ab', runs)}
    comparison = compare_report.compare('x', groups, matches, 500)
    low, high = comparison['intervals']['b']
    assert low < aps[1] - aps[0] < high < 0.05
    assert low < -0.05


def test_no_common_seed_and_one_seed(compared):
    comparison, groups = compare_report.read_comparison(compared)
    alone = {
        'net_ce_voc': {0: groups['net_ce_voc'][0]},
        'net_rambo_voc': {2: groups['net_rambo_voc'][2]},
    }
    text = compare_report.table({**comparison, 'intervals': {}}, alone)
    assert '| ce | 1 | 50.0 | 20.0 |' in text
    assert 'no common seed' in text


def test_changed_runs_do_not_make_a_table(compared):
    path = compared / 'net_ce_voc_seed_1.json'
    compare_report.write_json(path, record('net_ce_voc', 1, 0.61))
    with pytest.raises(ValueError, match=r'net_ce_voc_seed_1\.json changed or went'):
        compare_report.read_comparison(compared)
    path.unlink()
    with pytest.raises(ValueError, match=r'net_ce_voc_seed_1\.json changed or went'):
        compare_report.read_comparison(compared)
    path.write_text('{')
    with pytest.raises(ValueError, match='is no JSON file'):
        compare_report.read_comparison(compared)


def test_short_names():
    short = compare_report.short_names
    assert list(short(['a_ce_x', 'a_rambo_x']).values()) == ['ce', 'rambo']
    assert list(short(['a_x', 'a_b_x']).values()) == ['a_x', 'a_b_x']
    assert list(short(['a_ce_x']).values()) == ['a_ce_x']


def test_command_line_prints_and_puts_the_table_into_a_page(compared, capsys):
    page, picture = compared / 'results.md', compared / 'new' / 'curves.png'
    page.write_text('# Results\n\n<!-- compare voc -->\nold\n<!-- end voc -->\n\nEnd\n')
    command = ['--name', 'voc', '--out', str(compared), '--table-only']
    for _ in range(2):  # the second time changes nothing
        compare.main([*command, '--update', str(page), '--plot', str(picture)])
        text = page.read_text()
        table = compare_report.table(*compare_report.read_comparison(compared))
        assert text == (
            f'# Results\n\n<!-- compare voc -->\n\n{table}\n\n<!-- end voc -->\n\nEnd\n'
        )
    assert table in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b'\x89PNG' and picture.stat().st_size > 20000


@pytest.mark.parametrize(
    'text',
    [
        None,
        'no markers',
        '<!-- end voc -->\n<!-- compare voc -->',
        2 * '<!-- compare voc --><!-- end voc -->',
        '<!-- compare voc2 --><!-- end voc2 -->',
    ],
)
def test_pages_without_their_markers_are_left_alone(tmp_path, text):
    page = tmp_path / 'page.md'
    if text is not None:
        page.write_text(text)
    with pytest.raises(ValueError, match=r"expected one line '<!-- compare voc -->'"):
        update_page(page, *compare_report.marks('voc'), 'table')
    assert (page.read_text() if page.exists() else None) == text


# Runs of the past


def test_training_curve_joins_the_parts_of_an_interrupted_run(tmp_path):
    def log(name, *lines, end=''):
        path = tmp_path / name / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(map(json.dumps, lines)) + end)

    def train(epoch, step, loss):
        return dict(loss=loss, loss_cls=loss / 2, lr=1.0, epoch=epoch, step=step)

    log('20250101_000000', train(1, 1, 100.0))
    log(
        '20260101_000000',
        train(1, 10, 4.0),
        train(1, 20, 2.0),
        {'pascal_voc/mAP': 0.25, 'step': 1},
        train(2, 30, 9.0),
        end='\n{"loss": 9',
    )
    log('20260102_000000', train(2, 30, 1.0), {'pascal_voc/mAP': 0.5, 'step': 2})
    assert compare.training_curve(tmp_path, since='20260101_000000') == [
        dict(epoch=1, loss=3.0, loss_cls=1.5, val_ap50=0.25),
        dict(epoch=2, loss=1.0, loss_cls=0.5, val_ap50=0.5),
    ]


# Configs


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = tmp_path / 'data'
    folder.mkdir()
    monkeypatch.setenv('RAMBO_DEMO_DATA', str(folder))
    return folder


def variant(tmp_path, text, name='net_other_demo.py', base=CE):
    path = tmp_path / name
    path.write_text(f'_base_ = {str(base)!r}\n{text}\n')
    return path


def test_hash_is_of_what_is_trained_not_of_where_the_data_are(
    tmp_path, data, monkeypatch
):
    first = compare_configs.load(CE, {})
    monkeypatch.setenv('RAMBO_DEMO_DATA', str(tmp_path))
    assert compare_configs.load(CE, {}).sha == first.sha
    monkeypatch.delenv('RAMBO_DEMO_DATA')
    assert compare_configs.load(CE, {}).sha == first.sha
    assert compare_configs.load(CE, {'randomness.seed': 7}).sha == first.sha
    assert str(data) not in json.dumps(first.resolved)
    longer = compare_configs.load(CE, {'train_cfg.max_epochs': 9})
    assert longer.sha != first.sha and longer.epochs == 9
    said = compare_configs.changes(first.resolved, longer.resolved)
    assert said == 'train_cfg.max_epochs: 4 -> 9'
    other = compare_configs.load(RAMBO, {})
    said = compare_configs.changes(first.resolved, other.resolved, limit=3)
    assert said.endswith(' and 1 more')


def test_hash_leaves_out_what_cannot_change_a_result(tmp_path, data):
    def sha(text):
        return compare_configs.load(variant(tmp_path, text), {}).sha

    plain = compare_configs.load(CE, {})
    assert sha("custom_imports = dict(_delete_=True, imports=['json'])") == plain.sha
    for name, same in (('NumClassCheckHook', True), ('InvalidLossHook', False)):
        found = sha(f"default_hooks = dict(another=dict(type='{name}'))")
        assert (found == plain.sha) == same
    before = dict(plain.resolved, custom_imports=dict(imports=['somewhere']))
    assert compare_configs.trained_alike(before, plain.resolved)
    longer = dict(plain.resolved, max_epochs=9)
    assert not compare_configs.trained_alike(longer, plain.resolved)


@pytest.mark.parametrize(
    'text, message',
    [
        ('train_cfg = dict(max_epochs=7)', r'differ in the number of epochs: 4 and 7'),
        (
            'model = dict(roi_head=dict(bbox_head=dict(num_classes=5)))',
            r'number of classes: \[6\] and \[5\]',
        ),
        (
            "test_dataloader = dict(dataset=dict(ann_file='other.txt'))",
            r'differ in the test split: .*test\.txt.* and .*other\.txt',
        ),
        (
            "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=9)",
            r'train_cfg\.max_epochs must be a positive number of epochs, got None',
        ),
        ("load_from = 'none.pth'", r"load_from 'none\.pth' does not exist"),
    ],
)
def test_configs_that_cannot_be_compared_are_refused(tmp_path, data, text, message):
    paths = [CE, variant(tmp_path, text)]
    candidates = [compare_configs.load(path, {}) for path in paths]
    with pytest.raises(ValueError, match=message):
        compare_configs.check(candidates)


def test_comparable_configs_pass_and_names_must_differ(tmp_path, data):
    ce, rambo = (compare_configs.load(path, {}) for path in (CE, RAMBO))
    compare_configs.check([ce, rambo])
    same = compare_configs.load(variant(tmp_path, '', CE.name), {})
    with pytest.raises(ValueError, match='have the same name'):
        compare_configs.check([ce, same])


def test_missing_data_and_weights_name_the_variable(tmp_path, data, monkeypatch):
    gone = str(tmp_path / 'gone')
    monkeypatch.setenv('RAMBO_DEMO_DATA', gone)
    with pytest.raises(
        ValueError, match=r"gone' does not exist; .* in RAMBO_DEMO_DATA, which is '.*"
    ):
        compare_configs.check([compare_configs.load(CE, {})])
    monkeypatch.setenv('RAMBO_VOC_SUBSET', str(tmp_path))
    monkeypatch.delenv('RAMBO_MOBILENETV2', raising=False)
    monkeypatch.chdir(tmp_path)
    voc = next((ROOT / 'configs' / 'voc_subset').glob('*_ce_*.py'))
    with pytest.raises(
        ValueError, match='checkpoint .* RAMBO_MOBILENETV2, which is not set'
    ):
        compare_configs.check([compare_configs.load(voc, {})])


def test_options_are_parsed_as_mmdet_does():
    parse = compare_configs.parse_options
    assert parse(['a.b=1', 'c=[1,2]', 'd=x']) == {'a.b': 1, 'c': [1, 2], 'd': 'x'}
    assert parse([]) == {}
    with pytest.raises(ValueError, match=r"must be pairs key=value, got 'x'"):
        parse(['x'])
    with pytest.raises(ValueError, match='name the seeds with --seeds'):
        parse(['randomness.seed=3'])


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['a.py', '--seeds', '1', '1'], 'must be distinct'),
        (['a.py', '--seeds', '-1'], 'not negative'),
        (['a.py', '--jobs', '0'], '--jobs must be at least 1, got 0'),
        (['a.py', '--table-only'], 'got both'),
        ([], 'got neither'),
        (['a.py', '--name', 'a b'], "dots and dashes, got 'a b'"),
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.parse(['--name', 'x', *arguments])
    assert message in capsys.readouterr().err


def test_a_missing_config_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r'CONFIG must be a config file, got none\.py'):
        compare.main(['none.py', '--name', 'x', '--out', str(tmp_path)])


# Runs, with scripts that stand for mmdet's


FAKE = """
import json, os, sys, time
from pathlib import Path

argv = sys.argv[1:]
work = Path(argv[argv.index('--work-dir') + 1])
options = argv[argv.index('--cfg-options') + 1:]
seed = [o for o in options if o.startswith('randomness.seed=')][0].split('=')[1]
with open(os.environ['FAKE_CALLS'], 'a') as calls:
    calls.write(json.dumps(dict(
        argv=argv, pid=os.getpid(), threads=os.environ['OMP_NUM_THREADS'],
        time=time.time(), name=Path(argv[0]).stem)) + '\\n')
if '--out' in argv:
    sys.exit(0)
first = 1
if '--resume' in argv:
    first += int(Path(argv[argv.index('--resume') + 1]).stem.split('_')[1])
for epoch in range(first, 5):
    if os.environ.get('FAKE_FAIL') == f'{Path(argv[0]).stem} {seed} {epoch}':
        print('CUDA error: none of it', file=sys.stderr)
        sys.exit(3)
    if os.environ.get('FAKE_HANG') == str(epoch):
        child = os.fork()
        if child:
            Path(work, 'child').write_text(str(child))
        time.sleep(60)
    time.sleep(float(os.environ.get('FAKE_SECONDS', 0)))
    Path(work, f'epoch_{epoch}.pth').write_text('')
    Path(work, 'last_checkpoint').write_text(f'/moved/since/epoch_{epoch}.pth')
"""


class Fakes:
    """Calls compare.main with a training that takes no time and finds nothing."""

    def __init__(self, tmp_path):
        self.work, self.out = tmp_path / 'work', tmp_path / 'out'
        self.calls_file = tmp_path / 'calls'

    def main(self, *arguments, configs=(CE, RAMBO), seeds=(0,)):
        command = [*configs, '--name', 'x', '--work-dir', self.work, '--out', self.out]
        command += ['--resamples', '100', '--seeds', *seeds, *arguments]
        self.calls_file.write_text('')
        compare.main([str(part) for part in command])

    def calls(self):
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def steps(self):
        """For each call: config, step and what it was resumed from."""
        found = []
        for call in self.calls():
            argv = call['argv']
            step = 'test' if '--out' in argv else 'train'
            at = (
                Path(argv[argv.index('--resume') + 1]).stem
                if '--resume' in argv
                else ''
            )
            found.append(('rambo' if 'rambo' in call['name'] else 'ce', step, at))
        return found

    def folder(self, path, seed=0):
        return self.work / path.stem / f'seed_{seed}'


@pytest.fixture
def fakes(tmp_path, data, monkeypatch):
    script = tmp_path / 'fake.py'
    script.write_text(FAKE)
    monkeypatch.setattr(compare, 'TRAIN', script)
    monkeypatch.setattr(compare, 'TEST', script)
    fakes = Fakes(tmp_path)
    monkeypatch.setenv('FAKE_CALLS', str(fakes.calls_file))

    def evaluate(plan):
        matched_ap.match(random_run(0)).save(plan.matches_path)
        more = dict(config_sha=plan.candidate.sha, versions=plan.versions)
        compare_report.write_json(
            plan.record_path, record(plan.candidate.stem, plan.seed, 0.5, **more)
        )
        return 'evaluated'

    monkeypatch.setattr(compare, 'evaluate', evaluate)
    return fakes


def test_a_comparison_grows_and_what_is_done_is_skipped(fakes, capsys):
    fakes.main()
    assert sorted(fakes.steps()) == [
        *[('ce', 'test', ''), ('ce', 'train', '')],
        *[('rambo', 'test', ''), ('rambo', 'train', '')],
    ]
    output = capsys.readouterr().out
    assert 'ce_demo seed 0: train begins' in output
    assert '| ce | 1 | 50.0 |' in output
    fakes.main('--cfg-options', 'train_cfg.max_epochs=4', seeds=(1, 0))
    assert len(fakes.steps()) == 4  # max_epochs was 4: it is the same config
    train = next(c for c in fakes.calls() if '--out' not in c['argv'])
    assert train['argv'][-2:] == ['train_cfg.max_epochs=4', 'randomness.seed=1']
    output = capsys.readouterr().out
    assert 'seed 0: done before' in output and '| rambo | 2 | 50.0 ± 0.0 |' in output
    fakes.main(seeds=(1,))  # the runs of seed 0 stay in the table
    assert fakes.steps() == []
    assert '| rambo | 2 |' in capsys.readouterr().out


def test_jobs_run_side_by_side_and_share_the_cores(fakes, monkeypatch):
    monkeypatch.setattr(compare, 'cores', lambda: 7)
    monkeypatch.setenv('FAKE_SECONDS', '0.4')  # 1.6 seconds for a training
    fakes.main('--jobs', '2', seeds=(0, 1))
    calls = fakes.calls()
    assert {call['threads'] for call in calls} == {'3'}
    begins = [call['time'] for call in calls if '--out' not in call['argv']]
    assert begins[1] - begins[0] < 1.5 < begins[2] - begins[0]


def test_an_interrupted_run_goes_on_from_its_checkpoint(fakes, monkeypatch, capsys):
    monkeypatch.setenv('FAKE_FAIL', f'{CE.stem} 0 3')
    with pytest.raises(SystemExit, match='ce_demo has no finished run'):
        fakes.main()
    monkeypatch.delenv('FAKE_FAIL')
    capsys.readouterr()
    fakes.main()
    assert fakes.steps() == [('ce', 'train', 'epoch_2'), ('ce', 'test', '')]
    assert 'seed 0: train goes on after 50%' in capsys.readouterr().out
    state = json.loads((fakes.folder(CE) / 'run.json').read_text())
    assert state['sessions'] == 2 and state['trained'] and state['train_seconds'] > 0


def test_a_failure_is_reported_with_its_log_and_loses_no_other(
    fakes, monkeypatch, capsys
):
    monkeypatch.setenv('FAKE_FAIL', f'{CE.stem} 1 2')
    with pytest.raises(SystemExit, match='compare: 1 of 4 runs failed'):
        fakes.main(seeds=(0, 1))
    output = capsys.readouterr()
    log = fakes.folder(CE, 1) / 'train.log'
    assert f'seed 1 failed: train ended with status 3; log: {log}' in output.err
    assert '    CUDA error: none of it' in output.err
    assert '| ce | 1 |' in output.out and '| rambo | 2 |' in output.out


def test_a_failing_evaluation_is_a_failure_of_its_run_alone(fakes, monkeypatch, capsys):
    evaluate = compare.evaluate

    def failing(plan):
        if plan.candidate.stem == RAMBO.stem:
            raise ValueError('AP50 is not what it was')
        return evaluate(plan)

    monkeypatch.setattr(compare, 'evaluate', failing)
    with pytest.raises(SystemExit, match='1 of 2 runs failed'):
        fakes.main()
    assert 'ValueError: AP50 is not what it was' in capsys.readouterr().err
    monkeypatch.setattr(compare, 'evaluate', evaluate)
    fakes.main()
    assert fakes.steps() == [('rambo', 'test', '')]  # it need not be trained again


def test_results_of_another_config_are_refused_before_anything_is_trained(
    fakes, tmp_path
):
    path = variant(tmp_path, '', 'net_ce_demo.py')
    fakes.main(configs=[path])
    variant(tmp_path, 'optim_wrapper = dict(optimizer=dict(lr=0.5))', 'net_ce_demo.py')
    with pytest.raises(
        SystemExit,
        match=r'net_ce_demo seed 0 was trained with another config than it is now '
        r'\(optim_wrapper\.optimizer\.lr: 0\.002 -> 0\.5\).*move or delete',
    ):
        fakes.main(configs=[path, RAMBO], seeds=(1, 0))
    assert fakes.steps() == []
    # Also where only the results' file is left.
    (fakes.folder(path) / 'last_checkpoint').unlink()
    with pytest.raises(SystemExit, match=r'seed_0\.json is of another config'):
        fakes.main(configs=[path])
    variant(tmp_path, '', 'net_ce_demo.py')
    (fakes.folder(path) / 'run.json').unlink()
    fakes.main(configs=[path])  # on another machine, with the results alone
    assert fakes.steps() == []
    next(fakes.out.glob('*.npz')).unlink()
    with pytest.raises(SystemExit, match=r'is there, but not .*seed_0\.npz beside it'):
        fakes.main(configs=[path])
    assert fakes.steps() == []


def test_where_only_the_test_changed_nothing_is_trained_again(
    fakes, tmp_path, monkeypatch
):
    path = variant(tmp_path, '', 'net_ce_demo.py')
    fakes.main(configs=[path])
    changed_after_the_test = []
    evaluate = compare.evaluate

    def watch(plan):
        changed_after_the_test.append(plan.only_test_changed)
        return evaluate(plan)

    monkeypatch.setattr(compare, 'evaluate', watch)
    text = 'model = dict(test_cfg=dict(rcnn=dict(score_thr=0.001)))'
    variant(tmp_path, text, 'net_ce_demo.py')
    fakes.main(configs=[path])
    assert fakes.steps() == [('ce', 'test', '')]
    assert changed_after_the_test == [False]
    fakes.main(configs=[path])
    assert fakes.steps() == []


def test_a_checkpoint_of_unknown_origin_is_refused(fakes):
    folder = fakes.folder(CE)
    folder.mkdir(parents=True)
    (folder / 'last_checkpoint').write_text('epoch_1.pth')
    (folder / 'epoch_1.pth').write_text('')
    with pytest.raises(SystemExit, match='holds a checkpoint, but no run'):
        fakes.main()
    assert fakes.steps() == []


def test_an_attempt_without_a_checkpoint_is_forgotten(fakes, monkeypatch, tmp_path):
    path = variant(tmp_path, '', 'net_ce_demo.py')
    monkeypatch.setenv('FAKE_FAIL', 'net_ce_demo 0 1')
    with pytest.raises(SystemExit, match='has no finished run'):
        fakes.main(configs=[path])
    monkeypatch.delenv('FAKE_FAIL')
    variant(tmp_path, 'optim_wrapper = dict(optimizer=dict(lr=0.5))', 'net_ce_demo.py')
    fakes.main(configs=[path])
    assert fakes.steps() == [('ce', 'train', ''), ('ce', 'test', '')]
    state = json.loads((fakes.folder(path) / 'run.json').read_text())
    assert state['sessions'] == 1


def gone(pid):
    """Whether a process has ended, perhaps not yet fetched by its parent."""
    try:
        return (
            Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
        )
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='looks at processes in /proc')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_processes_and_the_next_call_goes_on(
    fakes, monkeypatch, capsys, number
):
    monkeypatch.setenv('FAKE_HANG', '2')
    pids = []

    def stop():
        deadline = time.monotonic() + 30
        children = [fakes.folder(path) / 'child' for path in (CE, RAMBO)]
        while time.monotonic() < deadline:
            texts = [path.read_text() if path.exists() else '' for path in children]
            if all(texts):
                pids.extend(int(text) for text in texts)
                break
            time.sleep(0.05)
        pids.extend(call['pid'] for call in fakes.calls())
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    before = signal.getsignal(number)
    thread.start()
    with pytest.raises(SystemExit) as exit:
        fakes.main('--jobs', '2', seeds=(0, 1))
    thread.join()
    assert exit.value.code == 128 + number
    assert 'the same command goes on' in capsys.readouterr().err
    assert len(pids) == 4
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not all(map(gone, pids)):
        time.sleep(0.05)
    assert all(map(gone, pids))
    assert signal.getsignal(number) == before
    monkeypatch.delenv('FAKE_HANG')
    fakes.main()
    trainings = [step for step in fakes.steps() if step[1] == 'train']
    assert sorted(trainings) == [
        ('ce', 'train', 'epoch_1'),
        ('rambo', 'train', 'epoch_1'),
    ]


def test_two_programs_do_not_train_the_same_run(fakes, capsys):
    import fcntl

    folder = fakes.folder(RAMBO)
    folder.mkdir(parents=True)
    with (folder / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match='1 of 2 runs failed'):
            fakes.main()
        assert 'another process is at work in' in capsys.readouterr().err
        assert {name for name, _, _ in fakes.steps()} == {'ce'}
    fakes.main()
    assert {name for name, _, _ in fakes.steps()} == {'rambo'}


def test_a_page_without_markers_is_refused_before_training(fakes, tmp_path):
    with pytest.raises(SystemExit, match=r'--update .*page\.md: expected one line'):
        fakes.main('--update', tmp_path / 'page.md')
    assert fakes.steps() == []


def test_the_checkpoint_before_is_kept_while_the_next_is_written(tmp_path, data):
    def command(options):
        plan = compare.Plan(
            candidate=compare_configs.load(CE, options),
            seed=3,
            folder=tmp_path,
            out=tmp_path,
            options=[],
            versions={},
            threads=1,
        )
        return plan.train_command()

    keep = 'default_hooks.checkpoint.max_keep_ckpts'
    assert command({keep: 1})[-2:] == ['randomness.seed=3', f'{keep}=2']
    assert command({keep: 3})[-1] == 'randomness.seed=3'


# All of it


@pytest.mark.slow
def test_real_trainings_end_to_end(tmp_path, monkeypatch, capsys):
    voc = tmp_path / 'voc'
    make_demo_voc.generate(voc, train=8, test=6, size=(96, 96))
    monkeypatch.setenv('RAMBO_DEMO_DATA', str(voc))
    command = [str(CE), str(RAMBO), '--name', 'demo', '--jobs', '2', '--seeds', '3']
    command += ['--work-dir', str(tmp_path / 'work'), '--out', str(tmp_path / 'out')]
    options = ['train_cfg.max_epochs=2', 'train_cfg.val_interval=1']
    options += ['default_hooks.logger.interval=1']
    options += ['default_hooks.checkpoint.interval=1']
    compare.main([*command, '--resamples', '100', '--cfg-options', *options])
    output = capsys.readouterr().out
    assert '| ce | 1 | ' in output and '| rambo | 1 | ' in output
    _, groups = compare_report.read_comparison(tmp_path / 'out')
    for path in (CE, RAMBO):
        found = groups[path.stem][3]
        assert found['images'] == 6 and found['sessions'] == 1
        assert found['train_seconds'] > 0 and set(found['versions']) > {
            'torch',
            'mmdet',
        }
        assert [point['epoch'] for point in found['curve']] == [1, 2]
        # AP50 of the test is that of the last validation, as mmdet printed it.
        assert found['curve'][-1]['val_ap50'] == pytest.approx(found['ap50'], rel=1e-3)
        assert {'loss_cls', 'loss_bbox'} < set(found['curve'][0])
        assert len(found['class_ap50']) == 6 and len(found['pr_curve']) == 101
        folder = tmp_path / 'work' / path.stem / 'seed_3'
        config = next(folder.glob('2*/vis_data/config.py')).read_text()
        assert 'randomness = dict(seed=3)' in config
        with np.load(folder / 'detections.npz') as kept:
            labels = kept['labels']
            assert len(kept['boxes']) == len(labels) > 0
            assert len(kept['image_ids']) == 6
        matches = matched_ap.Matches.load(tmp_path / 'out' / f'{path.stem}_seed_3.npz')
        assert set(matches.labels) <= set(labels)
        ap = matched_ap.mean_ap(matched_ap.class_ap(matches)[0])
        assert ap == pytest.approx(found['ap50'])
        size = (tmp_path / 'out' / f'{path.stem}_seed_3.json').stat().st_size
        assert size < 5000
    assert 'class_ap' in groups[RAMBO.stem][3]['curve'][0]
    compare.main([*command, '--resamples', '100', '--cfg-options', *options])
    assert capsys.readouterr().out.count('done before') == 2
