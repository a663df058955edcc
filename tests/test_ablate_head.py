"""The box head on cached RoIs learns and is judged as inside the whole detector."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_configs import CE, RAMBO

pytest.importorskip('mmdet', reason='needs mmdet')

import ablate_head
import ablate_report
import head_training
import make_demo_voc
import roi_cache
from mmdet.registry import MODELS
from mmdet.structures.bbox import get_box_tensor
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.hooks import ParamSchedulerHook
from mmengine.logging import MMLogger

TRAIN, VAL = 6, 3
LOSS = dict(type='RaMBOLoss', lambd=10.0, margin_noise=False)
SCHEDULE = dict(param='lambd', start=8.0, curve='exponential')


@pytest.fixture(autouse=True, scope='module')
def quiet():
    """What mmengine logs goes to the logger that was made last."""
    if not MMLogger.check_instance_created('ablate_head'):
        MMLogger.get_instance('ablate_head', log_level='WARNING')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A folder with data, a checkpoint with random weights and a cache of both."""
    root = tmp_path_factory.mktemp('ablate')
    make_demo_voc.generate(root / 'voc', train=TRAIN + VAL, test=1, size=(128, 96))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('RAMBO_DEMO_DATA', str(root / 'voc'))
        register_all_modules()
        cfg = Config.fromfile(CE)
        torch.manual_seed(0)
        model = MODELS.build(copy.deepcopy(cfg.model))
        model.init_weights()
        # So that proposals of several places win, and detections of several classes.
        torch.nn.init.normal_(model.rpn_head.rpn_cls.weight, std=1.0)
        torch.nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=1.0)
        torch.save(dict(state_dict=model.state_dict()), root / 'epoch_1.pth')
        open_cache(root, cfg)
    return root


def open_cache(root, cfg, **changes):
    arguments = dict(val_images=VAL, samples=2, **changes)
    return roi_cache.open_cache(root / 'cache', cfg, root / 'epoch_1.pth', **arguments)


@pytest.fixture
def cfg(root, monkeypatch):
    monkeypatch.setenv('RAMBO_DEMO_DATA', str(root / 'voc'))
    return Config.fromfile(CE)


@pytest.fixture
def cache(root, cfg):
    return open_cache(root, cfg)


def main(root, *arguments, out='out.json'):
    return ablate_head.main(
        [
            str(CE),
            str(root / 'epoch_1.pth'),
            *('--cache', str(root / 'cache'), '--out', str(root / out)),
            *('--val-images', str(VAL)),
            *arguments,
        ]
    )


def whole_detector(root, cfg, loss=None):
    """The detector with the checkpoint's weights and, if given, another loss."""
    model = roi_cache.frozen_detector(cfg, root / 'epoch_1.pth')
    setting = {} if loss is None else dict(loss_cls=loss)
    definition = ablate_head.resolve(cfg, 'test', setting)
    torch.manual_seed(1)
    head = head_training.build_head(definition['bbox_head'])
    torch.nn.init.normal_(head.fc_cls.weight, std=0.5)
    torch.nn.init.normal_(head.fc_reg.weight, std=0.05)
    model.roi_head.bbox_head = head
    return model, head, definition


