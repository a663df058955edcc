"""Rows of tools/experiments/converged.py, its tables, and what they are measured by."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests import ROOT

pytest.importorskip('mmdet', reason='needs mmdet')

from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules

from tests.tools.test_compare import boxes_run, data, fakes, random_run, record, variant
from tools.analysis_tools import matched_ap
from tools.experiments import compare, compare_report, converged
from tools.experiments.compare_configs import load, parse_options

_FIXTURES = (data, fakes)
CE = ROOT / 'configs/voc_subset/faster-rcnn_mobilenetv2_fpn-tiny_ce_12e_voc-subset.py'


@pytest.mark.parametrize('decimals', [None, 1])
def test_best_f1_is_the_best_of_all_thresholds(decimals):
    matches = matched_ap.match(random_run(4, decimals=decimals))

    def f1(threshold):
        flags = matches.flags[matches.scores >= threshold]
        hits, misses = (flags == 1).sum(), (flags == -1).sum()
        return 2 * hits / (hits + misses + matches.objects.sum())

    found, threshold, at_half = matched_ap.best_f1(matches)
    assert found == pytest.approx(max(map(f1, matches.scores)))
    assert found == pytest.approx(f1(threshold)) and 0 < found < 1
    assert at_half == pytest.approx(f1(0.5)) and at_half <= found


def test_nothing_found_has_no_f1():
    truth = [0, 0, 10, 10]
    assert matched_ap.best_f1(matched_ap.match(boxes_run([truth], []))) == (0, 0, 0)
    low = matched_ap.match(boxes_run([truth], [[*truth, 0.4]]))
    assert matched_ap.best_f1(low) == (1.0, pytest.approx(0.4), 0.0)


def test_coco_ap_by_overlap_and_class():
    run = boxes_run([[0, 0, 100, 100]], [[0, 0, 72, 100, 0.9]])
    assert matched_ap.coco_class_ap(run)[:, 0] == pytest.approx([1] * 5 + [0] * 5)
    run = random_run(3)  # class 3 has no object that counts
    by_class = matched_ap.coco_class_ap(run)
    assert np.isnan(by_class).all(axis=0).tolist() == [False, False, False, True]
    none = [[rows[:0] for rows in image] for image in run.detections]
    vars(run).update(detections=none)
    np.testing.assert_array_equal(matched_ap.coco_class_ap(run), 0 * by_class)


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


def test_a_run_becomes_a_row_and_is_not_made_again(fakes, tmp_path, monkeypatch):
    def evaluate(plan):
        matched_ap.match(random_run(0)).save(plan.matches_path)
        more = dict(ap75=0.1, best_f1=0.4, best_threshold=0.7, f1_at_half=0.3)
        more.update(class_ap50=dict(a=0.5, b=None), class_ap=dict(a=0.2, b=None))
        more.update(config_sha=plan.candidate.sha, options=list(plan.options))
        state = dict(train_seconds=1.0, threads=plan.threads, sessions=2, date='')
        stem = plan.candidate.stem
        found = record(stem, plan.seed, 0.5, **more, **state)
        compare_report.write_json(plan.record_path, found)
        return ''

    monkeypatch.setattr(compare, 'evaluate', evaluate)
    config = variant(tmp_path, '', 'net_cnn_fpn-tiny_ce_4e_voc.py')
    out = tmp_path / 'rows.json'

    def main(*arguments):
        fakes.calls_file.write_text('')
        command = [config, '--out', out, '--work-dir', fakes.work, *arguments]
        converged.main([str(part) for part in command])
        return fakes.steps()

    assert main('--seeds', 0, 1) == 2 * [('ce', 'train', ''), ('ce', 'test', '')]
    assert {call['threads'] for call in fakes.calls()} == {'1'}
    monkeypatch.setenv('FAKE_FAIL', f'{config.stem} 2 4')
    with pytest.raises(SystemExit, match='1 runs failed'):
        main('--seeds', 0, 2)
    monkeypatch.delenv('FAKE_FAIL')
    assert main('--seeds', 0, 2) == [('ce', 'train', 'epoch_3'), ('ce', 'test', '')]
    first, *_, last = converged.read_rows(out)
    assert {key: first[key] for key in converged.KEY} == dict(
        data='voc', detector='net-tiny', loss='ce', seed=0
    )
    assert (first['AP50'], first['best_threshold'], last['seed']) == (50.0, 0.7, 2)
    assert first['class_AP'] == dict(a=20.0, b=None) and first['threads'] == 1
    assert first['curve'][-1]['AP50'] == 50.0 and first['split'] == 'test'

    longer = ['--cfg-options', 'train_cfg.max_epochs=5']
    with pytest.raises(SystemExit, match='has a row of .* of another config'):
        main(*longer)
    assert len(main('--loss', 'ce-5e', *longer)) == 2
    assert converged.read_rows(out)[-1]['loss'] == 'ce-5e'


def test_the_docs_show_what_the_file_holds():
    page = (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8')
    start, end = converged.MARKS
    shown = page.split(start)[1].split(end)[0].strip()
    assert shown == converged.tables(converged.read_rows(converged.OUT))


@pytest.mark.needs_shared
def test_tuning_trains_and_tests_on_different_images_of_the_training_split():
    cfg = load(CE, parse_options(converged.SPLITS['tuning'])).cfg
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
