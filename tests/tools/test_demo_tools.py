"""Tests of the demo's script, its configs and the pictures of results."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.demo_configs import CE, RAMBO

pytest.importorskip('mmdet', reason='needs mmdet')

import mmengine
import torch
from mmdet.evaluation import VOCMetric
from mmengine.config import Config

from tests.helpers.random_runs import boxes_run
from tools.analysis_tools import detections, plot_results
from tools.dataset_tools import make_demo_voc
from tools.dev import demo


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('demo') / 'voc'
    make_demo_voc.generate(root, train=1, test=16, size=(128, 96))
    return root


def _dump(data, path, noise):
    """Dumps predictions as tools/test.py does: the truth, disturbed."""
    rng = np.random.default_rng(0)
    scenes = make_demo_voc.iter_scenes('test', 16, (128, 96), seed=0)
    ids = (data / 'ImageSets' / 'Main' / 'test.txt').read_text().split()
    samples = []
    for name, (_, objects) in zip(ids, scenes):
        boxes = np.array([obj.box for obj in objects], float).reshape(-1, 4) - 1
        labels = np.array([make_demo_voc.CLASSES.index(o.name) for o in objects], int)
        if noise:
            # Shifted boxes, some of them of the wrong class, and inventions.
            corners = rng.uniform(0, 60, (4, 2))
            boxes = np.vstack([boxes, np.hstack([corners, corners + 30])])
            boxes += rng.normal(0, noise, boxes.shape)
            labels = np.concatenate([labels, rng.integers(0, 6, 4)])
            wrong = rng.random(len(labels)) < 0.2
            labels = np.where(wrong, rng.integers(0, 6, len(labels)), labels)
        samples.append(
            dict(
                img_id=name,
                pred_instances=dict(
                    bboxes=torch.tensor(boxes, dtype=torch.float32),
                    labels=torch.tensor(labels, dtype=torch.int64),
                    scores=torch.tensor(rng.random(len(labels)), dtype=torch.float32),
                ),
            )
        )
    mmengine.dump(samples, path)
    return path


@pytest.fixture
def load(data, tmp_path, monkeypatch):
    """Loads a run of the demo's config with the given disturbance."""
    monkeypatch.setenv(demo.DATA_VARIABLE, str(data))

    def load(noise, name=''):
        path = _dump(data, tmp_path / f'predictions{noise}.pkl', noise)
        return plot_results.load_run(RAMBO, path, name)

    return load


def _is_png(path):
    return path.stat().st_size > 5000 and path.read_bytes()[:4] == b'\x89PNG'


def test_perfect_detections_have_ap_1(load, tmp_path):
    run = load(0.0)
    assert run.classes == make_demo_voc.CLASSES
    assert {curve.ap for curve in run.curves if curve.objects} == {1.0}
    assert run.mean_ap == 1.0
    plot_results.plot_pr_curves([run], tmp_path / 'pr.png')
    assert _is_png(tmp_path / 'pr.png')


def test_kept_detections_load_like_the_dumped_ones(load, tmp_path):
    run = load(2.0, 'run')
    detections.save_detections(run, tmp_path / 'detections.npz')
    kept = plot_results.load_run(RAMBO, tmp_path / 'detections.npz', 'run')
    assert len(kept.detections) == len(run.detections) > 0
    for found, expected in zip(kept.detections, run.detections):
        for rows, others in zip(found, expected):
            np.testing.assert_array_equal(rows, others)


@pytest.mark.parametrize('mode', ['area', '11points'])
def test_ap_is_that_of_voc_metric(load, mode):
    run = replace(load(2.0), eval_mode=mode)
    metric = VOCMetric(eval_mode=mode)
    metric.dataset_meta = dict(classes=run.classes)
    for truth, found in zip(run.truth, run.detections):
        rows = torch.from_numpy(np.vstack(found))
        labels = np.repeat(range(len(found)), [len(rows) for rows in found])
        sample = dict(
            gt_instances=dict(
                bboxes=torch.from_numpy(truth['bboxes']),
                labels=torch.from_numpy(truth['labels']),
            ),
            ignored_instances=dict(
                bboxes=torch.from_numpy(truth['bboxes_ignore']),
                labels=torch.from_numpy(truth['labels_ignore']),
            ),
            pred_instances=dict(
                bboxes=rows[:, :4], scores=rows[:, 4], labels=torch.from_numpy(labels)
            ),
        )
        metric.process({}, [sample])
    expected = metric.evaluate(len(run.truth))['pascal_voc/mAP']
    assert 0.1 < expected < 0.95
    assert run.mean_ap == pytest.approx(expected, abs=1e-6)


def test_curves_list_scores_with_their_precision(load):
    run = load(2.0)
    for label, curve in enumerate(run.curves):
        assert len(curve.scores) == len(curve.recall) == len(curve.precision)
        assert np.all(np.diff(curve.scores) <= 0)
        # Keeping what reaches the best score keeps the best F1's detections.
        kept = sum(
            (rows[label][:, 4] >= curve.best[0]).sum() for rows in run.detections
        )
        f1 = 2 * curve.precision * curve.recall
        f1 /= np.maximum(curve.precision + curve.recall, 1e-12)
        assert f1[kept - 1] == f1.max()


@pytest.mark.parametrize(
    'score, text',
    [(0.5, '0.50'), (0.996, '0.996'), (0.99996, '0.99996'), (1.0, '1.00')],
)
def test_a_high_score_is_not_written_as_one(score, text):
    assert plot_results.score_text(score) == text