@pytest.mark.parametrize(
    ('loss', 'rounded'),
    [(None, False), (None, True), (dict(LOSS, memory=0), True)],
)
def test_losses_and_gradients_are_those_of_the_whole_detector(
    root, cfg, loss, rounded, tmp_path, monkeypatch
):
    """Two images, the same proposals and the same sampled RoIs.

    A ranking may change where float16 swaps two scores, so for it the features inside
    the detector are rounded too.
    """
    model, head, definition = whole_detector(root, cfg, loss)
    train, kept, *_ = roi_cache.split(cfg, VAL)
    items = [train[index] for index in kept[:2]]
    drawn, sample = [], model.roi_head.bbox_sampler.sample

    def remember(*args, **kw):
        drawn.append(sample(*args, **kw))
        return drawn[-1]

    monkeypatch.setattr(model.roi_head.bbox_sampler, 'sample', remember)
    rois = [roi_cache.training_rois(model, item) for item in items]
    roi_cache.write_table(tmp_path / 'table', rois)
    table = roi_cache.RoiTable(tmp_path / 'table')
    images = [table[0], table[1]]
    assert images[0].features.dtype == torch.float16
    found = head_training.head_losses(head, images, definition['train_cfg'])
    head_training.total(found).backward()
    gradients = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()

    replay = iter(drawn)
    monkeypatch.setattr(
        model.roi_head.bbox_sampler, 'sample', lambda *args, **kw: next(replay)
    )
    if rounded:
        extract = model.roi_head.bbox_roi_extractor.forward
        monkeypatch.setattr(
            model.roi_head.bbox_roi_extractor,
            'forward',
            lambda *args, **kw: extract(*args, **kw).half().float(),
        )
    data = model.data_preprocessor(pseudo_collate(items), training=True)
    x = model.extract_feat(data['inputs'])
    samples = data['data_samples']
    proposals = model.rpn_head.predict(x, samples, rescale=False)
    expected = model.roi_head.loss(x, proposals, samples)
    head_training.total(expected).backward()

    assert sum(len(image.object_labels) for image in images) >= 2
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value, cached = value.item(), found[name].item()
        assert value > 0
        assert cached == pytest.approx(value, rel=1e-4 if rounded else 2e-3), name
    for name, parameter in head.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert scale > 0
        difference = float((gradients[name] - parameter.grad).norm())
        tolerance = 1e-3 if rounded else 0.01
        assert difference < tolerance * float(parameter.grad.norm()), name


def test_logits_are_those_of_the_whole_detector(root, cfg, cache):
    model, head, _ = whole_detector(root, cfg)
    _, _, val, held = roi_cache.split(cfg, VAL)
    image = cache.val[0]
    data = model.data_preprocessor(pseudo_collate([val[held[0]]]), training=False)
    x = model.extract_feat(data['inputs'])
    proposals = model.rpn_head.predict(x, data['data_samples'], rescale=False)
    assert torch.allclose(get_box_tensor(proposals[0].bboxes), image.boxes)
    expected, _ = model.roi_head.forward(x, proposals, data['data_samples'])
    found, _ = head(image.features.float())
    assert expected.std() > 0.1
    assert torch.allclose(found, expected, atol=0.01 * expected.std().item())


@pytest.mark.parametrize('loss', [None, LOSS])
def test_detections_are_those_of_the_whole_detector(root, cfg, cache, loss):
    model, head, definition = whole_detector(root, cfg, loss)
    head.eval()
    _, _, val, held = roi_cache.split(cfg, VAL)
    images = [cache.val[index] for index in range(VAL)]
    results = head_training.detect(head, images, definition['test_cfg'])
    for index, found, image in zip(held, results, images):
        data = pseudo_collate([val[index]])
        with torch.no_grad():
            (sample,) = model.test_step(data)
        assert sample.img_path == image.meta['img_path']
        expected = sample.pred_instances
        assert len(expected) > 5
        # NMS may swap detections of nearly the same score: compare them sorted.
        assert abs(len(found) - len(expected)) <= 0.02 * len(expected)
        count = min(len(found), len(expected), 30)
        scores = [r.scores.sort(descending=True)[0][:count] for r in (found, expected)]
        assert torch.allclose(*scores, atol=2e-3)
        # Nearly all have their twin.
        away = torch.cdist(found.bboxes, expected.bboxes, p=1)
        away += 1e6 * (found.labels[:, None] != expected.labels)
        assert (away.min(1)[0] < 0.5).float().mean() > 0.95
        truth = sample.gt_instances
        assert torch.equal(
            image.object_boxes[~image.object_ignored], get_box_tensor(truth.bboxes)
        )
        assert torch.equal(image.object_labels[~image.object_ignored], truth.labels)


