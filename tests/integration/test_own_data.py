"""A beginner's first training: configs for own data, and errors that help."""

import urllib.error

import pytest

pytest.importorskip('mmdet', reason='configs are those of mmdet')
from mmdet.datasets import CocoDataset, XMLDataset
from mmdet.models import MobileNetV2, ResNet
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import RUNNERS

from rambo_det import explanations
from rambo_det.own_data import follow_own_data
from tests import ROOT
from tools.analysis_tools import plot_results
from tools.dataset_tools import to_voc
from tools.dataset_tools.make_demo_voc import CLASSES, generate, write_coco

CONFIGS = sorted((ROOT / 'configs/own_data').glob('*.py'))
NAMES = ('cat', 'red cell', 'dog')
register_all_modules()


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp('demo') / 'data'
    generate(root, train=6, test=2)
    write_coco(root)
    return root


def values(cfg):
    """What the parts of a config have."""
    loaders = [cfg[f'{name}_dataloader'] for name in ('train', 'val', 'test')]
    return dict(
        roots=[loader.dataset.data_root for loader in loaders],
        classes=[tuple(loader.dataset.metainfo.classes) for loader in loaders],
        scales=[
            tuple(step.scale)
            for loader in loaders
            for step in loader.dataset.pipeline
            if step.type == 'Resize'
        ],
        heads=(cfg.model.get('roi_head') or cfg.model).bbox_head.num_classes,
    )


SET = dict(
    roots=['/mine/'] * 3, classes=[NAMES] * 3, scales=[(64, 96)] * 3, heads=len(NAMES)
)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem[:12])
def test_what_is_set_at_the_top_is_used_everywhere(path, tmp_path):
    as_options = Config.fromfile(path)
    as_options.merge_from_dict(
        dict(data_root='/mine/', classes=NAMES, image_scale=(64, 96))
    )
    child = tmp_path / 'child.py'
    child.write_text(
        f"_base_ = {str(path)!r}\ndata_root = '/mine/'\nclasses = {NAMES}\n"
        'image_scale = (64, 96)\n'
    )
    for cfg in (as_options, Config.fromfile(child)):
        assert values(cfg) != SET
        cfg = follow_own_data(cfg)
        assert values(cfg) == SET
        # The config of a work directory can be changed in the same way.
        dumped = Config.fromstring(cfg.pretty_text, '.py')
        assert values(follow_own_data(dumped)) == SET
        dumped.merge_from_dict(dict(classes=['cow'], data_root='/other/'))
        again = values(follow_own_data(dumped))
        assert again['heads'] == 1 and again['roots'] == ['/other/'] * 3


def test_what_is_set_in_its_place_stays():
    cfg = Config.fromfile(CONFIGS[0])
    options = {
        'classes': ['cat'],
        'data_root': '~/mine/',
        'train_dataloader.dataset.data_root': '/other/',
        'val_dataloader.dataset.pipeline.1.scale': (32, 32),
    }
    cfg.merge_from_dict(options)
    found = values(follow_own_data(cfg))
    assert found['roots'][0] == '/other/' and found['roots'][1].startswith('/')
    assert found['scales'][1] == (32, 32) != found['scales'][0]
    other = Config.fromfile(ROOT / 'configs/demo/faster-rcnn_tiny_fpn_rambo_demo.py')
    assert follow_own_data(other).to_dict() == other.to_dict()


@pytest.mark.parametrize('classes', ['cat', [], ['cat', 'cat']])
def test_classes_that_are_no_names_are_refused(classes):
    cfg = Config.fromfile(CONFIGS[0])
    cfg.classes = classes
    comma = isinstance(classes, str)
    words = r"needs a comma: classes=\('cat',\)" if comma else 'distinct names'
    with pytest.raises(ValueError, match=words):
        follow_own_data(cfg)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem[:12])
def test_it_trains_on_what_to_voc_wrote(path, demo, tmp_path, capsys):
    out = tmp_path / 'own'
    sources = [str(demo / 'JPEGImages'), str(demo / 'Annotations')]
    to_voc.main([*sources, '--out', str(out), '--classes', *CLASSES, '--jobs', '1'])
    child = tmp_path / 'mine.py'
    child.write_text(
        f'_base_ = {str(path)!r}\ndata_root = {str(out)!r}\nclasses = {CLASSES}\n'
    )
    cfg = Config.fromfile(child)
    options = {
        'image_scale': (96, 96),
        'model.backbone.init_cfg': None,
        'train_cfg.max_epochs': 1,
        'train_dataloader.batch_size': 2,
        'work_dir': str(tmp_path / 'work'),
        'default_hooks.logger.interval': 1,
        'log_level': 'WARNING',
        'experiment_name': f'own-{path.stem}',
    }
    for name in ('train', 'val', 'test'):
        options[f'{name}_dataloader.num_workers'] = 0
        options[f'{name}_dataloader.persistent_workers'] = False
    cfg.merge_from_dict(options)
    runner = RUNNERS.build(cfg)
    metrics = runner.train() and runner.val_loop.run()
    assert runner.iter == 2 and 'pascal_voc/AP50' in metrics
    # The schedule ends with the training, whatever max_epochs is.
    assert [scheduler.T_max for scheduler in runner.param_schedulers[1:]] == [2]
    kept = Config.fromfile(tmp_path / 'work/mine.py')
    assert values(kept)['heads'] == len(CLASSES)
    # Tools read the three lines as the runner does.
    import mmengine

    empty = dict(bboxes=[], labels=[], scores=[])
    names = (out / 'ImageSets/Main/test.txt').read_text().split()
    found = [dict(img_id=name, pred_instances=empty) for name in names]
    mmengine.dump(found, tmp_path / 'found.pkl')
    assert plot_results.load_run(child, tmp_path / 'found.pkl').classes == CLASSES


