"""Heads and whole detectors in two processes, of which one has nothing to rank."""

import copy
import functools
import itertools
import time

import pytest
import torch

pytest.importorskip('mmdet', reason='the heads are registered in mmdet')
from mmdet.registry import MODELS
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import nn

from rambo_det import RaMBODenseHeadMixin, RaMBOLoss
from rambo_det.losses.gather import Exchange
from tests.helpers.detectors import CLASSES, DENSE, QUERY, batch, build, truth
from tests.helpers.processes import run

DETECTORS = dict(
    faster='faster-rcnn_r50_fpn_rambo-rpn_1x_voc0712',
    cascade='cascade-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt',
    sparse='sparse-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt',
    fcos=DENSE['FCOSHead'],
    dino=QUERY['DINOHead'],
)
STEPS = 2
# How often the losses are called in a step, and in which of these calls the second
# process, whose images are empty, has no rows: the RPN and the RoI head; the stages of
# a cascade; decoder layers, the encoder's output and denoising queries.
CALLS = dict(faster=2, cascade=3, sparse=3, fcos=1, dino=2 + 1 + 2)
WITHOUT_ROWS = dict(faster=[1], cascade=[0, 1, 2], sparse=[], fcos=[], dino=[3, 4])


def change_config(cfg):
    """Nothing that an RPN proposes is large enough: proposals are objects alone."""
    if 'rpn_proposal' in cfg.get('train_cfg', {}):
        cfg.train_cfg.rpn_proposal.min_bbox_size = 10**6


def record_exchanges():
    """Keep how many rows each process has in each exchange; return the list."""
    exchanges = []
    exchange = Exchange.__call__

    def spy(self, numbers, columns):
        received = exchange(self, numbers, columns)
        exchanges.append([len(part) for part in received.columns[0]])
        return received

    Exchange.__call__ = spy
    return exchanges


def train(rank):
    exchanges = record_exchanges()
    results = {}
    for name, config in DETECTORS.items():
        exchanges.clear()
        model = build(config, change_config)
        data = batch(model, objects=[0, 0] if rank == 1 else [3, 2])
        wrapped = MMDistributedDataParallel(model)
        optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
        logs = [wrapped.train_step(data, optimizer) for _ in range(STEPS)]
        results[name] = dict(
            finite=all(torch.isfinite(log['loss']) for log in logs),
            exchanges=list(exchanges),
            parameters=torch.cat([p.detach().flatten() for p in model.parameters()]),
        )
    return results


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return run(train, 2, tmp_path_factory.mktemp('group'))


@pytest.mark.parametrize('name', DETECTORS)
def test_a_process_without_objects_does_not_stop_the_others(name, trained):
    first, second = (result[name] for result in trained)
    assert first['finite'] and second['finite']
    assert torch.equal(first['parameters'], second['parameters'])
    assert first['exchanges'] == second['exchanges']
    assert len(first['exchanges']) == STEPS * CALLS[name]
    for number, (_, rows) in enumerate(first['exchanges']):
        assert (rows == 0) == (number % CALLS[name] in WITHOUT_ROWS[name])


# Gradients through a head


EXACT = dict(
    margin_noise=False,
    margin=0.2,
    lambd=3.0,
    class_ap=dict(weight=0.7, span='batch'),
    pooled_ap=dict(weight=0.3, span='image'),
)


def head_gradients(rank):
    """Gradients of the scores of two images, in one process each, or in one."""
    model = build(DENSE['RetinaHead'], lambda cfg: cfg.bbox_head.loss_cls.update(EXACT))
    head, data = model.bbox_head, batch(model, ((64, 64), (64, 64)))
    _, boxes = head(model.extract_feat(data['inputs']))
    generator = torch.Generator().manual_seed(0)
    scores = [
        torch.randn(
            2, CLASSES * head.num_base_priors, *b.shape[2:], generator=generator
        )
        for b in boxes
    ]
    images = slice(None) if rank is None else slice(rank, rank + 1)
    scores = [s[images].clone().requires_grad_() for s in scores]
    instances, metas, _ = (None if t is None else t[images] for t in truth(data))
    losses = head.loss_by_feat(scores, [b[images] for b in boxes], instances, metas)
    loss = losses['loss_cls']
    loss.backward()
    return loss.detach(), [s.grad for s in scores]


def test_images_in_two_processes_have_the_gradients_of_one_batch(tmp_path):
    losses, gradients = zip(*run(head_gradients, 2, tmp_path))
    expected, levels = head_gradients(None)
    torch.testing.assert_close(sum(losses) / 2, expected)
    for level, *parts in zip(levels, *gradients):
        # DDP would add them up and divide by two.
        torch.testing.assert_close(torch.cat(parts) / 2, level, rtol=1e-5, atol=1e-8)
        assert level.abs().sum() > 0


class Sometimes(nn.Module):
    """Has nothing to rank in the second process."""

    def __init__(self, rank, loss_cls):
        super().__init__()
        self.rank, self.cls_out_channels = rank, 3
        self.loss_cls = MODELS.build(loss_cls)

    def loss_by_feat(self, cls_scores, labels):
        if self.rank == 1:
            return dict(loss_bbox=cls_scores[0].sum())
        rows = cls_scores[0].permute(0, 2, 3, 1).reshape(-1, 3)
        return dict(loss_cls=self.loss_cls(rows, labels))


