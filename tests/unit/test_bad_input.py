"""Bad input of every kind, and the error that each gives.

Here are the calls that no other test makes. The settings and batches of the loss are
in ``test_rambo_loss.py`` (``test_bad_settings``, ``test_bad_batches``), those of the
functions in ``test_average_precision.py`` and ``test_ranking.py``, of the schedules in
``test_hooks.py``, of the heads in ``test_dense_heads.py`` and ``test_query_heads.py``,
and damaged checkpoints in ``test_resume.py``.
"""

import pickle

import pytest
import torch

pytest.importorskip('mmdet', reason='the heads are registered in mmdet')
from mmdet.registry import HOOKS, MODELS

import rambo_det
from rambo_det import (
    RaMBOLoss,
    RaMBOMonitorHook,
    RaMBORetinaHead,
    RaMBOScheduleHook,
    SafeCheckpointHook,
)
from rambo_det.functional import ap_loss, average_precision, blackbox_rank, rank

NAN, INF = float('nan'), float('inf')
LOGITS, LABELS = torch.zeros(4, 3), torch.tensor([0, 1, 2, 3])
FLAGS = torch.eye(4)[:2]


def loss(*args, **kwargs):
    return RaMBOLoss()(*args, **kwargs)


def retina(**loss_cls):
    loss_cls = dict(type='RaMBOLoss', **loss_cls)
    return RaMBORetinaHead(num_classes=3, in_channels=4, loss_cls=loss_cls)


def schedule(**kwargs):
    return RaMBOScheduleHook(**{'param': 'margin', 'start': 0.0, **kwargs})


