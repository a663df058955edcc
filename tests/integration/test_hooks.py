"""Schedules of the loss inside mmengine's training loop."""

import pytest
import torch

pytest.importorskip('mmdet', reason='the hooks are registered in mmdet')
from rambo_det import RaMBOScheduleHook
from tests.helpers.toy_training import AUXILIARY, rambo_loss, train

FALLING = dict(
    type='RaMBOScheduleHook', param='lambd', start=128.0, curve='exponential'
)


def test_settings_follow_their_curves_and_are_logged(tmp_path):
    rise = dict(type='RaMBOScheduleHook', start=0.0)
    iterations = dict(unit='iteration')
    hooks = [
        FALLING,
        dict(rise, param='margin', begin=0.5, until=1.75),  # iterations 2 to 6
        dict(rise, param='loss_weight', curve='step', begin=0.5, unit='training'),
        dict(rise, param='auxiliary', curve='cosine', begin=3, until=6, **iterations),
    ]
    runner, model = train(rambo_loss(), hooks, tmp_path, epochs=2)
    runner.train()
    expected = dict(
        lambd=[2.0**power for power in range(7, -1, -1)],
        margin=[0, 0, 0, 0.25, 0.5, 0.75, 1, 1],
        loss_weight=[0, 0, 0, 0, 1, 1, 1, 1],
        auxiliary=[0, 0, 0, 0, 0.5, 1, 1, 1],
    )
    for name, factors in expected.items():
        assert [seen[name] for seen in model.seen] == pytest.approx(factors)
        log = runner.message_hub.get_scalar(f'train/{name}_factor').data[0]
        assert log[-1] == pytest.approx(factors[-1])


@pytest.mark.parametrize(
    ('param', 'settings'),
    [
        ('lambd', dict(lambd=16.0)),
        ('margin', dict(margin=1.2)),
        ('loss_weight', dict(loss_weight=8.0)),
        ('auxiliary', dict(auxiliary=dict(AUXILIARY, loss_weight=8.0))),
    ],
)
@pytest.mark.parametrize('noise', [False, True])
def test_a_factor_multiplies_what_the_config_says(param, settings, noise):
    logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 4
    scheduled = rambo_loss(margin_noise=noise)
    scheduled.factors[param] = 8.0
    gradients = []
    for loss in (scheduled, rambo_loss(margin_noise=noise, **settings), rambo_loss()):
        leaf = logits.clone().requires_grad_()
        torch.manual_seed(1)
        loss(leaf, labels).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        (dict(param='tau', start=1), "param must be one of .* got 'tau'"),
        (dict(param='margin', start=1, curve='log'), "curve must be .* got 'log'"),
        (dict(param='lambd', start=0), 'finite factors > 0 of lambd'),
        (dict(param='margin', start=0, curve='exponential'), 'finite factors > 0'),
        (dict(param='margin', start=1, end=-1), 'finite factors >= 0 of margin'),
        (dict(param='lambd', start=float('inf')), 'finite factors'),
        (dict(param='margin', start=0, begin=-1), '0 <= begin <= until'),
        (dict(param='margin', start=0, begin=2, until=1), 'begin=2, until=1'),
        (dict(param='margin', start=0, unit='step'), "unit must be .* got 'step'"),
        (dict(param='margin', start=0, begin=3, unit='training'), 'from 0 to 1, got'),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        RaMBOScheduleHook(**kwargs)


def test_a_model_without_the_loss_is_an_error(tmp_path):
    runner, _ = train(torch.nn.CrossEntropyLoss(), [FALLING], tmp_path, epochs=1)
    with pytest.raises(ValueError, match='has no RaMBOLoss'):
        runner.train()


def test_epochs_where_the_loop_has_none_are_an_error(tmp_path):
    loop = dict(by_epoch=False, max_iters=6)
    whole, model = train(rambo_loss(), [FALLING], tmp_path / 'a', 0, loop=loop)
    whole.train()
    assert model.seen[-1]['lambd'] == 1.0
    hooks = [dict(FALLING, until=2)]
    runner, _ = train(rambo_loss(), hooks, tmp_path / 'b', 0, loop=loop)
    with pytest.raises(ValueError, match="unit='iteration' .* until=2"):
        runner.train()


def test_a_share_of_the_training_is_not_an_iteration_late():
    hook = RaMBOScheduleHook('margin', 0.0, 1.0, 'step', begin=0.07, unit='training')
    assert 0.07 * 100 > 7  # as floating point has it
    assert [hook.factor(iteration, 100) for iteration in (6, 7)] == [0.0, 1.0]
