"""Calibration: its measures, its fits, and detectors whose last layer is changed."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet', reason='needs mmdet')
from mmdet.models.layers import NormedLinear
from scipy.special import expit, softmax
from torch import nn

from tests.helpers.demo_configs import CE, RAMBO
from tests.helpers.random_detector import random_state
from tests.helpers.random_runs import boxes_run, random_run
from tools.analysis_tools import calibrate, calibration, classifier
from tools.analysis_tools.detections import HIT, IGNORED, scores_by_box
from tools.common.shrink_config import shrink
from tools.dataset_tools import make_demo_voc

# What is measured


def binned_error(scores, targets):
    """By the definition of the expected calibration error, a bin after the other."""
    error = 0.0
    for place in range(25):
        low, high = place / 25, (place + 1) / 25
        inside = [
            i for i, s in enumerate(scores) if low < s <= high or (s == 0 == place)
        ]
        if inside:
            score = sum(scores[i] for i in inside) / len(inside)
            target = sum(targets[i] for i in inside) / len(inside)
            error += len(inside) / len(scores) * abs(score - target)
    return error


def overlap(a, b):
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(wide, 0) * max(high, 0)
    areas = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return shared / (areas - shared)


def ious_by_definition(truth, rows, label):
    """Each detection's score and IoU, from the highest score down."""
    plain, hard = (
        truth[f'bboxes{s}'][truth[f'labels{s}'] == label].tolist()
        for s in ('', '_ignore')
    )
    for *box, score in sorted(rows.tolist(), key=lambda row: -row[4]):
        best = max(plain, key=lambda other: overlap(box, other), default=None)
        if best is not None and overlap(box, best) > 0:
            plain.remove(best)
            yield score, overlap(box, best)
        elif not any(overlap(box, other) > 0 for other in hard):
            yield score, 0.0


@pytest.mark.parametrize('seed', range(4))
def test_measures_are_their_definitions(seed):
    run = random_run(seed)
    scores = np.concatenate([r[:, 4] for image in run.detections for r in image])
    flags = np.concatenate([f for image in run.flags for f in image])
    keep = flags != IGNORED
    assert 0 < keep.sum() < len(keep)
    expected = binned_error(scores[keep].tolist(), (flags[keep] == HIT).tolist())
    assert calibration.d_ece(run) == pytest.approx(expected, abs=1e-6)
    errors = []
    for label, curve in enumerate(run.curves):
        pairs = [
            pair
            for truth, image in zip(run.truth, run.detections)
            for pair in ious_by_definition(truth, image[label], label)
        ]
        if curve.objects:
            errors.append(binned_error(*zip(*pairs)))
    assert len(errors) == 3  # of one class there are no objects
    assert calibration.laece0(run) == pytest.approx(np.mean(errors), abs=1e-5)


def test_a_detection_takes_one_object_only():
    run = boxes_run([[0, 0, 100, 100]], [[0, 0, 100, 100, 1.0]] * 2)
    assert calibration.d_ece(run) == calibration.laece0(run) == 0.5
    assert np.isnan(calibration.laece0(boxes_run([[0, 0, 9, 9]], [])))


# What is fitted


def test_sigmoids_are_fitted_and_rare_classes_keep_to_the_others():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [20_000, 20_000, 5])
    logits = rng.normal(4, 3, len(labels))
    slopes, offsets = np.array([0.5, 2.0, 1.0]), np.array([-3.0, -6.0, 0.0])
    hits = rng.random(len(labels)) < expit(slopes[labels] * logits + offsets[labels])
    a, b = calibration.fit_sigmoid(logits, hits, labels, 4)
    np.testing.assert_allclose(a[:2], slopes[:2], rtol=0.06)
    np.testing.assert_allclose(b[:2], offsets[:2], rtol=0.06)
    assert a[3] == pytest.approx(a[2], rel=0.5)  # never seen, and seen five times
    assert slopes[0] < a[3] < slopes[1]
    # Also where a high score speaks against a hit, the order has to stay.
    a, _ = calibration.fit_sigmoid(
        logits, rng.random(len(hits)) < expit(-logits), labels, 3
    )
    assert (a > 0).all()


def test_a_softmax_gets_a_temperature_and_biases():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (20_000, 4))
    labels = rng.integers(0, 3, len(logits))
    biases = np.array([1.0, -1.0, 0.5, 0.0])
    true = softmax(0.5 * logits + biases, axis=1)[np.arange(len(logits)), labels]
    hits = rng.random(len(logits)) < true
    a, b = calibration.fit_softmax(logits, hits, labels)
    assert np.ptp(a) == 0 and b[3] == 0
    assert a[0] == pytest.approx(0.5, rel=0.06)
    np.testing.assert_allclose(b, biases, atol=0.15)


