"""Bad input of every kind, and the error that each gives.

Here are the calls that no other test makes. Those of the functions are also in
``test_average_precision.py`` and ``test_ranking.py``, of the schedules in
``test_hooks.py``, of the heads in ``test_dense_heads.py`` and ``test_query_heads.py``,
and damaged checkpoints in ``test_resume.py``.
"""

import pickle
import re

import pytest
import torch

pytest.importorskip('mmdet', reason='the heads are registered in mmdet')
from mmdet.registry import HOOKS, MODELS

import rambo_det
from rambo_det import (
    InvalidLossHook,
    RaMBOLoss,
    RaMBOMonitorHook,
    RaMBORetrievalLoss,
    RaMBOScheduleHook,
    SafeCheckpointHook,
)
from rambo_det.functional import ap_loss, average_precision, blackbox_rank, rank


def loss(pred=None, target=None, weight=None, **given):
    """Call the loss, with logits and labels of four rows unless given."""
    pred = torch.zeros(4, 3) if pred is None else pred
    target = torch.tensor([0, 1, 2, 3]) if target is None else target
    return RaMBOLoss()(pred, target, weight, **given)


def softmax(*args):
    return RaMBOLoss(scores='softmax', use_sigmoid=False)(*args)


def dense(name, **loss_cls):
    loss_cls = dict(type='RaMBOLoss', **loss_cls)
    return getattr(rambo_det, name)(num_classes=3, in_channels=4, loss_cls=loss_cls)


def schedule(**kwargs):
    return RaMBOScheduleHook(**{'param': 'margin', 'start': 0.0, **kwargs})