def test_evaluation_of_perfect_detections(cache):
    """Each object is found by the first of its proposals that is put on it."""

    class Perfect(torch.nn.Linear):
        """Says what is true instead of what a head would."""

        def predict_by_feat(self, batch_img_metas, **kw):
            results = []
            for meta in batch_img_metas:
                (image,) = (i for i in cache.val if i.meta == meta)
                count = len(image.object_labels)
                results.append(
                    ConfigDict(
                        bboxes=image.object_boxes + self.bias,
                        labels=image.object_labels,
                        scores=torch.ones(count),
                    )
                )
            return results

        def forward(self, features):
            return features.flatten(1)[:, :7], features.flatten(1)[:, :4]

    head = Perfect(4, 4)
    torch.nn.init.zeros_(head.bias)
    ap50, per_class = head_training.evaluate(head, cache.val, cache.classes, {}, True)
    present = {int(v) for image in cache.val for v in image.object_labels}
    assert ap50 == pytest.approx(100)
    assert [value for c, value in enumerate(per_class) if c in present] == [
        pytest.approx(100)
    ] * len(present)
    torch.nn.init.constant_(head.bias, 50.0)
    ap50, _ = head_training.evaluate(head, cache.val, cache.classes, {})
    assert ap50 < 100


def test_held_out_images_are_not_trained_on(root, cache):
    names = (root / 'voc/ImageSets/Main/trainval.txt').read_text().split()
    found = [
        [Path(meta['img_path']).stem for meta in table.metas]
        for table in (*cache.train, cache.val)
    ]
    assert found == [names[:TRAIN], names[:TRAIN], names[TRAIN:]]


def test_passes_differ_in_their_rois(cache):
    first, second = ([image.boxes for image in table] for table in cache.train)
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second)
    )


def test_an_unfinished_table_is_made_again_and_alike(root, cfg, cache):
    before = [image.boxes for image in cache.train[1]]
    features = np.array(cache.train[1].features)
    (root / 'cache' / 'train1' / 'table.json').unlink()
    again = open_cache(root, cfg).train[1]
    assert all(torch.equal(a, b.boxes) for a, b in zip(before, again))
    assert np.array_equal(features, again.features)


def test_a_cache_of_something_else_is_refused_by_name(root, cfg, cache, tmp_path):
    changed = copy.deepcopy(cfg)
    changed.model.rpn_head.anchor_generator.scales = [8]
    with pytest.raises(ValueError, match='made from another model .*--rebuild'):
        open_cache(root, changed)
    changed = copy.deepcopy(cfg)
    changed.train_dataloader.dataset.pipeline.pop(2)
    with pytest.raises(ValueError, match='made from another dataset'):
        open_cache(root, changed)
    with pytest.raises(ValueError, match='another seed'):
        open_cache(root, cfg, seed=3)
    other = tmp_path / 'other.pth'
    state = torch.load(root / 'epoch_1.pth')
    state['state_dict']['rpn_head.rpn_cls.bias'] += 1
    torch.save(state, other)
    with pytest.raises(ValueError, match='made from another checkpoint'):
        roi_cache.open_cache(root / 'cache', cfg, other, val_images=VAL, samples=2)
    # Another loss does not matter.
    rambo = Config.fromfile(RAMBO)
    assert len(open_cache(root, rambo).val) == VAL