# What is changed


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('demo') / 'voc'
    make_demo_voc.generate(root, train=1, test=16, size=(128, 96))
    lists = root / 'ImageSets' / 'Main'
    names = (lists / 'test.txt').read_text().splitlines(keepends=True)
    (lists / 'val.txt').write_text(''.join(names[:12]))
    (lists / 'test.txt').write_text(''.join(names[12:]))
    return root


@pytest.fixture
def config(data, monkeypatch):
    """Loads a config, on the demo's data and small if it is not the demo's."""
    monkeypatch.setenv('RAMBO_DEMO_DATA', str(data))

    def load(path):
        cfg = classifier.load_config(path)
        if 'demo' not in str(path):
            cfg = shrink(cfg, data, 1, 1.0)
            cfg.test_dataloader = classifier.load_config(RAMBO).test_dataloader
        for part in (cfg.model.test_cfg, cfg.model.test_cfg.get('rcnn', {})):
            if 'nms' in part:
                part.update(max_per_img=5000, score_thr=0.0, nms_pre=10_000)
            elif 'max_per_img' in part:
                part.max_per_img = 50 * 6  # of all queries
        return calibrate.on_list(cfg, str(data / 'ImageSets/Main/val.txt'))

    return load


VOC = RAMBO.parents[1] / 'pascal_voc'


@pytest.mark.parametrize(
    'path',
    [
        RAMBO,
        VOC / 'retinanet_r50_fpn_rambo_1x_voc0712.py',
        VOC / 'cascade-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt.py',
        VOC / 'deformable-detr_r50_rambo_16xb2-50e_voc0712-cocofmt.py',
    ],
    ids=lambda path: path.name.split('_')[0],
)
def test_detectors_keep_their_order_and_get_the_fitted_scores(config, path):
    cfg = config(path)
    state = random_state(cfg)
    found = calibrate.calibrate(cfg, state, iou=0.1)  # where chance hits
    assert (found.scale > 0).all()
    assert {name: state[name].shape for name in found.state} == {
        name: value.shape for name, value in found.state.items()
    }
    before, after = map(scores_by_box, (found.before, found.after))
    both = sorted(before.keys() & after.keys())
    assert len(both) > 0.9 * len(before)
    labels = np.array([key[1] for key in both])
    old, new = (np.array([d[key] for key in both]) for d in (before, after))
    middle = (old > 1e-4) & (old < 1 - 1e-4)
    assert middle.sum() > 100
    logits = np.log(old[middle] / (1 - old[middle]))
    place = labels[middle]
    expected = expit(found.scale[place] * logits + found.shift[place])
    np.testing.assert_allclose(new[middle], expected, rtol=5e-3)
    for label in range(6):
        a, b = old[labels == label], new[labels == label]
        order = np.lexsort((b, a))  # in float32 many of the old ones are 1
        assert (np.diff(b[order]) >= -1e-4).all()
    # Fitted on these images, the probabilities have the right sum.
    scores, hits = calibration.counted(found.after)
    assert scores.sum() == pytest.approx(hits.sum(), rel=0.05)


def test_columns_with_a_softmax(config):
    cfg = config(CE)
    found = calibrate.calibrate(cfg, random_state(cfg), iou=0.1)
    assert found.shift[-1] == 0 and found.scale.shape == (7,)
    scores, hits = calibration.counted(found.after)
    assert scores.sum() == pytest.approx(hits.sum(), rel=0.1)
    assert calibration.d_ece(found.after) < calibration.d_ece(found.before)


def test_factors_beside_the_logit_are_refused(config):
    cfg = config(VOC / 'atss_r50_fpn_rambo_1x_voc0712-cocofmt.py')
    with pytest.raises(ValueError, match='ATSSHead: .* not the sigmoid of its logit'):
        calibrate.calibrate(cfg, random_state(cfg))


class Plain(nn.Module):
    """A head with a given last layer."""

    def __init__(self, layer, classes, name='fc_cls', columns=None):
        super().__init__()
        self.bbox_head = nn.Module()
        setattr(self.bbox_head, name, layer)
        self.bbox_head.num_classes = classes
        if columns:
            self.bbox_head.cls_out_channels = columns


def test_anchors_have_their_columns_one_after_the_other():
    layer = nn.Conv2d(4, 6, 1)
    features = torch.randn(2, 4, 5, 5)
    old = layer(features)
    head = classifier.find_classifier(Plain(layer, 3, 'retina_cls', 3))
    a, b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 5.0, 7.0])
    head.fold(a, b)
    for row in range(6):
        expected = a[row % 3] * old[:, row] + b[row % 3]
        torch.testing.assert_close(layer(features)[:, row], expected.float())


