"""What the monitor logs is what the loss did, and reaches TensorBoard's writer."""

import json

import pytest
import torch

pytest.importorskip('mmdet', reason='the hooks are registered in mmdet')
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper

from rambo_det import RaMBOMonitorHook
from rambo_det.functional import Ranking, detection_average_precision
from rambo_det.hooks.monitor import _Watch
from tests.helpers import detectors
from tests.helpers.toy_training import AUXILIARY, rambo_loss, train

MONITOR = dict(type='RaMBOMonitorHook', interval=3)


class Record(Hook):
    """Keeps what was ranked in each iteration, and the logged scalars after it."""

    priority = 'LOWEST'

    def __init__(self):
        self.ranked, self.logged, self.watched = [], [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        loss = runner.model.loss
        self.watched.append(bool(loss.ranked._forward_hooks))
        self.handle = loss.ranked.register_forward_hook(
            lambda *args: self.ranked.append([t.detach() for t in args[-1]])
        )

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.handle.remove()
        self.logged.append(
            {
                key[len('train/rambo/') :]: buffer.current()
                for key, buffer in runner.message_hub.log_scalars.items()
                if key.startswith('train/rambo/')
            }
        )


def run(tmp_path, loss, epochs=2, hooks=(MONITOR,), **settings):
    runner, model = train(loss, list(hooks), tmp_path, epochs, **settings)
    record = Record()
    runner.register_hook(record)
    runner.train()
    return record, runner, model


def test_scalars_are_those_of_the_step(tmp_path):
    loss = rambo_loss(class_ap=dict(span='memory', weight=1), memory=5)
    record, _, model = run(tmp_path, loss)
    assert record.watched == [i % 3 == 2 for i in range(8)]
    assert record.logged[1] == {} and record.logged[2] == record.logged[4]
    scores, labels = record.ranked[5]
    logged = record.logged[5]
    positive = labels[:, None] == torch.arange(3)
    assert logged['positives'] == positive.sum()
    for name, values in (
        ('positive', scores[positive]),
        ('negative', scores[~positive]),
    ):
        for level in (5, 50, 95):
            expected = values.quantile(level / 100).item()
            assert logged[f'{name}_p{level}'] == pytest.approx(expected)
    assert logged['negative_max'] == scores[~positive].max()
    # The AP is that of the ranking: of the memory's five steps, too, and the margin.
    scores, labels = (torch.cat(part) for part in zip(*record.ranked[:6]))
    scores = scores + loss.margin * (0.5 - (labels[:, None] == torch.arange(3)).float())
    expected = detection_average_precision(scores, labels, Ranking(1.0, True))
    assert logged['class_ap'] == pytest.approx(expected.nanmean().item())
    assert logged['memory_fill'] == 1.0 and record.logged[2]['memory_fill'] == 0.6
    assert logged['classes_ranked'] == logged['classes_seen'] == 3
    assert not model.loss.ranked._forward_hooks and not model.loss._forward_hooks


@pytest.mark.parametrize('memory', [0, 4])
@pytest.mark.parametrize('lambd, share', [(0.01, 0.75), (100.0, 0.0)])
def test_share_of_positives_without_gradient(memory, lambd, share):
    """The auxiliary loss gives every logit a gradient; only the ranking's counts."""
    span = 'memory' if memory else 'batch'
    loss = rambo_loss(
        perturb='together',
        lambd=lambd,
        margin=0.0,
        memory=memory,
        auxiliary=AUXILIARY,
        class_ap=dict(span=span, weight=1),
    )
    # Four positives, of which with a small lambda just one passes a negative.
    pred = torch.tensor([[-3.0], [-2.0], [-1.0], [0.0], [-0.0001], [3.0], [4.0], [5.0]])
    pred.requires_grad_()
    labels = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1])
    watch = _Watch(loss)
    loss(pred, labels).backward()
    watch.stop()
    assert watch.scalars()['zero_grad_share'] == share
    assert (pred.grad != 0).all()


def test_watching_changes_neither_loss_nor_gradient():
    gradients = []
    for watched in (False, True):
        loss = rambo_loss(margin=0.5, margin_noise=True)
        pred = torch.linspace(-1, 1, 36).view(12, 3).requires_grad_()
        watch = _Watch(loss) if watched else None
        torch.manual_seed(0)
        loss(pred, torch.arange(12) % 4).backward()
        gradients.append(pred.grad)
        if watch:
            watch.stop()
    assert torch.equal(*gradients)


