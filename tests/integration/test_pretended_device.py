"""On a pretended accelerator: what the loss launches, no waits, the CPU's results.

Such a device cannot be removed from a process, so this file runs itself in another one,
once for all cases; see ``main``.
"""

import contextlib
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils import backend_registration

from tests import ROOT

pytest.importorskip('mmdet', reason='RaMBOLoss is registered in mmdet')
from mmdet.models.dense_heads import AnchorHead, DETRHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.structures import InstanceData

from rambo_det import RaMBOLoss
from rambo_det.functional import ap_loss, average_precision

ROWS, CLASSES, STEPS = 128, 20, 9
MEMORY, IMAGE = dict(span='memory'), dict(span='image')
SOFTMAX = dict(scores='softmax', use_sigmoid=False)
LOG_SOFTMAX = dict(scores='log_softmax', use_sigmoid=False)
OVERLAPS = dict(overlaps=(0.5, 0.6, 0.7, 0.8))
TOGETHER = dict(perturb='together', lambd=2.0)
# Settings of the loss, for the rows of two images of a RoI head.
CASES = {
    'defaults': {},
    'unchecked': dict(check_values=False),
    'memory': dict(class_ap=MEMORY),
    'images, both terms': dict(class_ap=IMAGE, pooled_ap=IMAGE),
    'images, class-wise term': dict(class_ap=IMAGE),
    'images, pooled term': dict(pooled_ap=IMAGE),
    'rows': dict(pooled_ap=dict(span='row')),
    'one term': dict(class_ap=None),
    'finite lambd': dict(lambd=2.0),
    'finite lambd of one term': dict(class_ap=dict(lambd=2.0)),
    'lambd of each term': dict(class_ap=dict(lambd=2.0), pooled_ap=dict(lambd=0.5)),
    'together': TOGETHER,
    'together, lambd of each term': dict(**TOGETHER, class_ap=dict(lambd=1.0)),
    'together, memory and images': dict(**TOGETHER, class_ap=MEMORY, pooled_ap=IMAGE),
    'no margin': dict(margin=0.0),
    'fixed margin': dict(margin_noise=False),
    'sigmoid': dict(scores='sigmoid'),
    'softmax': SOFTMAX,
    'log_softmax': LOG_SOFTMAX,
    'overlaps': OVERLAPS,
    'overlaps, memory and images': dict(
        **OVERLAPS, class_ap=MEMORY, pooled_ap=IMAGE, overlap_weights='positives'
    ),
    'overlaps, together': dict(**OVERLAPS, **TOGETHER),
    'everything': dict(
        **LOG_SOFTMAX,
        class_ap=dict(**MEMORY, lambd=2.0),
        pooled_ap=dict(**IMAGE, lambd=0.5),
    ),
    'everything, one lambd infinite': dict(
        **SOFTMAX, class_ap=MEMORY, pooled_ap=dict(**IMAGE, lambd=0.5)
    ),
    'everything, together': dict(
        **LOG_SOFTMAX, **TOGETHER, class_ap=MEMORY, pooled_ap=dict(**IMAGE, lambd=0.5)
    ),
}