def two_stage(shared):
    layers = [nn.Linear(4, 2)] * 3 if shared else [nn.Linear(4, 2) for _ in range(3)]
    model = Plain(nn.ModuleList(layers), 2, 'cls_branches', 2)
    model.decoder = nn.Module()
    model.decoder.num_layers = 2
    return model


def test_the_branch_of_the_encoder_stays():
    names = [*classifier.find_classifier(two_stage(False)).layers]
    assert names == ['bbox_head.cls_branches.0', 'bbox_head.cls_branches.1']
    with pytest.raises(ValueError, match='encoder share the classifier'):
        classifier.find_classifier(two_stage(True))


def test_what_cannot_be_folded_is_refused():
    ones = np.ones(3)
    for layer, said in (
        (NormedLinear(4, 3), 'NormedLinear whose outputs are not linear'),
        (nn.Linear(4, 3, bias=False), 'got no bias'),
    ):
        with pytest.raises(ValueError, match=said):
            classifier.find_classifier(Plain(layer, 3)).fold(2 * ones, ones)
    with pytest.raises(ValueError, match='expected 7 columns, or 8'):
        classifier.find_classifier(Plain(nn.Linear(4, 3), 7))
    with pytest.raises(ValueError, match='no last layer'):
        classifier.find_classifier(Plain(nn.Linear(4, 3), 3, 'other'))
    cascade = Plain(nn.ModuleList(), 3)
    stages = [Plain(nn.Linear(4, 3), 3).bbox_head for _ in range(2)]
    cascade.bbox_head = nn.ModuleList(stages)
    assert len(classifier.find_classifier(cascade).layers) == 2
    cascade.bbox_head[0].reg_class_agnostic = False
    with pytest.raises(ValueError, match='moves boxes by the class'):
        classifier.find_classifier(cascade)


# The command


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('random') / 'random.pth'
    meta = dict(dataset_meta=dict(classes=make_demo_voc.CLASSES))
    state = random_state(classifier.load_config(RAMBO))
    torch.save(dict(meta=meta, state_dict=state), path)
    return str(path)


@pytest.fixture
def files(data, checkpoint, tmp_path, monkeypatch):
    """The arguments of the command."""
    monkeypatch.setenv('RAMBO_DEMO_DATA', str(data))
    out = str(tmp_path / 'new.pth')
    return [str(RAMBO), checkpoint, '--out', out, '--ann-file']


VAL = 'ImageSets/Main/val.txt'


def test_the_command_writes_a_checkpoint_that_any_tool_reads(files, tmp_path, capsys):
    pictures = ['--pictures', str(tmp_path / 'new'), '--per-class']
    calibrate.main([*files, VAL, '--iou', '0.1', *pictures])
    text = capsys.readouterr().out
    assert (tmp_path / 'new' / 'reliability.png').stat().st_size > 5000
    saved, old = (
        torch.load(path, weights_only=True) for path in (tmp_path / 'new.pth', files[1])
    )
    record = saved['meta']['calibration']
    assert text.splitlines()[-1] == f'show boxes from {record["threshold"]:.3f} up'
    assert record['images'] == 12 and record['ann_file'] == VAL
    assert 'few objects' in text and '| star |' in text
    changed = {
        name
        for name, value in saved['state_dict'].items()
        if not torch.equal(value, old['state_dict'][name])
    }
    name = 'roi_head.bbox_head.fc_cls.'
    assert changed == {f'{name}weight', f'{name}bias'}


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['ImageSets/Main/test.txt'], 'tests on 4 of its images.*--allow-test-list'),
        (['none.txt'], 'none.txt'),
        ([VAL, '--indices', '1', '--iou', '0.99'], '0 detections are hits'),
        ([VAL, '--cfg-options', 'model.rpn_head.feat_channels=8'], 'not one of this'),
        (
            [
                VAL,
                '--cfg-options',
                "test_dataloader.dataset.metainfo.classes=('a','b')",
            ],
            'trained with the classes disc, .* tests a, b',
        ),
    ],
)
def test_what_is_wrong_is_said(files, arguments, said, capsys):
    with pytest.raises(SystemExit):
        calibrate.main([*files, *arguments])
    assert re.search(said, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        calibrate.main([files[0], files[1], '--out', files[1], '--ann-file', VAL])
    assert 'is CHECKPOINT; name another file' in capsys.readouterr().err
