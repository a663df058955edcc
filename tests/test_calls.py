"""Several calls of one loss: deferred and ranked together, or refused."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip('mmdet', reason='RaMBOLoss is registered in mmdet')
from rambo_det import RaMBOLoss

PLAIN = dict(
    margin=0.3, margin_noise=False, memory=0, class_ap=dict(span='batch'), lambd=2.0
)


def rows(count, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(count, classes, generator=generator).requires_grad_()
    return pred, torch.randint(0, classes + 1, (count,), generator=generator)


@settings(max_examples=40)
@given(data=st.data())
def test_deferred_calls_are_one_call(data):
    counts = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    total = sum(counts)
    pred, target = rows(total, data.draw(st.integers(0, 10**6)))
    index = torch.tensor(
        data.draw(st.lists(st.integers(0, 2), min_size=total, max_size=total)),
        dtype=torch.long,
    )
    weight = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=total, max_size=total))
    ).reshape(-1)
    without = data.draw(st.integers(0, len(counts)))  # a call that gives no weights
    loss_cls = RaMBOLoss(**PLAIN)
    splits = list(zip(*(t.split(counts) for t in (pred, target, weight))))
    with loss_cls.deferred() as calls:
        for place, (p, t, w) in enumerate(splits):
            if place == without:
                w.fill_(1)
            zero = loss_cls(p, t, None if place == without else w, avg_factor=3.0)
            assert zero == 0 and zero.requires_grad
    joint = loss_cls.joint(calls, index, 3)
    (gradient,) = torch.autograd.grad(joint, pred)

    single = RaMBOLoss(**PLAIN)
    with single.images(index, 3):
        expected = single(pred, target, weight)
    assert joint == expected
    assert torch.equal(gradient, torch.autograd.grad(expected, pred)[0])


def test_deferring_ends_also_after_an_error_and_nests():
    loss_cls = RaMBOLoss(**PLAIN)
    with loss_cls.deferred() as outer:
        with pytest.raises(RuntimeError), loss_cls.deferred():
            loss_cls(*rows(3))
            raise RuntimeError
        loss_cls(*rows(4))
        assert loss_cls.get_accuracy(None, None) == {}
    assert len(outer) == 1
    loss = loss_cls(*rows(8))
    assert loss > 0
    assert loss_cls.get_accuracy(None, None) != {}


def test_a_joint_call_is_one_step_of_the_memory():
    loss_cls = RaMBOLoss(memory=3, class_ap=dict(span='memory'))
    for _ in range(2):
        with loss_cls.deferred() as calls:
            loss_cls(*rows(4))
            loss_cls(*rows(2))
        loss_cls.joint(calls, torch.zeros(6).long(), 1)
    assert [len(s) for s in loss_cls.get_extra_state()['scores']] == [6, 6]


def test_no_calls_cannot_be_ranked():
    with pytest.raises(ValueError, match='at least one recorded call'):
        RaMBOLoss().joint([], torch.zeros(0), 1)


def test_wrong_shapes_are_named_where_they_come_from():
    loss_cls = RaMBOLoss(**PLAIN)
    pred, _ = rows(4)
    with loss_cls.deferred(), pytest.raises(ValueError, match=r'target must have'):
        loss_cls(pred, torch.zeros(3).long())


def test_quality_targets_are_ranked_by_their_labels():
    loss_cls = RaMBOLoss(**PLAIN)
    pred, target = rows(9)
    with_quality = loss_cls(pred, (target, torch.rand(9)))
    assert with_quality == loss_cls(pred, target)
    for wrong in ([target, target, target], 3):
        with pytest.raises(TypeError, match=r'target must be a tensor of labels, or'):
            loss_cls(pred, wrong)


# Calls that ought to have been one


BATCH = dict(PLAIN, pooled_ap=dict(span='batch'))


def test_two_calls_of_other_sizes_before_backward_are_refused():
    loss_cls = RaMBOLoss(**BATCH)
    first = loss_cls(*rows(8))
    with pytest.raises(RuntimeError, match=r'with 8 rows and, before backward, with 4'):
        loss_cls(*rows(4))
    assert first > 0


def test_a_scaled_result_still_waits_for_backward():
    """As where a head weights each level and drops what the loss returned."""
    loss_cls = RaMBOLoss(**BATCH)
    scaled = [loss_cls(*rows(8)) * 2.0]
    with pytest.raises(RuntimeError, match='before backward'):
        loss_cls(*rows(4))
    scaled.pop().backward()


def test_calls_that_may_differ_in_size():
    loss_cls = RaMBOLoss(**BATCH)
    for count in (8, 4):  # step after step
        loss = loss_cls(*rows(count))
        loss.backward()
    loss = loss_cls(*rows(7))
    del loss  # dropped without backward
    keep = [loss_cls(*rows(5)), loss_cls(*rows(5))]  # decoder layers
    with torch.no_grad():
        keep.append(loss_cls(*rows(3)))
    for image, count in enumerate((6, 2)):  # those that know their images
        with loss_cls.images(torch.zeros(count).long(), 1):
            keep.append(loss_cls(*rows(count, seed=image)))
    assert len(keep) == 5


def test_copies_and_pickles_have_no_open_calls():
    loss_cls = RaMBOLoss(**BATCH)
    first = loss_cls(*rows(8))
    for other in (copy.deepcopy(loss_cls), pickle.loads(pickle.dumps(loss_cls))):
        assert other(*rows(4)) > 0
    assert first > 0
