"""Every shipped config builds, and differs from its baseline where it should."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='configs are those of mmdet')
from mmdet.models.reid import linear_reid_head
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from rambo_det import RaMBOLoss
from tests import ROOT
from tools.common.mmdet_script import find_mmdet_script

FOLDER = ROOT / 'configs'
CONFIGS = sorted(
    str(path.relative_to(FOLDER))
    for path in FOLDER.glob('*/*.py')
    if not path.parent.name.startswith('_')
)
FASTER = [name for name in CONFIGS if Path(name).name.startswith('faster-rcnn')]
REID = [name for name in CONFIGS if name.startswith('reid')]
OTHERS = [name for name in CONFIGS if name not in FASTER + REID]
HEAD = 'model.roi_head.bbox_head'
LOSS = {f'{HEAD}.loss_cls', f'{HEAD}.type', 'custom_imports'}
BOX = {f'{HEAD}.box_avg', f'{HEAD}.loss_bbox.loss_weight'}
SAMPLER = 'model.train_cfg.rcnn.sampler.num'
IGNORE = {
    f'model.train_cfg.{stage}.assigner.ignore_iof_thr' for stage in ('rpn', 'rcnn')
}
RECIPE = LOSS | BOX | {SAMPLER}
NO_TWINS = ('pascal_voc', 'own_data')  # mmdet has those of cross-entropy
register_all_modules()


def require_mmpretrain():
    if linear_reid_head.mmpretrain is None:
        pytest.skip('mmdet has models of ReID only with mmpretrain')


def load(name):
    return Config.fromfile(FOLDER / name)


@pytest.fixture(scope='module')
def outside(tmp_path_factory):
    """What another folder's process builds of each config, with mmdet's train.py.

    Nothing there has imported our tools.
    """
    folder = tmp_path_factory.mktemp('elsewhere')
    script = ROOT / 'tests' / 'helpers' / 'load_configs.py'
    path = os.pathsep.join([str(ROOT), *os.environ.get('PYTHONPATH', '').split(':')])
    arguments = [find_mmdet_script('train'), 'out.json', *(FOLDER / n for n in CONFIGS)]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', str(script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / 'out.json').read_text(encoding='utf-8'))


@pytest.mark.parametrize('name', CONFIGS)
def test_mmdets_own_script_loads_and_builds_it(name, outside):
    if name in REID:
        require_mmpretrain()
    found = outside['found'][str(FOLDER / name)]
    assert 'error' not in found, found['error']
    # Building it ran the hook's check of the data's classes against the heads.
    assert found['hooks'].count('NumClassCheckHook') == 1
    checked = name.startswith(('pascal_voc', 'coco', 'own_data'))
    assert found['hooks'].count('InvalidLossHook') == checked
    assert not outside['used_tools']


@pytest.mark.parametrize('name', CONFIGS)
def test_it_imports_what_it_uses(name, outside):
    """The configs that were loaded before it must not have done it for it."""
    if name in REID:
        require_mmpretrain()
    found = outside['found'][str(FOLDER / name)]
    used = [module for module in found['modules'] if module.startswith('rambo_det')]
    asked = set(found['imports'])
    assert asked or not used


def differences(a, b, path=''):
    """Paths at which two configs differ; the loss and data sets count as one.

    mmengine notes in ``_scope_`` which package a part of a config was written in.
    """
    a, b = (c.to_dict() if isinstance(c, Config) else c for c in (a, b))
    whole = path.endswith('loss_cls') or path == 'train_dataloader.dataset'
    if isinstance(a, dict) and isinstance(b, dict) and not whole:
        found = set()
        for key in (set(a) | set(b)) - {'_scope_'}:
            child = f'{path}.{key}' if path else key
            if key in a and key in b:
                found |= differences(a[key], b[key], child)
            else:
                found.add(child)
        return found
    return set() if a == b else {path}


def build(name):
    cfg = load(name)
    cfg.model.backbone.init_cfg = None  # weights are not needed, and not there
    return MODELS.build(cfg.model)


@pytest.mark.parametrize('name', FASTER)
def test_model_builds(name):
    model = build(name)
    head = model.roi_head.bbox_head
    rambo = 'rambo' in Path(name).stem
    assert isinstance(head.loss_cls, RaMBOLoss) == rambo
    has_background = head.loss_cls.has_background if rambo else '_ce' in name
    assert head.fc_cls.out_features == head.num_classes + has_background


@pytest.mark.parametrize('name', OTHERS)
def test_other_detectors_build_with_bound_heads(name):
    heads = [
        module
        for module in build(name).modules()
        if isinstance(getattr(module, 'loss_cls', None), RaMBOLoss)
    ]
    assert heads
    for head in heads:
        assert type(head).__name__.startswith('RaMBO')
        assert head.num_classes == dict(coco=80, own_data=2).get(name.split('/')[0], 20)


def baseline(name='pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py'):
    return Config.fromstring(f'_base_ = {"mmdet::" + name!r}', '.py')


def parts(value, path=''):
    """Yield the path of every leaf; lists count as dictionaries of their places."""
    if isinstance(value, (dict, list)) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in pairs:
            yield from parts(child, f'{path}.{key}' if path else str(key))
    else:
        yield path, value


# What RaMBO and VOC's data may change of a config for COCO.
CHANGED = re.compile(
    r'(^custom_imports|^custom_hooks|^voc_|^training_checks|_scope_$'
    r'|^default_hooks\.(invalid_loss|num_class_check)'
    r'|\.loss_cls\.|\.num_classes$|\.score_thr$|\.ignore_iof_thr$'
    r'|(bbox|rpn)_head(\.\d)?\.type$'
    r'|_dataloader\.dataset\.(data_root|ann_file|data_prefix\.img|metainfo\.)'
    r'|_evaluator\.ann_file$)'
)
BASELINES = dict(
    detr='detr/detr_r50_8xb2-150e_coco.py',
    dino='dino/dino-4scale_r50_8xb2-12e_coco.py',
    fcos='fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    rtmdet='rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    retinanet='pascal_voc/retinanet_r50_fpn_1x_voc0712.py',
    cascade='cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    sparse='sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    mask='mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
)


@pytest.mark.parametrize('detector', BASELINES)
def test_other_detectors_change_the_loss_and_the_data_alone(detector):
    (name,) = (
        n
        for n in OTHERS
        if re.match(f'{detector}[-_]', Path(n).name) and not n.startswith('own_data')
    )
    theirs = dict(parts(baseline(BASELINES[detector]).to_dict()))
    ours = dict(parts(load(name).to_dict()))
    differ = {
        path
        for path in {*theirs, *ours}
        if repr(theirs.get(path, 'missing')) != repr(ours.get(path, 'missing'))
        and not CHANGED.search(path)
    }
    # DETR's softmax with "no object" is also in its matching cost.
    costs = 'model.train_cfg.assigner.match_costs.0.'
    assert {path for path in differ if not path.startswith(costs)} == set()
    assert (differ == set()) == (detector != 'detr')
    assert any(path.endswith('loss_cls.type') for path in ours)


R101 = {'model.backbone.depth', 'model.backbone.init_cfg.checkpoint'}
X101 = R101 | {
    'model.backbone.type',
    'model.backbone.groups',
    'model.backbone.base_width',
}
VOC07 = {'train_dataloader.dataset'}
CHECKS = {
    'default_hooks.invalid_loss',
    'default_hooks.num_class_check',
    'training_checks',
}
THRESHOLD = 'model.test_cfg.rcnn.score_thr'
RPN = {'model.rpn_head.type', 'model.rpn_head.loss_cls'}
PAPERS = 'faster-rcnn_r50_fpn_rambo-paper_1x_voc07.py'
PAPER = {
    'train_dataloader.batch_size',
    'optim_wrapper.optimizer.lr',
    'optim_wrapper.clip_grad',
    'param_scheduler',
    'paper_loss',
    'paper_batch_size',
    'paper_optim_wrapper',
    'paper_warmup',
}


@pytest.mark.parametrize(
    'name, extra',
    [
        ('faster-rcnn_r50_fpn_rambo_1x_voc0712.py', set()),
        ('faster-rcnn_r101_fpn_rambo_1x_voc0712.py', R101),
        ('faster-rcnn_x101-32x4d_fpn_rambo_1x_voc0712.py', X101),
        ('faster-rcnn_r50_fpn_rambo_1x_voc07.py', VOC07),
        ('faster-rcnn_r50_fpn_rambo-image_1x_voc07.py', VOC07),
        ('faster-rcnn_r50_fpn_rambo-rpn_1x_voc0712.py', RPN),
        ('faster-rcnn_r50_fpn_4conv1fc-rambo_1x_voc0712.py', set()),
    ],
)
def test_only_the_intended_keys_differ_from_the_baseline_of_mmdet(name, extra):
    found = differences(baseline(), load(f'pascal_voc/{name}'))
    assert found == RECIPE | IGNORE | CHECKS | {THRESHOLD} | extra


def test_the_papers_settings_keep_the_sample_and_the_box_loss_of_mmdet():
    found = differences(baseline(), load(f'pascal_voc/{PAPERS}'))
    assert found - {f'{HEAD}.box_avg'} == LOSS | CHECKS | {THRESHOLD} | VOC07 | PAPER


def test_every_pascal_voc_config_is_compared_above():
    test = test_only_the_intended_keys_differ_from_the_baseline_of_mmdet
    compared = {name for name, _ in test.pytestmark[0].args[1]}
    assert {f'pascal_voc/{name}' for name in {*compared, PAPERS}} == {
        name
        for name in FASTER
        if name.startswith('pascal_voc') and not name.endswith('-cocofmt.py')
    }


def test_coco_format_differs_from_that_of_mmdet_in_the_recipe_alone():
    name = 'pascal_voc/faster-rcnn_r50_fpn_{}1x_voc0712-cocofmt.py'
    found = differences(baseline(name.format('')), load(name.format('rambo_')))
    assert found == RECIPE | CHECKS | {THRESHOLD}


def test_voc07_is_the_first_half_of_the_baseline():
    ours = load('pascal_voc/faster-rcnn_r50_fpn_rambo_1x_voc07.py').train_dataloader
    theirs = baseline().train_dataloader
    assert ours.dataset.type == 'RepeatDataset' and ours.dataset.times == 3
    first = theirs.dataset.dataset.datasets[0]
    found = differences(dict(ours.dataset.dataset), dict(first))
    assert found == {'pipeline'}  # differs in the notes of its scope alone
    for a, b in zip(ours.dataset.dataset.pipeline, first.pipeline):
        assert differences(dict(a), dict(b)) == set()


@pytest.mark.parametrize(
    'rambo',
    [n for n in FASTER if '_rambo_' in n and n.split('/')[0] not in NO_TWINS],
)
def test_twins_differ_in_the_loss_alone(rambo):
    found = differences(load(rambo.replace('_rambo_', '_ce_')), load(rambo))
    assert found <= LOSS


FINETUNE = [n for n in CONFIGS if '_rambo-finetune_' in n]


@pytest.mark.parametrize('name', FINETUNE)
def test_fine_tuning_starts_from_a_checkpoint_as_its_twin_does(name, monkeypatch):
    monkeypatch.setenv('RAMBO_START', '/elsewhere/start.pth')
    ours, twin = load(name), load(name.replace('_rambo-', '_ce-'))
    assert differences(twin, ours) <= LOSS
    assert ours.load_from == twin.load_from == '/elsewhere/start.pth'
    (base,) = (n for n in FASTER if n.startswith(name.split('-finetune')[0] + '_'))
    changed = {'load_from', 'param_scheduler', 'optim_wrapper.optimizer.lr'}
    found = differences(load(base), ours) - {'train_cfg.val_interval'}
    found = {path for path in found if not path.startswith('finetune_')}
    assert found == changed | {'train_cfg.max_epochs'}
    assert ours.param_scheduler[-1].end == ours.train_cfg.max_epochs == 4


@pytest.mark.parametrize('name', [n for n in CONFIGS if '_rambo-before_' in n])
def test_the_default_before_differs_in_the_sample_and_the_box_loss(name):
    found = differences(load(name.replace('_rambo-before_', '_rambo_')), load(name))
    assert found == BOX | {SAMPLER}


@pytest.mark.parametrize('name', [n for n in FASTER if '_rambo_' in n])
def test_every_proposal_is_ranked_and_the_box_loss_keeps_its_strength(name):
    cfg = load(name)
    rcnn, proposals = cfg.model.train_cfg.rcnn, cfg.model.train_cfg.rpn_proposal
    assert rcnn.sampler.num > proposals.max_per_img
    assert cfg.model.roi_head.bbox_head.box_avg == 'positives'


@pytest.mark.parametrize('name', [n for n in CONFIGS if 'rambo-image' in n])
def test_the_image_variant_changes_the_spans_alone(name):
    changed = load(name).model.roi_head.bbox_head.loss_cls
    default = load(name.replace('rambo-image', 'rambo'))
    assert differences(default, load(name)) == {f'{HEAD}.loss_cls'}
    spans = dict(class_ap=dict(span='image'), pooled_ap=dict(span='image'))
    assert changed == dict(default.model.roi_head.bbox_head.loss_cls, **spans)


@pytest.mark.parametrize('name', [n for n in FASTER if '_rambo_' in n])
def test_the_recipe_is_what_the_loss_does_by_default(name):
    loss_cls = load(name).model.roi_head.bbox_head.loss_cls
    assert loss_cls == dict(type='RaMBOLoss')


@pytest.mark.parametrize(
    'name', [n for n in CONFIGS if n.startswith(('bccd', 'voc_subset'))]
)
def test_roots_and_weights_come_from_the_environment(name, monkeypatch):
    names = ('RAMBO_BCCD', 'RAMBO_VOC_SUBSET', 'RAMBO_MOBILENETV2')
    for variable in names:
        monkeypatch.delenv(variable, raising=False)
    plain = load(name)
    assert plain.train_dataloader.dataset.data_root.startswith('data/')
    assert plain.model.backbone.init_cfg.checkpoint == 'open-mmlab://mmdet/mobilenet_v2'
    for variable in names:
        monkeypatch.setenv(variable, f'/elsewhere/{variable}/')
    cfg = load(name)
    root = '/elsewhere/RAMBO_' + ('BCCD/' if name.startswith('bccd') else 'VOC_SUBSET/')
    assert cfg.train_dataloader.dataset.data_root == root
    assert cfg.test_dataloader.dataset.data_root == root
    checkpoint = cfg.model.backbone.init_cfg.checkpoint
    assert checkpoint == '/elsewhere/RAMBO_MOBILENETV2/'
    assert 'bbox_min_size' not in cfg.pretty_text


def test_omniglot_configs_differ_in_the_loss_and_its_rate_alone():
    names = [name for name in REID if name.endswith('omniglot.py')]
    for name in names:
        found = differences(load(names[0]), load(name))
        loss = {f'model.head.{key}' for key in ('type', 'loss_cls', 'num_classes')}
        assert {path.split('.loss_triplet')[0] for path in found} <= {
            *loss,
            'model.head',
            'model.head.loss_triplet',
            'optim_wrapper.optimizer.lr',
        }
    assert len(names) == 5


def test_market1501_changes_head_and_data_of_mmdets_baseline_alone():
    name = 'reid/reid_r50_8xb32-6e_mot17train80_test-mot17val20.py'
    found = differences(baseline(name), load('reid/reid_r50_rambo_market1501.py'))
    assert found == {
        *('custom_imports', 'default_hooks.num_class_check', 'data_root'),
        *(f'model.head.{key}' for key in ('type', 'num_classes')),
        *(
            f'model.head.loss_triplet.{key}'
            for key in ('type', 'margin', 'loss_weight')
        ),
        'train_dataloader.dataset',
        *(
            f'{split}_dataloader.dataset.{key}'
            for split in ('val', 'test')
            for key in ('data_root', 'ann_file', 'data_prefix.img_path')
        ),
    }