CASES = {
    # Settings of the loss
    'lambd is NaN': (
        lambda: RaMBOLoss(lambd=NAN),
        ValueError,
        'lambd must be a positive number, got nan',
    ),
    'lambd is infinite': (
        lambda: RaMBOLoss(lambd=INF, perturb='together'),
        ValueError,
        'lambd must be a finite positive number with .*together.*, got inf',
    ),
    'lambd is None': (
        lambda: RaMBOLoss(lambd=None),
        TypeError,
        'lambd must be a positive number, got None',
    ),
    'lambd is a flag': (
        lambda: RaMBOLoss(lambd=True),
        TypeError,
        'lambd must be a positive number, got True',
    ),
    'margin is NaN': (
        lambda: RaMBOLoss(margin=NAN),
        ValueError,
        'margin must be a finite non-negative number, got nan',
    ),
    'margin is a list': (
        lambda: RaMBOLoss(margin=[0.1]),
        TypeError,
        r'margin must be a non-negative number, got \[0.1\]',
    ),
    'memory is a flag': (
        lambda: RaMBOLoss(memory=True),
        ValueError,
        'memory must be a number of steps >= 0, got True',
    ),
    'memory is text': (
        lambda: RaMBOLoss(memory='7'),
        ValueError,
        "memory must be a number of steps >= 0, got '7'",
    ),
    'loss_weight is text': (
        lambda: RaMBOLoss(loss_weight='1'),
        TypeError,
        "loss_weight must be a non-negative number, got '1'",
    ),
    'loss_weight is infinite': (
        lambda: RaMBOLoss(loss_weight=INF),
        ValueError,
        'loss_weight must be a finite non-negative number, got inf',
    ),
    'weight of a term is text': (
        lambda: RaMBOLoss(class_ap=dict(weight='high')),
        TypeError,
        "class_ap.weight must be a non-negative number, got 'high'",
    ),
    'weight of a term is NaN': (
        lambda: RaMBOLoss(pooled_ap=dict(weight=NAN)),
        ValueError,
        'pooled_ap.weight must be a finite non-negative number, got nan',
    ),
    'lambd of a term is negative': (
        lambda: RaMBOLoss(pooled_ap=dict(lambd=-1.0)),
        ValueError,
        'pooled_ap.lambd must be a positive number, got -1.0',
    ),
    'class-wise term spans rows': (
        lambda: RaMBOLoss(class_ap=dict(span='row')),
        ValueError,
        "class_ap has span 'row', expected one of .*'memory', 'batch', 'image'",
    ),
    'span is None': (
        lambda: RaMBOLoss(class_ap=dict(span=None)),
        ValueError,
        'class_ap has span None, expected one of',
    ),
    'both weights are 0': (
        lambda: RaMBOLoss(class_ap=dict(weight=0), pooled_ap=dict(weight=0)),
        ValueError,
        'both terms are switched off; give class_ap or pooled_ap a weight > 0',
    ),
    'scores is None': (
        lambda: RaMBOLoss(scores=None),
        ValueError,
        'scores must be one of .* got None',
    ),
    'log_softmax with use_sigmoid': (
        lambda: RaMBOLoss(scores='log_softmax', use_sigmoid=True),
        ValueError,
        "scores='log_softmax' needs use_sigmoid=False, got True",
    ),
    'auxiliary is a list': (
        lambda: RaMBOLoss(auxiliary=['CrossEntropyLoss']),
        TypeError,
        'auxiliary must be None or the config of a loss',
    ),
    'auxiliary is unknown': (
        lambda: RaMBOLoss(auxiliary=dict(type='CrossEntropy')),
        KeyError,
        'CrossEntropy is not in the .* registry',
    ),
    'argument is misspelled': (
        lambda: MODELS.build(dict(type='RaMBOLoss', lamda=1.0)),
        TypeError,
        "unexpected keyword argument 'lamda'",
    ),
    # Batches
    'a list instead of labels': (
        lambda: loss(LOGITS, [0, 1, 2, 3]),
        TypeError,
        'target must be a tensor of labels, or .* got list',
    ),
    'no labels': (
        lambda: loss(LOGITS, None),
        TypeError,
        'target must be a tensor of labels, or .* got NoneType',
    ),
    'three targets': (
        lambda: loss(LOGITS, (LABELS, LABELS, LABELS)),
        TypeError,
        'target must be a tensor of labels, or .* got tuple',
    ),
    'flags instead of labels': (
        lambda: loss(LOGITS, LABELS > 0),
        TypeError,
        'target must hold integer labels, got torch.bool',
    ),
    'one-hot labels': (
        lambda: loss(LOGITS, torch.eye(4)[:, :3].long()),
        ValueError,
        r'target must have shape \(4,\), one value per row of pred .4, 3.*got .4, 3',
    ),
    'logits in three dimensions': (
        lambda: loss(LOGITS[None], LABELS),
        ValueError,
        r'pred must have shape \(N, C\), got \(1, 4, 3\)',
    ),
    'complex logits': (
        lambda: loss(LOGITS.to(torch.complex64), LABELS),
        TypeError,
        'pred must be floating point, got torch.complex64',
    ),
    'a weight per entry': (
        lambda: loss(LOGITS, LABELS, torch.ones(4, 3)),
        ValueError,
        r'weight must have shape \(4,\).* got \(4, 3\)',
    ),
    'several labels out of range': (
        lambda: loss(LOGITS, torch.tensor([0, 4, 255, -1])),
        ValueError,
        r'got \[-1, 4, 255\]; check num_classes of the head and the classes',
    ),
    'unknown reduction': (
        lambda: loss(LOGITS, LABELS, reduction_override='average'),
        ValueError,
        "reduction_override='average' is not possible",
    ),
    # Heads
    'softmax in a dense head': (
        lambda: rambo_det.RaMBOGFLHead(
            num_classes=3,
            in_channels=4,
            loss_cls=dict(type='RaMBOLoss', scores='softmax', use_sigmoid=False),
        ),
        ValueError,
        "RaMBOGFLHead: loss_cls has scores='softmax', which needs a background",
    ),
    'contradicting columns in a dense head': (
        lambda: retina(scores='logits', use_sigmoid=False),
        ValueError,
        "scores='logits' needs use_sigmoid=True, got False",
    ),
    'bad setting in a dense head': (
        lambda: retina(lambd=-3),
        ValueError,
        'lambd must be a positive number, got -3',
    ),
    # Functions
    'targets of another shape': (
        lambda: average_precision(torch.zeros(2, 4), FLAGS.T),
        ValueError,
        r'targets must have the shape of scores \(2, 4\), got \(4, 2\)',
    ),
    'one sequence without its row': (
        lambda: ap_loss(torch.zeros(4), FLAGS[0], lambd=1.0),
        ValueError,
        r'scores must have 2 dimensions .* scores.unsqueeze\(0\)',
    ),
    'scores are integers': (
        lambda: rank(torch.arange(4)),
        TypeError,
        r'rank: scores must be floating point, got torch.int64; .* scores.float\(\)',
    ),
    'lambd is a tensor': (
        lambda: blackbox_rank(torch.zeros(4), lambd=torch.tensor(1.0)),
        ValueError,
        'lambd must be a positive finite number, got tensor',
    ),
    'margin is NaN in a function': (
        lambda: ap_loss(torch.zeros(2, 4), FLAGS, lambd=1.0, margin=NAN),
        ValueError,
        'margin must be a finite number >= 0, got nan',
    ),
    # Hooks
    'schedule of something else': (
        lambda: schedule(param='memory'),
        ValueError,
        "param must be one of .* got 'memory'",
    ),
    'schedule with NaN': (
        lambda: schedule(start=NAN),
        ValueError,
        'start and end must be finite factors >= 0 of margin .* start=nan',
    ),
    'schedule that ends before it begins': (
        lambda: schedule(begin=5, until=2),
        ValueError,
        'expected 0 <= begin <= until, got begin=5, until=2',
    ),
    'share above 1': (
        lambda: schedule(until=50, unit='training'),
        ValueError,
        'begin and until are shares of the training from 0 to 1, .* until=50',
    ),
    'monitor with interval 0': (
        lambda: RaMBOMonitorHook(interval=0),
        ValueError,
        'interval must be a number of iterations >= 1, got 0',
    ),
    'monitor with half an interval': (
        lambda: RaMBOMonitorHook(interval=0.5),
        ValueError,
        'interval must be a number of iterations >= 1, got 0.5',
    ),
    'monitor with a flag': (
        lambda: HOOKS.build(dict(type='RaMBOMonitorHook', interval=True)),
        ValueError,
        'interval must be a number of iterations >= 1, got True',
    ),
    'safe checkpoints in another storage': (
        lambda: SafeCheckpointHook(backend_args=dict(backend='petrel')),
        ValueError,
        "backend_args must be None, .* got .*'petrel'.* CheckpointHook for other",
    ),
    # Checkpoints
    'memory of something else': (
        lambda: RaMBOLoss(class_ap=dict(span='memory')).set_extra_state(dict(steps=3)),
        ValueError,
        r'the memory in the checkpoint must be .* got dict\(steps=3\); remove the keys',
    ),
    'a function in a checkpoint': (
        lambda: rambo_det.checkpoint._getattr(pickle, 'loads'),
        TypeError,
        'refusing to load getattr.* from a checkpoint',
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_bad_input(name):
    call, error, match = CASES[name]
    with pytest.raises(error, match=match):
        call()


def test_the_cases_are_many_and_distinct():
    assert len(CASES) >= 40
    assert len({match for _, _, match in CASES.values()}) >= 40