def test_rebuilding_replaces_the_cache_and_nothing_else(root, cfg, tmp_path):
    folder, arguments = tmp_path / 'cache', dict(samples=1, val_images=TRAIN + VAL - 1)
    checkpoint = root / 'epoch_1.pth'
    roi_cache.open_cache(folder, cfg, checkpoint, **arguments)
    (folder / 'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='another seed'):
        roi_cache.open_cache(folder, cfg, checkpoint, seed=1, **arguments)
    new = roi_cache.open_cache(
        folder, cfg, checkpoint, seed=1, rebuild=True, **arguments
    )
    assert new.origin['seed'] == 1 and len(new.train[0]) == 1
    assert (folder / 'notes.txt').read_text() == 'mine'
    with pytest.raises(ValueError, match='holds files but no cache.json'):
        roi_cache.open_cache(root / 'voc', cfg, checkpoint, rebuild=True, **arguments)
    assert (root / 'voc' / 'JPEGImages').is_dir()


def test_bad_splits_and_checkpoints_are_refused(root, cfg, tmp_path):
    for count in (0, TRAIN + VAL):
        with pytest.raises(ValueError, match=f'must be 1 to 8, .* got {count}'):
            roi_cache.split(cfg, count)
    state = torch.load(root / 'epoch_1.pth')['state_dict']
    del state['neck.fpn_convs.0.conv.weight']
    torch.save(dict(state_dict=state), tmp_path / 'lacking.pth')
    with pytest.raises(ValueError, match=r'lacks 1 of .*neck\.fpn_convs\.0'):
        roi_cache.frozen_detector(cfg, tmp_path / 'lacking.pth')
    retina = ConfigDict(model=Config.fromfile(CE).model)
    retina.model.type = 'RPN'
    retina.model.pop('roi_head')
    with pytest.raises(ValueError, match='must be that of a two-stage detector'):
        roi_cache.frozen_detector(retina, root / 'epoch_1.pth')


def test_features_too_large_for_half_precision_are_refused(cache, tmp_path):
    image = cache.val[0]
    image.features = image.features.float() * 0 + 1e5
    with pytest.raises(ValueError, match='do not fit into float16'):
        roi_cache.write_table(tmp_path / 'table', [image])
    with pytest.raises(FileNotFoundError):
        roi_cache.RoiTable(tmp_path / 'table')


# Settings


def test_a_setting_changes_what_it_names_alone(cfg):
    plain = ablate_head.resolve(cfg, 'plain', {})
    assert plain['bbox_head'] == cfg.model.roi_head.bbox_head.to_dict()
    assert plain['epochs'] == 4 and plain['batch_size'] == 4
    changed = ablate_head.resolve(
        cfg,
        'changed',
        dict(
            loss_cls=LOSS,
            lr=0.5,
            epochs=2,
            bbox_head=dict(fc_out_channels=8),
            test_cfg=dict(score_thr=0.2),
            schedules=[SCHEDULE],
        ),
    )
    head = changed['bbox_head']
    # The loss is replaced, not merged, and the head tells it the images.
    assert head.pop('loss_cls') == LOSS
    assert head.pop('type') == 'RaMBOShared2FCBBoxHead'
    assert head.pop('fc_out_channels') == 8
    expected = dict(plain['bbox_head'])
    for key in ('loss_cls', 'type', 'fc_out_channels'):
        expected.pop(key)
    assert head == expected
    assert changed['optim_wrapper']['optimizer']['lr'] == 0.5
    assert changed['test_cfg'] == dict(plain['test_cfg'], score_thr=0.2)
    assert [s.get('T_max', s['end']) for s in plain['param_scheduler']] == [100, 4]
    assert [s.get('T_max', s['end']) for s in changed['param_scheduler']] == [100, 2]


def test_schedules_come_with_the_configs_loss_alone():
    rambo = Config.fromfile(RAMBO)
    assert ablate_head.resolve(rambo, 'own', {})['schedules'] == []
    schedule = dict(param='margin', start=3.0, curve='exponential')
    rambo.custom_hooks = [dict(type='RaMBOScheduleHook', **schedule)]
    assert ablate_head.resolve(rambo, 'own', {})['schedules'] == [schedule]
    other = ablate_head.resolve(rambo, 'other', dict(loss_cls=LOSS))
    assert other['schedules'] == []


def test_settings_from_the_command_line():
    parse = ablate_head.parse_setting
    assert parse('a', 'dict(type="RaMBOLoss", lambd=1 / 4)') == dict(
        loss_cls=dict(type='RaMBOLoss', lambd=0.25)
    )
    assert parse('a', '{"lr": 0.1}') == dict(lr=0.1)
    for text in ('dict(', '[1]', '__import__("os")'):
        with pytest.raises(ValueError, match='--set a must be a'):
            parse('a', text)


def test_unknown_keys_are_named(cfg):
    with pytest.raises(ValueError, match="setting 'a' must .* got .*'learning_rate'"):
        ablate_head.resolve(cfg, 'a', dict(learning_rate=1))
    with pytest.raises(ValueError, match="epochs of setting 'a' must be .* got 0 and"):
        ablate_head.resolve(cfg, 'a', dict(epochs=0))


def test_a_setting_file_without_settings_is_refused(tmp_path):
    path = tmp_path / 'settings.py'
    path.write_text('setings = {}')
    with pytest.raises(ValueError, match='must define settings'):
        ablate_head.read_settings(path)


# Training


def small(cfg, loss=None, **changes):
    setting = {'epochs': 2, **changes}
    if loss is not None:
        setting['loss_cls'] = loss
    return ablate_head.resolve(cfg, 'small', setting)


def test_training_lowers_the_loss_and_repeats_itself(cfg, cache):
    definition = small(cfg, lr=2e-3, epochs=6)
    definition['param_scheduler'] = []
    first = head_training.train_head(definition, cache, seed=0)
    losses = first['losses']
    assert losses[-1]['loss_cls'] < 0.7 * losses[0]['loss_cls']
    assert len(first['per_class']) == len(cache.classes)
    again = head_training.train_head(definition, cache, seed=0, val_interval=4)
    assert again['losses'] == losses
    assert (first['epochs'], again['epochs']) == ([1, 2, 3, 4, 5, 6], [4, 6])
    assert again['ap50'] == [first['ap50'][3], first['ap50'][5]]
    other = head_training.train_head(definition, cache, seed=1, val_interval=6)
    assert other['losses'] != losses


def test_lambda_falls_by_equal_ratios(cfg, cache, monkeypatch):
    seen = []
    forward = head_training.RaMBOLoss.forward

    def watch(self, *args, **kw):
        seen.append((self.factors['lambd'], kw['images'][1]))
        return forward(self, *args, **kw)

    monkeypatch.setattr(head_training.RaMBOLoss, 'forward', watch)
    definition = small(cfg, LOSS, schedules=[SCHEDULE])
    head_training.train_head(definition, cache, seed=0, val_interval=2)
    factors, images = zip(*seen)
    assert factors == pytest.approx([8.0, 4.0, 2.0, 1.0])
    # Six images in batches of four, and the loss knows how many each has.
    assert images == (4, 2, 4, 2)
    with pytest.raises(ValueError, match='for a head with a RaMBOLoss'):
        head_training.train_head(small(cfg, schedules=[SCHEDULE]), cache, seed=0)


def test_the_learning_rate_follows_the_configs_schedule(cfg, cache):
    """As in mmengine's runner, whose hook steps the schedulers of both kinds."""
    definition = small(cfg)
    definition['param_scheduler'] = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=3),
        dict(type='MultiStepLR', milestones=[1], gamma=0.5),
    ]
    rates, expected = [], []
    head = head_training.build_head(definition['bbox_head'])
    wrapper = head_training.build_optimizer(head, definition['optim_wrapper'])
    schedule = head_training.build_schedule(definition, wrapper.optimizer, 2)
    runner = ConfigDict(param_schedulers=schedule)
    for _ in range(2):
        for _ in range(2):
            expected.append(wrapper.get_lr()['lr'][0])
            ParamSchedulerHook().after_train_iter(runner, 0)
        ParamSchedulerHook().after_train_epoch(runner)
    with pytest.MonkeyPatch.context() as patch:
        update = type(wrapper).update_params

        def watch(self, loss):
            rates.append(self.get_lr()['lr'][0])
            update(self, loss)

        patch.setattr(type(wrapper), 'update_params', watch)
        head_training.train_head(definition, cache, seed=0, val_interval=2)
    assert rates == pytest.approx([7e-4 * ratio for ratio in (0.1, 0.55, 0.5, 0.5)])
    assert rates == pytest.approx(expected)


