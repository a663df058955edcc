"""The schedule of λ inside mmengine's training loop."""

import pytest
import torch

pytest.importorskip('mmdet', reason='the hooks are registered in mmdet')
from mmengine.model import BaseModel
from mmengine.runner import Runner

from rambo_det import LambdScheduleHook, RaMBOLoss


class Classifier(BaseModel):
    def __init__(self, loss):
        super().__init__()
        self.linear = torch.nn.Linear(2, 3)
        self.loss = loss
        self.seen = []

    def forward(self, inputs, labels, mode='loss'):
        self.seen.append(getattr(self.loss, 'lambd_factor', None))
        return dict(loss=self.loss(self.linear(inputs), labels))


def train(loss, hook, work_dir, epochs, resume=False):
    torch.manual_seed(0)
    data = [(torch.randn(2), index % 4) for index in range(20)]
    model = Classifier(loss)
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=5,
            dataset=data,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[hook],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        default_scope='mmdet',
        experiment_name=f'{work_dir.name}-{epochs}-{resume}',
        resume=resume,
        log_level='ERROR',
    )
    return runner, model


def rambo_loss():
    term = dict(span='batch', weight=1)
    return RaMBOLoss(lambd=2.0, margin_noise=False, pooled_ap=None, class_ap=term)


def test_factor_falls_by_equal_ratios(tmp_path):
    hook = dict(type='LambdScheduleHook', start=128.0, end=1.0)
    runner, model = train(rambo_loss(), hook, tmp_path, epochs=2)
    runner.train()
    assert model.seen == pytest.approx([2.0**power for power in range(7, -1, -1)])
    log = runner.message_hub.get_scalar('train/lambd_factor').data[0]
    assert log[-1] == pytest.approx(1.0)


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    hook = LambdScheduleHook(start=128.0)
    runner, whole = train(rambo_loss(), hook, tmp_path / 'a', epochs=2)
    runner.train()
    (tmp_path / 'a' / 'epoch_2.pth').unlink()
    (tmp_path / 'a' / 'last_checkpoint').write_text(str(tmp_path / 'a' / 'epoch_1.pth'))
    runner, rest = train(rambo_loss(), hook, tmp_path / 'a', epochs=2, resume=True)
    runner.train()
    assert rest.seen == whole.seen[4:]
    torch.testing.assert_close(rest.linear.weight, whole.linear.weight)


def test_lambd_of_the_terms_is_multiplied():
    logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 4
    scheduled, fixed = rambo_loss(), rambo_loss()
    scheduled.lambd_factor = 8.0
    fixed.terms = tuple(term._replace(lambd=16.0) for term in fixed.terms)
    gradients = []
    for loss in (scheduled, fixed):
        leaf = logits.clone().requires_grad_()
        torch.manual_seed(1)
        loss(leaf, labels).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize('start, end', [(0, 1), (1, -1), (float('inf'), 1)])
def test_bad_factors(start, end):
    with pytest.raises(ValueError, match='must be positive finite factors'):
        LambdScheduleHook(start, end)


def test_a_model_without_the_loss_is_an_error(tmp_path):
    hook = dict(type='LambdScheduleHook', start=2.0)
    loss = torch.nn.CrossEntropyLoss()
    runner, _ = train(loss, hook, tmp_path, epochs=1)
    with pytest.raises(ValueError, match='has no RaMBOLoss'):
        runner.train()