def data_set(demo, classes=CLASSES, kind='XMLDataset', **options):
    coco = kind == 'CocoDataset'
    files = dict(
        ann_file='coco/trainval.json' if coco else 'ImageSets/Main/trainval.txt',
        data_prefix=dict(img='') if coco else dict(sub_data_root=''),
        filter_cfg=dict(filter_empty_gt=True),
    )
    settings = dict(
        type=kind, data_root=str(demo), metainfo=dict(classes=classes), **files
    )
    return DATASETS.build(dict(settings, **options))


KINDS = ('XMLDataset', 'VOCDataset', 'CocoDataset')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('empty', [True, False])
def test_misspelt_classes_are_told_with_those_there_are(kind, empty, demo):
    options = {} if empty else dict(filter_cfg=None)
    with pytest.raises(ValueError, match='none of 6 images is left') as caught:
        data_set(demo, ('Disc', 'squares'), kind, **options)
    text = str(caught.value)
    assert (
        "configured: 'Disc' (is 'disc' meant?), 'squares' (is 'square' meant?)" in text
    )
    assert "annotated:  'disc' (" in text and "'triangle' (" in text


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('test_mode', [True, False])
def test_one_misspelt_class_is_a_warning(kind, test_mode, demo, monkeypatch):
    told = []
    monkeypatch.setattr(explanations, 'print_log', lambda text, **_: told.append(text))
    data_set(demo, ('disc', 'sqare'), kind, test_mode=test_mode)
    (text,) = told
    assert "class 'sqare'" in text and "'sqare' (is 'square' meant?)" in text
    data_set(demo, ('disc', 'square'), kind, test_mode=test_mode)
    assert len(told) == 1


@pytest.mark.parametrize('kind', KINDS)
def test_a_string_of_classes_names_the_comma(kind, demo):
    with pytest.raises(ValueError, match=r"needs a comma: classes=\('disc',\)"):
        data_set(demo, 'disc', kind)


@pytest.mark.parametrize(
    'options, lines, error, words',
    [
        (dict(filter_cfg=dict(min_size=999)), None, ValueError, 'min_size.* drops all'),
        ({}, '', ValueError, 'own.txt names no image'),
        ({}, '000001\n\n', FileNotFoundError, r'no .*Annotations/\.xml.*check_voc\.py'),
        (dict(ann_file='gone.txt'), None, FileNotFoundError, 'no .*gone.txt. Expected'),
    ],
)
def test_missing_files_are_told(options, lines, error, words, demo):
    if lines is not None:
        (demo / 'own.txt').write_text(lines)
        options = dict(ann_file='own.txt')
    with pytest.raises(error, match=words):
        data_set(demo, **options)


def test_images_without_any_annotation_are_no_error(demo, tmp_path):
    """As unlabelled images are given to a semi-supervised detector."""
    content = '{"images": [{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}], '
    (tmp_path / 'a.json').write_text(
        content + '"annotations": [], "categories": [{"id": 1, "name": "disc"}]}'
    )
    settings = dict(ann_file=str(tmp_path / 'a.json'), filter_cfg=None)
    assert len(data_set(demo, ('disc',), 'CocoDataset', **settings)) == 1


def _types(part):
    if isinstance(part, dict):
        inner = [part.get('dataset'), *part.get('datasets', [])]
        if any(inner):
            for child in filter(None, inner):
                yield from _types(child)
        else:
            yield part['type']


@pytest.mark.parametrize('folder', ['bccd', 'voc_subset', 'pascal_voc', 'demo', 'coco'])
def test_every_shipped_config_has_data_whose_errors_are_explained(folder):
    for path in (ROOT / 'configs' / folder).glob('*.py'):
        cfg = Config.fromfile(path, import_custom_modules=False)
        kinds = [*_types(cfg.train_dataloader.dataset)]
        assert kinds and all(
            issubclass(DATASETS.get(kind), (XMLDataset, CocoDataset)) for kind in kinds
        )
    for owner in (XMLDataset, CocoDataset):
        assert owner.filter_data.__wrapped__ and owner.load_data_list.__wrapped__


@pytest.mark.parametrize(
    'module, variable, address',
    [
        (MobileNetV2, 'RAMBO_MOBILENETV2', 'mobilenet_v2_batch256_imagenet-ff34753d'),
        (ResNet, 'RAMBO_RESNET50', 'resnet50-0676ba61'),
    ],
)
@pytest.mark.parametrize('given', [True, False])
def test_missing_weights_tell_of_the_network_and_of_the_variable(
    module, variable, address, given, monkeypatch, tmp_path
):
    def offline(*_, **__):
        raise urllib.error.URLError('Name or service not known')

    monkeypatch.setattr('mmengine.runner.checkpoint.load_url', offline)
    monkeypatch.delenv(variable, raising=False)
    if given:
        monkeypatch.setenv(variable, str(tmp_path / 'gone.pth'))
    mobile = module is MobileNetV2
    path = next(p for p in CONFIGS if ('mobilenet' in p.name) == mobile)
    backbone = Config.fromfile(path).model.backbone
    backbone.pop('type')
    with pytest.raises(FileNotFoundError) as caught:
        module(**backbone).init_weights()
    text = str(caught.value)
    assert ("gone.pth' to load" if given else 'service not known') in text
    assert f'{variable}=FILE' in text and f'{address}.pth' in text
    assert 'init_cfg.checkpoint=FILE' in text


def test_weights_without_a_variable_name_none(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        ResNet(
            18, init_cfg=dict(type='Pretrained', checkpoint='gone.pth')
        ).init_weights()
    assert 'RAMBO' not in str(caught.value) and 'checkpoint=FILE' in str(caught.value)