def test_a_step_without_positives_logs_what_there_is():
    loss = rambo_loss()
    watch = _Watch(loss)
    loss(torch.zeros(4, 3, requires_grad=True), torch.full((4,), 3)).backward()
    watch.stop()
    scalars = watch.scalars()
    assert scalars['positives'] == scalars['classes_ranked'] == 0
    assert set(scalars) == {
        'positives',
        'classes_ranked',
        'negative_max',
        *(f'negative_p{level}' for level in (5, 50, 95)),
    }


def test_a_ranking_that_is_held_back_is_no_alarm():
    loss = rambo_loss()
    loss.factors['loss_weight'] = 0.0
    watch = _Watch(loss)
    pred = torch.randn(8, 3, requires_grad=True)
    loss(pred, torch.arange(8) % 4).backward()
    assert 'zero_grad_share' not in watch.scalars()


def test_a_loss_that_was_not_called_logs_nothing():
    assert _Watch(rambo_loss()).scalars() == {}


def test_classes_seen_are_remembered_by_a_resumed_run(tmp_path):
    """Examples of class 2 come to an end: what was seen of it stays in the log."""
    settings = dict(hooks=[dict(MONITOR, interval=2)])
    record, _, _ = run(tmp_path, rambo_loss(), epochs=1, **settings)
    assert record.logged[-1]['classes_seen'] == 3
    data = [(torch.randn(2), 0) for _ in range(20)]
    from tests.helpers.toy_training import loader

    settings.update(train_dataloader=loader(data), resume=True)
    record, _, _ = run(tmp_path, rambo_loss(), epochs=2, **settings)
    assert record.logged[-1]['classes_seen'] == 3
    assert record.logged[-1]['classes_ranked'] == 1


def test_scalars_reach_the_visualizer(tmp_path):
    """TensorboardVisBackend gets the same call as the JSON file does."""
    run(
        tmp_path,
        rambo_loss(),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=3)),
        visualizer=dict(
            type='Visualizer', vis_backends=[dict(type='LocalVisBackend')], name='m'
        ),
    )
    (path,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert any('rambo/zero_grad_share' in line for line in lines)
    assert all(isinstance(v, (int, float)) for line in lines for v in line.values())


@pytest.mark.parametrize(
    'name, prefixes',
    [
        ('retinanet_r50_fpn_rambo_1x_voc0712', ['rambo/']),
        (
            'cascade-rcnn_r50_fpn_rambo_1x_voc0712-cocofmt',
            [f'rambo/roi_head.bbox_head.{stage}/' for stage in range(3)],
        ),
        ('dino-4scale_r50_rambo_8xb2-12e_voc0712-cocofmt', ['rambo/']),
    ],
)
def test_detectors_are_monitored(name, prefixes, tmp_path):
    """Calls per level, per stage and per decoder layer are told apart or joined."""
    model = detectors.build(name)
    data = detectors.batch(model)
    inputs, samples = data['inputs'], data['data_samples']
    hook = RaMBOMonitorHook(interval=1)
    runner, _ = train(rambo_loss(), [], tmp_path, 1)
    runner.model = model
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0))
    loss, _ = model.parse_losses(model.loss(inputs, samples))
    optimizer.update_params(loss)
    hook.after_train_iter(runner, 0)
    scalars = runner.message_hub.log_scalars
    for prefix in prefixes:
        found = {key for key in scalars if key.startswith(f'train/{prefix}')}
        names = {key.rpartition('/')[2] for key in found}
        assert {'zero_grad_share', 'class_ap', 'positive_p50'} <= names
        share = scalars[f'train/{prefix}zero_grad_share'].current()
        assert 0 <= share <= 1
        assert not any('loss' in key for key in found)


def test_a_model_without_the_loss_is_an_error(tmp_path):
    runner, _ = train(torch.nn.CrossEntropyLoss(), [MONITOR], tmp_path, 1)
    with pytest.raises(ValueError, match='no RaMBOLoss to monitor; remove the hook'):
        runner.train()