# Diagnosis


def test_diagnosis_changes_nothing_and_finds_both_gradients(cfg, cache):
    definition = small(cfg, dict(type='RaMBOLoss', lambd=0.1, margin_noise=True))
    plain = head_training.train_head(definition, cache, seed=0)
    watched = head_training.train_head(definition, cache, seed=0, diagnose=True)
    assert plain['losses'] == watched['losses']
    assert plain['ap50'] == watched['ap50']
    assert 'diagnosis' not in plain and len(watched['diagnosis']) == 2
    for epoch in watched['diagnosis']:
        assert epoch['cls_norm'] > 0 and epoch['box_norm'] > 0
        assert -1 <= epoch['cosine'] <= 1
        assert epoch['zero_share'].keys() == {'loss_cls', 'class_ap', 'pooled_ap'}
        # Where both terms give nothing, so does their sum.
        shares = epoch['zero_share'].values()
        assert all(0 <= share <= 1 for share in shares)
        assert epoch['zero_share']['loss_cls'] <= min(shares) + 1e-9


def test_logit_gradients_of_the_terms_add_up(cfg, cache):
    term = dict(span='memory')
    definition = small(cfg, dict(type='RaMBOLoss', lambd=5.0, class_ap=term))
    torch.manual_seed(0)
    head = head_training.build_head(definition['bbox_head'])
    images = [cache.train[0][index] for index in range(2)]
    diagnosis = head_training.Diagnosis(head, definition['train_cfg'])
    for _ in range(2):  # the second time with a memory
        features = torch.cat([image.features for image in images]).float()
        scores, deltas = head(features)
        state = torch.get_rng_state()
        parts = diagnosis.logit_gradients((scores, deltas), images)
        assert torch.equal(torch.get_rng_state(), state)
        losses = head_training.losses_of_outputs(
            head, (scores, deltas), images, definition['train_cfg']
        )
        (whole,) = torch.autograd.grad(losses['loss_cls'], scores)
        assert whole.abs().sum() > 0
        assert torch.allclose(parts['loss_cls'], whole)
        assert torch.allclose(parts['class_ap'] + parts['pooled_ap'], whole, atol=1e-7)
    assert len(head.loss_cls.get_extra_state()['scores']) == 2


