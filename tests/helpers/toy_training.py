"""A training of seconds: a linear classifier in mmengine's runner."""

import itertools
import random

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner

from rambo_det import RaMBOLoss

_NUMBERS = itertools.count()
AUXILIARY = dict(type='CrossEntropyLoss', use_sigmoid=True)


def rambo_loss(**settings):
    base = dict(lambd=2.0, margin=0.15, margin_noise=False)
    base.update(pooled_ap=None, loss_weight=1.0)
    base['auxiliary'] = AUXILIARY
    base['class_ap'] = dict(span='batch', weight=1)
    return RaMBOLoss(**{**base, **settings})


class Classifier(BaseModel):
    def __init__(self, loss, classes=3):
        super().__init__()
        self.linear = torch.nn.Linear(2, classes)
        self.norm = torch.nn.BatchNorm1d(classes)
        self.loss = loss
        self.seen = []

    def forward(self, inputs, labels, mode='loss'):
        logits = self.norm(self.linear(inputs))
        if mode == 'predict':
            return [row for row in logits]
        self.seen.append(dict(getattr(self.loss, 'factors', {})))
        return dict(loss=self.loss(logits, labels))


def examples(classes=3, number=20):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(2, generator=generator), index % (classes + 1))
        for index in range(number)
    ]


class Augmented:
    """Examples that change with the global random generators, as in a pipeline."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, label = self.data[index]
        shift = random.gauss(0, 1) + np.random.randn()
        return inputs + shift + torch.randn(2), label


class Restless(BaseMetric):
    """A metric that draws random numbers."""

    def process(self, data_batch, data_samples):
        np.random.rand(3), random.random(), torch.rand(2)
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return dict(score=0.0)


def loader(data, shuffle=False, **settings):
    return dict(
        batch_size=5,
        dataset=data,
        sampler=dict(type='DefaultSampler', shuffle=shuffle),
        collate_fn=dict(type='default_collate'),
        **settings,
    )


def train(loss, hooks, work_dir, epochs, resume=False, loop=None, **settings):
    """Return a runner that has not run, and its model."""
    torch.manual_seed(0)
    model = Classifier(loss, settings.pop('classes', 3))
    checkpoint = settings.pop('checkpoint', dict(type='CheckpointHook', interval=1))
    defaults = dict(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader(examples()),
        train_cfg=loop or dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=hooks,
        default_hooks=dict(checkpoint=checkpoint),
        default_scope='mmdet',
        # Runners of the same name would share their logs.
        experiment_name=f'toy-{next(_NUMBERS)}',
        resume=resume,
        log_level='ERROR',
    )
    return Runner(**{**defaults, **settings}), model