class RaMBOSometimes(RaMBODenseHeadMixin, Sometimes):
    pass


def dense_head_without_calls(rank):
    head = RaMBOSometimes(rank, loss_cls=dict(type='RaMBOLoss', margin_noise=False))
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 3, 4, 4, generator=generator).requires_grad_()
    losses = head.loss_by_feat([scores], torch.arange(16) % 4)
    losses['loss_cls'].backward()
    return losses['loss_cls'].detach(), scores.grad


def test_a_dense_head_that_does_not_call_its_loss(tmp_path):
    (loss, grad), (other, zero) = run(dense_head_without_calls, 2, tmp_path)
    expected, level = dense_head_without_calls(0)
    # Each reports its own images, so that their mean is that of the only image.
    torch.testing.assert_close((loss + other) / 2, expected)
    torch.testing.assert_close(grad / 2, level)
    assert zero.abs().sum() == 0 < level.abs().sum()


def stock_roi_head(rank):
    """With ``gather=True`` it ranks together as long as it has proposals."""
    loss_cls = dict(type='RaMBOLoss', gather=True, **EXACT)
    head = MODELS.build(
        dict(
            type='Shared2FCBBoxHead',
            in_channels=2,
            fc_out_channels=4,
            roi_feat_size=1,
            num_classes=3,
            loss_cls=loss_cls,
        )
    )
    assert isinstance(head.loss_cls, RaMBOLoss)
    exchanges = record_exchanges()
    rows = 3 + rank
    scores = torch.randn(rows, 3)
    rest = (torch.arange(rows), torch.ones(rows), torch.zeros(rows, 4))
    head.loss(scores, torch.zeros(rows, 12), torch.zeros(rows, 5), *rest, rest[-1])
    return exchanges


def test_a_stock_head_can_be_told_to_gather(tmp_path):
    assert run(stock_roi_head, 2, tmp_path) == [[[3, 4]], [[3, 4]]]


# What fails in the second process, of a detector: between its heads and their losses,
# before, between and after the means that mmdet brings together.
FAILING = [
    ('RetinaHead', 'bbox_head.get_targets'),
    ('FCOSHead', 'bbox_head.get_targets'),
    ('FCOSHead', 'bbox_head.loss_centerness.forward'),
    ('FCOSHead', 'bbox_head._overlaps'),
    ('ATSSHead', 'bbox_head.loss_by_feat_single'),
    ('faster', 'rpn_head.predict_by_feat'),
    ('faster', 'roi_head.bbox_assigner.assign'),
    ('faster', 'roi_head.bbox_head.forward'),
    ('cascade', 'roi_head.bbox_sampler.2.sample'),
    ('sparse', 'roi_head.bbox_head.1.loss_iou.forward'),
    ('dino', 'encoder.forward'),
    ('dino', 'bbox_head.assigner.assign'),
    ('dino', 'bbox_head.split_outputs'),
    ('dino', 'bbox_head._get_dn_targets_single'),
]
STEPS_BEFORE = (0, 1)  # it fails in the first step, and in the second


def detectors_that_fail(rank):
    found = []
    models = {}
    for before, (name, method) in itertools.product(STEPS_BEFORE, FAILING):
        if before or name not in models:
            models[name] = build({**DENSE, **DETECTORS}.get(name), change_config)
        model = copy.deepcopy(models[name])
        data = batch(model, objects=[3, 2])
        *path, last = method.split('.')
        part = functools.reduce(_part, path, model)
        given = data['inputs'], data['data_samples']
        for _ in range(before):
            assert all(torch.isfinite(x) for x in _losses(model.loss(*given)))
        if rank == 1:
            part.__dict__[last] = _raise
        began = time.monotonic()
        try:
            model.loss(*given)
        except (KeyError, RuntimeError) as error:
            found.append((str(error), time.monotonic() - began))
    return found


def _part(whole, name):
    return whole[int(name)] if name.isdigit() else getattr(whole, name)


def _losses(found):
    return [v for k, v in found.items() if 'loss' in k and isinstance(v, torch.Tensor)]


def _raise(*_, **__):
    raise KeyError('no match')


def test_a_process_that_fails_before_it_ranks_is_named_in_the_others(tmp_path):
    others, own = run(detectors_that_fail, 2, tmp_path)
    count = len(STEPS_BEFORE) * len(FAILING)
    assert [message for message, _ in own] == ["'no match'"] * count
    assert len(others) == count
    for message, seconds in others:
        assert 'process 1 stopped before it ranked' in message
        assert seconds < 1


def fails_after_all(rank):
    """No other process waits then, so that this one must not either."""
    model = build(DETECTORS['faster'], change_config)
    data = batch(model, objects=[3, 2])
    if rank == 1:
        model.roi_head.bbox_head.loss_cls.get_accuracy = _raise
    try:
        return [*model.loss(data['inputs'], data['data_samples'])]
    except KeyError as error:
        return str(error)


def test_a_process_that_fails_when_all_have_ranked_raises_at_once(tmp_path):
    losses, message = run(fails_after_all, 2, tmp_path)
    assert 'loss_cls' in losses and message == "'no match'"