def test_cross_entropy_gives_every_positive_a_gradient(cfg, cache):
    run = head_training.train_head(small(cfg, epochs=1), cache, seed=0, diagnose=True)
    assert run['diagnosis'][0]['zero_share'] == dict(loss_cls=0.0)


def test_a_tiny_lambda_leaves_most_positives_without_gradient(cfg, cache):
    loss = dict(LOSS, lambd=1e-6)
    run = head_training.train_head(
        small(cfg, loss, epochs=1), cache, seed=0, diagnose=True
    )
    assert run['diagnosis'][0]['zero_share']['loss_cls'] > 0.5


# The command


def test_command_runs_settings_once(root, cfg, tmp_path, capsys, monkeypatch):
    settings = tmp_path / 'settings.py'
    settings.write_text(
        'settings = {f"lr{lr}": dict(lr=lr, epochs=2) for lr in (0.001, 0.0)}'
    )
    trained = []
    train = ablate_head.train_head

    def watch(definition, cache, seed, **kw):
        trained.append((kw['name'], seed))
        return train(definition, cache, seed, **kw)

    monkeypatch.setattr(ablate_head, 'train_head', watch)
    out = str(tmp_path / 'out.json')
    rambo = ('--set', 'rambo', f'dict(loss_cls={LOSS!r}, epochs=1)')
    arguments = ('--settings', str(settings), *rambo)
    results = main(root, *arguments, '--per-class', out=out)
    assert trained == [('lr0.001', 0), ('lr0.0', 0), ('rambo', 0)]
    assert results == json.loads(Path(out).read_text())
    text = capsys.readouterr().out
    assert '| setting | seed | 1 | 2 | minutes |' in text
    ap50 = results['settings']['rambo']['runs']['0']['ap50']
    assert f'| rambo | 0 | {ap50[0]:.1f} |  |' in text
    assert '| class | lr0.001 | lr0.0 | rambo |' in text and '| ring |' in text

    # Again with one setting changed, a seed more, and one to be diagnosed.
    trained.clear()
    settings.write_text(
        settings.read_text().replace('epochs=2', 'epochs=2 - (lr == 0)')
    )
    main(root, *arguments, out=out)
    assert trained == [('lr0.0', 0)]
    trained.clear()
    main(root, *rambo, '--seeds', '0', '1', out=out)
    assert trained == [('rambo', 1)]
    assert '| rambo | 2 |' in capsys.readouterr().out
    trained.clear()
    results = main(root, *rambo, '--diagnose', out=out)
    assert trained == [('rambo', 0)]
    assert '| rambo | 0 | 1 |' in capsys.readouterr().out
    assert set(results['settings']) == {'lr0.001', 'lr0.0', 'rambo'}

    # Without settings it only reports.
    trained.clear()
    (tmp_path / 'full.json').write_text('{"lr0.001": 40, "lr0.0": 50}')
    main(root, '--full', str(tmp_path / 'full.json'), out=out)
    assert not trained
    assert "Kendall's tau" in capsys.readouterr().out