# A call, and below it the error, where … stands for anything.
CASES = """
RaMBOLoss(lambd=0)
    ValueError: lambd must be a positive number, got 0
RaMBOLoss(lambd=NAN)
    ValueError: lambd must be a positive number, got nan
RaMBOLoss(lambd=INF, perturb='together')
    ValueError: lambd must be a finite positive number with perturb='together', got inf
RaMBOLoss(perturb='together')
    ValueError: lambd must be a finite positive number with perturb='together', got inf
RaMBOLoss(perturb='alone')
    ValueError: perturb must be one of … got 'alone'
RaMBOLoss(lambd='1')
    TypeError: lambd must be a positive number, got '1'
RaMBOLoss(lambd=None)
    TypeError: lambd must be a positive number, got None
RaMBOLoss(lambd=True)
    TypeError: lambd must be a positive number, got True
RaMBOLoss(margin=-1)
    ValueError: margin must be a finite non-negative number, got -1
RaMBOLoss(margin=NAN)
    ValueError: margin must be a finite non-negative number, got nan
RaMBOLoss(margin=[0.1])
    TypeError: margin must be a non-negative number, got [0.1]
RaMBOLoss(memory=-1)
    ValueError: memory must be a number of steps >= 0, got -1
RaMBOLoss(memory=1.5)
    ValueError: memory must be a number of steps >= 0, got 1.5
RaMBOLoss(memory=True)
    ValueError: memory must be a number of steps >= 0, got True
RaMBOLoss(memory='7')
    ValueError: memory must be a number of steps >= 0, got '7'
RaMBOLoss(loss_weight=-1)
    ValueError: loss_weight must be a finite non-negative number, got -1
RaMBOLoss(loss_weight='1')
    TypeError: loss_weight must be a non-negative number, got '1'
RaMBOLoss(loss_weight=INF)
    ValueError: loss_weight must be a finite non-negative number, got inf
RaMBOLoss(class_ap=dict(weight='high'))
    TypeError: class_ap.weight must be a non-negative number, got 'high'
RaMBOLoss(class_ap=dict(weight=-1, span='batch'))
    ValueError: class_ap.weight must be a finite non-negative number, got -1
RaMBOLoss(pooled_ap=dict(weight=NAN))
    ValueError: pooled_ap.weight must be a finite non-negative number, got nan
RaMBOLoss(pooled_ap=dict(lambd=-1.0))
    ValueError: pooled_ap.lambd must be a positive number, got -1.0
RaMBOLoss(class_ap=dict(weight=1, span='batch', lambd=0))
    ValueError: class_ap.lambd must be a positive number, got 0
RaMBOLoss(class_ap=dict(span='row'))
    ValueError: class_ap has span 'row', expected one of …'memory', 'batch', 'image'
RaMBOLoss(class_ap=dict(span='x'))
    ValueError: class_ap has span 'x', expected one of
RaMBOLoss(class_ap=dict(span=None))
    ValueError: class_ap has span None, expected one of
RaMBOLoss(pooled_ap=dict(weight=1, span='memory'))
    ValueError: pooled_ap has span 'memory', expected one of
RaMBOLoss(pooled_ap=dict(weight=1, spam='batch'))
    ValueError: spam
RaMBOLoss(class_ap=0.5)
    TypeError: class_ap must be None or dict
RaMBOLoss(class_ap=None, pooled_ap=None)
    ValueError: both terms are switched off
RaMBOLoss(class_ap=dict(weight=0), pooled_ap=dict(weight=0))
    ValueError: both terms are switched off; give class_ap or pooled_ap a weight > 0
RaMBOLoss(scores=None)
    ValueError: scores must be one of … got None
RaMBOLoss(scores='probs')
    ValueError: scores must be one of … got 'probs'
RaMBOLoss(scores='softmax')
    ValueError: scores='softmax' needs use_sigmoid=False, got True
RaMBOLoss(scores='log_softmax', use_sigmoid=True)
    ValueError: scores='log_softmax' needs use_sigmoid=False, got True
RaMBOLoss(use_sigmoid=False)
    ValueError: scores='logits' needs use_sigmoid=True, got False
RaMBOLoss(auxiliary='CrossEntropyLoss')
    TypeError: auxiliary must be None or the config of a loss
RaMBOLoss(auxiliary=['CrossEntropyLoss'])
    TypeError: auxiliary must be None or the config of a loss
RaMBOLoss(auxiliary=dict(type='CrossEntropyLoss'))
    ValueError: use_sigmoid=True
RaMBOLoss(auxiliary=dict(type='CrossEntropy'))
    KeyError: CrossEntropy is not in the … registry
RaMBOLoss(gather='yes')
    TypeError: gather must be True, False or None…got 'yes
MODELS.build(dict(type='RaMBOLoss', lamda=1.0))
    TypeError: unexpected keyword argument 'lamda'

loss(target=[0, 1, 2, 3])
    TypeError: target must be a tensor of labels, or … got list
RaMBOLoss()(torch.zeros(4, 3), None)
    TypeError: target must be a tensor of labels, or … got NoneType
loss(target=(LABELS, LABELS, LABELS))
    TypeError: target must be a tensor of labels, or … got tuple
loss(target=LABELS > 0)
    TypeError: target must hold integer labels, got torch.bool
loss(target=torch.zeros(4))
    TypeError: target must hold integer labels, got torch.float32
loss(target=torch.eye(4)[:, :3].long())
    ValueError: target must have shape (4,), one value per row of pred (4, 3)…got (4, 3)
loss(target=torch.zeros(3).long())
    ValueError: target must have shape (4,)…got (3,)
loss(torch.zeros(4))
    ValueError: pred must have shape (N, C), got (4,)
loss(torch.zeros(4, 0))
    ValueError: got (4, 0)
loss(torch.zeros(1, 4, 3))
    ValueError: pred must have shape (N, C), got (1, 4, 3)
loss(torch.zeros(4, 3).to(torch.complex64))
    TypeError: pred must be floating point, got torch.complex64
loss(torch.zeros(4, 3).long())
    TypeError: pred must be floating point, got torch.int64
loss(torch.full((4, 3), NAN))
    ValueError: pred contains NaN (12 of 12 entries)
loss(weight=torch.ones(2))
    ValueError: weight must have shape (4,)… got (2,)
loss(weight=torch.ones(4, 3))
    ValueError: weight must have shape (4,)… got (4, 3)
loss(torch.zeros(4, 2), torch.full((4,), 3))
    ValueError: C = 2…got [3]
loss(target=torch.tensor([0, 4, 255, -1]))
    ValueError: got [-1, 4, 255]; check num_classes of the head and the classes
loss(reduction_override='none')
    ValueError: no loss per row
loss(reduction_override='average')
    ValueError: reduction_override='average' is not possible
softmax(torch.zeros(4, 1), torch.zeros(4).long())
    ValueError: C + 1 columns for softmax
loss(images=torch.zeros(3).long())
    ValueError: images must have shape (4,), … got (3,)
loss(images=torch.zeros(4, 5).long())
    ValueError: images must have shape (4,), … got (4, 5)
loss(images=torch.arange(4) - 1)
    ValueError: images must hold … >= 0, got -1 to 2
loss(images=(torch.arange(4), 3))
    ValueError: images must hold … 0..2, got 0 to 3
loss(images=torch.zeros(4))
    TypeError: images must hold integer … got torch.float32
loss(images=[0, 0, 1, 1])
    TypeError: images must hold integer … got list

dense('RaMBOGFLHead', scores='softmax', use_sigmoid=False)
    ValueError: RaMBOGFLHead: loss_cls has scores='softmax', which needs a background
dense('RaMBORetinaHead', scores='logits', use_sigmoid=False)
    ValueError: scores='logits' needs use_sigmoid=True, got False
dense('RaMBORetinaHead', lambd=-3)
    ValueError: lambd must be a positive number, got -3

average_precision(torch.zeros(2, 4), torch.eye(4)[:, :2])
    ValueError: targets must have the shape of scores (2, 4), got (4, 2)
ap_loss(torch.zeros(4), torch.eye(4)[0], lambd=1.0)
    ValueError: scores must have 2 dimensions … scores.unsqueeze(0)
rank(torch.arange(4))
    TypeError: rank: scores must be floating point, got torch.int64; … scores.float()
blackbox_rank(torch.zeros(4), lambd=torch.tensor(1.0))
    ValueError: lambd must be a positive finite number, got tensor
ap_loss(torch.zeros(2, 4), torch.eye(4)[:2], lambd=1.0, margin=NAN)
    ValueError: margin must be a finite number >= 0, got nan

schedule(param='memory')
    ValueError: param must be one of … got 'memory'
schedule(start=NAN)
    ValueError: start and end must be finite factors >= 0 of margin … start=nan
schedule(begin=5, until=2)
    ValueError: expected 0 <= begin <= until, got begin=5, until=2
schedule(until=50, unit='training')
    ValueError: begin and until are shares of the training from 0 to 1, … until=50
RaMBOMonitorHook(interval=0)
    ValueError: interval must be a number of iterations >= 1, got 0
RaMBOMonitorHook(interval=0.5)
    ValueError: interval must be a number of iterations >= 1, got 0.5
HOOKS.build(dict(type='RaMBOMonitorHook', interval=True))
    ValueError: interval must be a number of iterations >= 1, got True
InvalidLossHook(0)
    ValueError: interval must be … got 0
InvalidLossHook(-1)
    ValueError: interval must be … got -1
InvalidLossHook(1.5)
    ValueError: interval must be … got 1.5
InvalidLossHook(True)
    ValueError: interval must be … got True
InvalidLossHook(None)
    ValueError: interval must be … got None
SafeCheckpointHook(backend_args=dict(backend='petrel'))
    ValueError: backend_args must be None, … got …'petrel'… CheckpointHook for other
RaMBORetrievalLoss(metric='map')
    ValueError: RaMBORetrievalLoss: metric must be one of ('recall', 'ap'), got 'map'
RaMBORetrievalLoss(similarity='dot')
    ValueError: similarity must be one of ('cosine', 'euclidean'), got 'dot'
RaMBORetrievalLoss(weighting='sqrt')
    ValueError: weighting must be one of ('log', 'loglog'), got 'sqrt'
RaMBORetrievalLoss(gather=None)
    ValueError: gather must be one of (True, False), got None
RaMBORetrievalLoss(perturb='together')
    ValueError: lambd must be a finite positive number with perturb='together', got inf
RaMBORetrievalLoss(margin=-0.1)
    ValueError: RaMBORetrievalLoss: margin must be a finite non-negative number, got
RaMBORetrievalLoss(memory=0.5)
    ValueError: RaMBORetrievalLoss: memory must be a number of steps >= 0, got 0.5
RaMBORetrievalLoss(hard_mining=True)
    TypeError: unexpected keyword argument 'hard_mining'. A config that inherits
RaMBORetrievalLoss()(torch.zeros(4, 3), [0, 1, 2, 3])
    TypeError: RaMBORetrievalLoss: labels must hold integer labels, got list
RaMBORetrievalLoss()(torch.zeros(4, 3), torch.arange(3))
    ValueError: labels must have shape (4,), one value per row of feats (4, 3), got (3,)
RaMBORetrievalLoss()([[1.0]], torch.arange(1))
    TypeError: feats must be a tensor of embeddings, got list
RaMBORetrievalLoss()(torch.zeros(4, 3).long(), LABELS)
    TypeError: feats must be floating point, got torch.int64
RaMBORetrievalLoss()(torch.zeros(4), LABELS)
    ValueError: feats must have shape (N, D), got (4,)
RaMBORetrievalLoss()(torch.zeros(4, 1), LABELS)
    ValueError: feats has one column, … use similarity='euclidean' or more out_channels
RaMBORetrievalLoss()(torch.full((4, 2), NAN), LABELS)
    ValueError: feats contains NaN or infinity in 4 of 4 rows: training has diverged
RaMBORetrievalLoss(memory=1).set_extra_state(dict(steps=3))
    ValueError: RaMBORetrievalLoss: the memory in the checkpoint must be … got dict
RaMBOLoss(class_ap=dict(span='memory')).set_extra_state(dict(steps=3))
    ValueError: the memory in the checkpoint must be … got dict(steps=3); remove the
rambo_det.safe_pickle._getattr(pickle, 'loads')
    UnpicklingError: refusing to load getattr…'loads'
"""
LINES = [line for line in CASES.splitlines() if line]
NAMES = {
    **dict(ap_loss=ap_loss, average_precision=average_precision, rank=rank),
    **dict(blackbox_rank=blackbox_rank, loss=loss, softmax=softmax, dense=dense),
    **dict(schedule=schedule, rambo_det=rambo_det, torch=torch, pickle=pickle),
    **dict(MODELS=MODELS, HOOKS=HOOKS, RaMBOLoss=RaMBOLoss, NAN=float('nan')),
    **dict(RaMBOMonitorHook=RaMBOMonitorHook, SafeCheckpointHook=SafeCheckpointHook),
    **dict(InvalidLossHook=InvalidLossHook, INF=float('inf')),
    'LABELS': torch.arange(4),
    'RaMBORetrievalLoss': RaMBORetrievalLoss,
}


@pytest.mark.parametrize('call, error', [*zip(LINES[::2], LINES[1::2])])
def test_bad_input(call, error):
    kind, _, said = error.strip().partition(': ')
    match = '.*'.join(map(re.escape, said.split('…')))
    with pytest.raises(Exception, match=match) as raised:
        eval(call, NAMES)
    assert type(raised.value).__name__ == kind


def test_the_cases_are_many_and_distinct():
    assert len(LINES) == 2 * len({*LINES[::2]}) > 160