def rows_of(step, columns, rows=ROWS, ignored=0.0):
    """Logits, labels, weights, images, the ground truth's labels and overlaps."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.75] = CLASSES
    return (
        torch.randn(rows, columns, generator=generator),
        labels,
        (torch.rand(rows, generator=generator) >= ignored).float(),
        torch.arange(2).repeat_interleave(rows // 2),
        labels[labels < CLASSES],
        torch.rand(rows, generator=generator),
    )


def loss_steps(move, watched, settings, **kwargs):
    """Loss, gradient and logged AP of the last of some steps."""
    loss_cls = RaMBOLoss(**settings)
    loss_cls._thresholds = move(loss_cls._thresholds)
    for step in range(STEPS):
        given = rows_of(step, loss_cls.get_cls_channels(CLASSES), **kwargs)
        pred, labels, weight, images, objects, overlaps = move(given)
        pred.requires_grad_()
        with watched() if step == STEPS - 1 else contextlib.nullcontext():
            others = dict(images=(images, 2), objects=objects, overlaps=overlaps)
            loss = loss_cls(pred, labels, weight, **others)
            logged = loss_cls.get_accuracy()
            loss.backward()
    assert len(logged) == len(loss_cls.terms)
    return [loss.detach(), pred.grad, *logged.values()]


def dense_rows(move, watched):
    """The rows of a dense head, some of them ignored."""
    return loss_steps(move, watched, dict(memory=0), rows=5000, ignored=0.1)


def two_processes(move, watched):
    """A step of two processes, of which the other has the same rows."""
    from rambo_det.losses import gather, rambo_loss

    with contextlib.ExitStack() as stack:
        double = mock.patch.object(gather, 'all_gather', lambda x: [x, x])
        stack.enter_context(double)
        world = mock.patch.object(rambo_loss, 'get_world_size', lambda: 2)
        stack.enter_context(world)
        return loss_steps(move, watched, dict(margin_noise=False, class_ap=MEMORY))


def functional(move, watched):
    """The functions for sequences as rows, with a mask."""
    scores, targets, mask = (torch.rand(4, 30) for _ in range(3))
    scores, targets, mask = move((scores, targets < 0.3, mask < 0.8))
    scores.requires_grad_()
    with watched():
        loss = ap_loss(
            scores,
            targets,
            lambd=math.inf,
            mask=mask,
            margin=0.1,
            perturb='singly',
            check_nan=False,
        )
        loss.sum().backward()
        precision = average_precision(scores.detach(), targets, mask, check_nan=False)
    return [loss.detach(), scores.grad, precision]


# What mmdet's heads do is done on the host, and what they call the loss with is put on
# the device: of the heads, only this package's part runs there.


def head_step(move, watched, head, stock, method, result, compute):
    """Losses and gradients of a head.

    ``compute(move)`` calls the head, which calls the ``method`` of the ``stock`` head;
    on the device this only calls the loss, and has the ``result``.
    """
    rankings = []

    def record(calls, *_, **__):
        rankings.append([c._replace(pred=c.pred.detach()) for c in calls])
        return dict(loss_cls=None)

    with mock.patch.object(head, 'rank_calls', record):
        compute(lambda x: x)
    rankings = move(rankings)
    preds = [call.pred.requires_grad_() for calls in rankings for call in calls]
    left = iter(rankings)

    def repeat(self, *_, **__):
        for call in next(left):
            self.loss_cls(*call)
        return result

    torch.manual_seed(0)
    with mock.patch.object(stock, method, repeat), watched():
        found = compute(move)
        losses = [v for k, v in found.items() if k.endswith('loss_cls')]
        gradients = torch.autograd.grad(losses, preds)
    assert len(losses) == len(rankings) and not list(left)
    return [*(v.detach() for v in losses), *gradients, *logged(found)]


def logged(found):
    return found['class_ap'], found['pooled_ap']


def shipped(name):
    """The head of a shipped config."""
    (path,) = (ROOT / 'configs' / 'pascal_voc').glob(f'{name}_*.py')
    cfg = Config.fromfile(path).model
    cfgs = dict(train_cfg=cfg.train_cfg, test_cfg=cfg.test_cfg)
    return MODELS.build(dict(cfg.bbox_head, **cfgs))


def boxes(count):
    corners = torch.rand(count, 2) * 60
    return torch.cat([corners, corners + 20 + 40 * torch.rand(count, 2)], dim=1)


def roi_head(move, watched):
    """The RoI head of Faster R-CNN with the sampled proposals of two images."""
    head = MODELS.build(
        dict(
            type='RaMBOShared2FCBBoxHead',
            num_classes=CLASSES,
            loss_cls=dict(type='RaMBOLoss'),
        )
    )
    half = ROWS // 2
    sampled = [
        dict(
            pos_priors=boxes(16),
            neg_priors=boxes(half - 16),
            pos_gt_bboxes=boxes(16),
            pos_gt_labels=torch.randint(0, CLASSES, (16,)),
        )
        for _ in range(2)
    ]
    images = torch.arange(2.0).repeat_interleave(half)
    predicted = (
        torch.randn(ROWS, CLASSES),
        torch.zeros(ROWS, 4 * CLASSES),
        torch.cat([images[:, None], boxes(ROWS)], dim=1),
    )

    def compute(move):
        results = [SimpleNamespace(**move(s)) for s in sampled]
        train_cfg = SimpleNamespace(pos_weight=-1)
        found = head.loss_and_target(*move(predicted), results, train_cfg)
        return found['loss_bbox']

    stock = BBoxHead, 'loss_and_target', dict(loss_bbox={})
    return head_step(move, watched, head, *stock, compute)


def loss_of_two_images(head, predicted):
    """What calls a head with its predictions and four objects in each image."""
    truth = [
        dict(bboxes=boxes(4), labels=torch.randint(0, CLASSES, (4,))) for _ in range(2)
    ]
    metas = [dict(img_shape=(128, 160), pad_shape=(128, 160))] * 2

    def compute(move):
        instances = [InstanceData(**move(objects)) for objects in truth]
        return head.loss_by_feat(*move(predicted), instances, metas)

    return compute


def dense_head(move, watched):
    """RetinaNet with its five levels."""
    head = shipped('retinanet')
    shapes = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]
    scores = [torch.randn(2, 9 * CLASSES, *shape) for shape in shapes]
    deltas = [torch.zeros(2, 9 * 4, *shape) for shape in shapes]
    compute = loss_of_two_images(head, (scores, deltas))
    stock = AnchorHead, 'loss_by_feat', {}
    return head_step(move, watched, head, *stock, compute)


def query_head(move, watched):
    """DETR with its six decoder layers."""
    scores = torch.randn(LAYERS, 2, 100, CLASSES)
    places = torch.rand(LAYERS, 2, 100, 4) * 0.2 + 0.4
    head = shipped('detr')
    compute = loss_of_two_images(head, (scores, places))
    stock = DETRHead, 'loss_by_feat_single', (None, None, None)
    return head_step(move, watched, head, *stock, compute)


LAYERS = 6
# How many operators and waits each may take.
LIMITS = {name: (200, 1) for name in CASES}
LIMITS.update({'defaults': (120, 1), 'unchecked': (120, 0)})
OTHERS = {
    dense_rows: (120, 1),
    roi_head: (120, 1),
    # With what finds the images of the rows of each level.
    dense_head: (150, 1),
    query_head: (LAYERS * 120, LAYERS),
    two_processes: (200, 2),  # one more tells how many rows the other has
    functional: (200, 0),
}
LIMITS.update({function.__name__: limits for function, limits in OTHERS.items()})


def main(out):
    """Run all cases on the host and on the device; write what was counted."""
    from tests.helpers import pretended_device as device

    found = {}
    for function in OTHERS:
        CASES[function.__name__] = function
    for name, case in CASES.items():
        usage = device.Usage()
        watched = functools.partial(device.watch, 'rambo_det', usage)
        run = case if callable(case) else functools.partial(loss_steps, settings=case)
        results = []
        for where in (lambda x: x, contextlib.nullcontext), (device.to_device, watched):
            torch.manual_seed(0)
            results.append(device.to_host(run(*where)))
        different = ''
        try:
            torch.testing.assert_close(*results, rtol=2e-6, atol=1e-7)
        except AssertionError as error:
            different = str(error)
        found[name] = dict(vars(usage), different=different)
    found['known'] = vars(known_usage(device))
    Path(out).write_text(json.dumps(found, indent=1), encoding='utf-8')


def known_usage(device):
    """Do what has to be counted."""
    usage = device.Usage()
    x = device.to_device(torch.arange(3.0))
    mask = device.to_device(torch.tensor([True, False, True]))
    with device.watch('rambo_det', usage):
        for wait in (x[0].item, x.nonzero, x.cpu, lambda: x[mask], x.tolist):
            wait()
        x.double()
        x.cumsum(0)
        mask.cumsum(0)  # of integers
        with pytest.raises(RuntimeError, match='mixes'):
            x + torch.ones(3)
    return usage


@pytest.fixture(scope='module')
def counted(tmp_path_factory):
    if not hasattr(backend_registration, '_setup_privateuseone_for_python_backend'):
        pytest.skip(f'PyTorch {torch.__version__} cannot pretend a device')
    out = tmp_path_factory.mktemp('pretended') / 'counted.json'
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, __file__, str(out)],
        env=dict(os.environ, PYTHONPATH=path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding='utf-8'))


def table(counter):
    """The lines of the package that have the most, for the message of a failure."""
    lines = sorted(counter.items(), key=lambda item: item[0].split(' at ')[::-1])
    return '\n'.join(f'{count} {what}' for what, count in lines)


@pytest.mark.parametrize('name', LIMITS)
def test_loss_and_log_on_an_accelerator(counted, name):
    case, (launches, waits) = counted[name], LIMITS[name]
    assert not case['different'], case['different']
    found = sum(case['launches'].values())
    assert found <= launches, f'{found} launches:\n{table(case["launches"])}'
    found = sum(case['waits'].values())
    assert found <= waits, f'{found} waits:\n{table(case["waits"])}'
    assert not case['doubles'] and not case['refused'], case


def test_what_is_not_wanted_is_counted(counted):
    """Were nothing counted, the tests above could not fail."""
    known = counted['known']
    assert sum(known['launches'].values()) >= 8
    assert sum(known['waits'].values()) == 5, known['waits']
    assert sum(known['doubles'].values()) == 1
    assert sum(known['refused'].values()) == 1


if __name__ == '__main__':
    main(*sys.argv[1:])