def test_a_setting_that_fails_does_not_stop_the_others(
    root, cfg, tmp_path, capsys, monkeypatch
):
    train = ablate_head.train_head

    def diverge(definition, cache, seed, **kw):
        if kw['name'] == 'bad':
            raise ValueError('RaMBOLoss: pred contains NaN')
        return train(definition, cache, seed, **kw)

    monkeypatch.setattr(ablate_head, 'train_head', diverge)
    out = tmp_path / 'out.json'
    settings = [('--set', name, 'dict(epochs=1)') for name in ('bad', 'good')]
    with pytest.raises(SystemExit, match='1 runs failed: bad, seed 0: RaMBOLoss: pred'):
        main(root, *settings[0], *settings[1], out=out)
    assert '| good | 0 |' in capsys.readouterr().out
    assert list(json.loads(out.read_text())['settings']['good']['runs']) == ['0']


def test_results_of_another_cache_are_refused(root, cfg, tmp_path):
    out = tmp_path / 'out.json'
    out.write_text(json.dumps(dict(origin=dict(seed=0), settings={})))
    with pytest.raises(SystemExit, match='holds results with another format and'):
        main(root, out=out)


def test_mistakes_are_found_before_the_cache_is_made(root, cfg, tmp_path):
    for setting, message in (
        ('dict(type="RamboLoss")', 'RamboLoss'),
        ('dict(lrr=1)', 'lrr'),
        ('dict(type="RaMBOLoss", lambd=-1)', 'lambd must be'),
    ):
        with pytest.raises(SystemExit, match=message):
            ablate_head.main(
                [
                    *(str(CE), str(root / 'epoch_1.pth')),
                    *('--cache', str(tmp_path / 'cache')),
                    *('--out', str(tmp_path / 'out.json'), '--set', 'a', setting),
                ]
            )
    assert not (tmp_path / 'cache').exists()


# Agreement with full training


@pytest.mark.filterwarnings('error')
def test_correlations_of_orders():
    correlations = ablate_report.rank_correlations
    assert correlations([1, 2, 3], [1, 5, 6]) == pytest.approx((1, 1))
    assert correlations([1, 2, 3], [3, 2, 1]) == pytest.approx((-1, -1))
    assert correlations([1, 2], [2, 1]) == pytest.approx((-1, -1))
    # Four of six pairs agree and one is tied on each side.
    assert correlations([1, 2, 2, 3], [1, 2, 3, 3]) == pytest.approx((4 / 5, 5 / 6))
    assert np.isnan(correlations([1, 1, 1], [1, 2, 3])).all()
    assert np.isnan(correlations([1, 2], [1, 1])).all()


def test_agreement_names_the_pairs_in_the_wrong_order(tmp_path):
    final = dict(a=[10.0, 20.0], b=[16.0], c=[30.0], d=[1.0])
    settings = {
        name: dict(
            runs={str(seed): dict(ap50=[0.0, v]) for seed, v in enumerate(values)}
        )
        for name, values in final.items()
    }
    table = tmp_path / 'full.json'
    table.write_text(json.dumps(dict(a=50.0, b=40.0, z=1.0)))
    scalars = tmp_path / 'c.json'
    scalars.write_text(
        '{"loss": 1.0, "step": 20}\n'
        '{"pascal_voc/mAP": 0.9, "step": 1}\n{"pascal_voc/mAP": 0.6, "step": 2}\n'
    )
    full = ablate_report.read_full([table, scalars])
    assert full == dict(a=50.0, b=40.0, z=1.0, c=60.0)
    text = ablate_report.agreement(settings, full)
    assert "Kendall's tau 0.33, Spearman's rho 0.50 over 3 settings" in text
    assert text.count('Wrong order') == 1
    assert 'Wrong order: a against b, -1.0 here and +10.0 in full training.' in text
    assert text.index('| c |') < text.index('| a |') < text.index('| b |')
    with pytest.raises(ValueError, match='at least two settings in common'):
        ablate_report.agreement(settings, dict(a=1.0))
    table.write_text('{"a": "good"}')
    with pytest.raises(ValueError, match='must be a JSON object of AP50 by setting'):
        ablate_report.read_full([table])