def test_labels_stay_inside_the_picture():
    figure, axis = plot_results.plt.subplots()
    axis.imshow(np.zeros((90, 120, 3)))
    for corner in ([0, 0], [0, 70], [100, 0], [100, 70], [70, 3]):
        box = np.array([*corner, corner[0] + 19, corner[1] + 19], float)
        plot_results._draw_box(axis, box, (0, 0, 0), 'diningtable 0.998')
    figure.canvas.draw()
    area = axis.get_window_extent()
    for text in axis.texts:
        found = text.get_window_extent()
        assert area.x0 <= found.x0 and found.x1 <= area.x1 + 1
        assert area.y0 <= found.y0 and found.y1 <= area.y1
    plot_results.plt.close(figure)


def test_misses_are_the_objects_without_a_hit():
    near, far = [0, 0, 50, 50], [60, 60, 90, 90]
    run = boxes_run([near, far], [[*near, 0.9], [*near, 0.8], [*far, 0.3]])
    for limit, expected in ((0.2, []), (0.5, [far]), (0.95, [near, far])):
        assert plot_results.missed(run, 0, 0, limit).tolist() == expected
    heading = plot_results._heading([run], None, 2)
    assert '(0.30 to 0.30) up' in heading.replace('\n', ' ')
    assert 'from 0.7 up' in plot_results._heading([run], 0.7, 9)
    row = plot_results.table([run]).splitlines()[2]
    assert row == '| a | 2 | 0.833 | 0.30 | 0.667 | 1.000 |'


def test_command_line_draws_one_run_and_two(load, data, tmp_path, capsys):
    load(0.0), load(2.0)
    first, second = (str(tmp_path / f'predictions{n}.pkl') for n in (0.0, 2.0))
    rambo, ce = str(RAMBO), str(CE)
    for out, others in (('one', []), ('two', ['--compare', ce, second])):
        plot_results.main(
            [rambo, first, *others, '--images', '3', '--out', str(tmp_path / out)]
        )
        assert _is_png(tmp_path / out / 'detections.png')
        assert _is_png(tmp_path / out / 'pr_curves.png')
    text = capsys.readouterr().out
    assert 'faster-rcnn_tiny_fpn_ce_demo' in text
    assert 'star' in text and '1.000' in text


def test_runs_on_other_data_are_refused(load):
    run = load(0.0)
    other = replace(run, classes=('cat',))
    with pytest.raises(ValueError, match='only runs on the same test data'):
        plot_results.plot_pr_curves([run, other], 'unused.png')


def test_predictions_of_other_images_are_refused(load, tmp_path):
    load(0.0)
    samples = mmengine.load(tmp_path / 'predictions0.0.pkl')
    mmengine.dump(samples[1:], tmp_path / 'fewer.pkl')
    with pytest.raises(ValueError, match=r'for 15 images, the test dataset .* has 16'):
        plot_results.load_run(RAMBO, tmp_path / 'fewer.pkl')
    samples[0]['pred_instances']['labels'] += 6
    mmengine.dump(samples, tmp_path / 'classes.pkl')
    with pytest.raises(ValueError, match='only the 6 classes 0 to 5: disc, square'):
        plot_results.load_run(RAMBO, tmp_path / 'classes.pkl')


def test_twin_config_differs_in_the_loss_alone():
    rambo, ce = (Config.fromfile(path).to_dict() for path in (RAMBO, CE))
    heads = [cfg['model']['roi_head']['bbox_head'] for cfg in (rambo, ce)]
    assert [head.pop('loss_cls')['type'] for head in heads] == [
        'RaMBOLoss',
        'CrossEntropyLoss',
    ]
    assert rambo == ce


def test_demo_configs_use_the_generator_s_classes_and_no_pretrained_weights():
    cfg = Config.fromfile(RAMBO)
    assert cfg.classes == make_demo_voc.CLASSES
    assert cfg.load_from is None
    assert cfg.model.backbone.get('init_cfg') is None


def test_demo_names_the_step_that_failed(capsys):
    command = [sys.executable, '-c', 'raise SystemExit(3)']
    with pytest.raises(SystemExit, match=r'exit status 3.*2/4 training'):
        demo._run('2/4 training', command)
    assert '$ ' in capsys.readouterr().out


@pytest.mark.parametrize(('noise', 'fails'), [(0.0, False), (2.0, True)])
def test_demo_passes_only_with_the_required_ap(
    load, data, tmp_path, monkeypatch, capsys, noise, fails
):
    """The training and the test are replaced, all the rest is as it is."""
    load(noise)
    work_dir = tmp_path / 'work'

    def run(step, command):
        if 'train.py' in command[1]:
            (work_dir / 'run').mkdir(parents=True)
            (work_dir / 'run' / 'run.log').write_text('')
            (work_dir / 'last_checkpoint').write_text('epoch_1.pth')
        else:
            predictions = tmp_path / f'predictions{noise}.pkl'
            (work_dir / 'predictions.pkl').write_bytes(predictions.read_bytes())

    monkeypatch.setattr(demo, '_run', run)
    monkeypatch.setattr(demo, 'generate', lambda out: False)
    args = ['--data', str(data), '--work-dir', str(work_dir)]
    if fails:
        with pytest.raises(SystemExit, match=r'below the required 0\.80'):
            demo.main(args)
    else:
        demo.main(args)
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith('AP50 on the test split: ')
    scripts = re.findall(r'^  \S+ (\S+/tools/\S+)', out, re.MULTILINE)
    assert len(scripts) == 3 and all(Path(script).is_file() for script in scripts)
    assert _is_png(work_dir / 'pr_curves.png')


def test_demo_refuses_a_missing_config(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(['--config', str(tmp_path / 'none.py')])
    assert '--config: expected a file' in capsys.readouterr().err
