"""Boxes without area, and losses that are not finite, stop a training by name."""

import os
import re
import shutil

import pytest
import torch

from tests.helpers.demo_configs import CE, RAMBO
from tools.dataset_tools.make_demo_voc import generate

pytest.importorskip('mmdet', reason='the hook is registered in mmdet')
from mmdet.models.task_modules import DeltaXYWHBBoxCoder
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from rambo_det import InvalidLossHook
from rambo_det.checkpoint import load_checkpoint
from tests.helpers.processes import run
from tests.helpers.toy_training import Restless, loader

NAN, INF = float('nan'), float('inf')
GOOD = (1, 2, 5, 6)


def sample(name, *boxes, wrap=HorizontalBoxes):
    data = DetDataSample(metainfo=dict(img_path=f'JPEGImages/{name}.jpg'))
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.arange(len(boxes))
    data.gt_instances = InstanceData(bboxes=wrap(tensor), labels=labels)
    return data


class Model(BaseModel):
    """Has in each iteration the losses that it was given."""

    def __init__(self, losses):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.losses = losses
        self.steps = 0

    def forward(self, inputs, data_samples, mode='loss'):
        if mode == 'predict':
            return data_samples
        losses = self.losses.get(self.steps, dict(loss_cls=1.0, loss_bbox=1.0))
        self.steps += 1
        return {name: value * self.weight for name, value in losses.items()}


def runner_of(model, hook, work_dir, samples=None, **settings):
    data = [
        dict(inputs=torch.zeros(1), data_samples=s)
        for s in samples or [sample(f'{i:03d}', GOOD) for i in range(16)]
    ]
    settings.setdefault('train_cfg', dict(by_epoch=False, max_iters=8))
    checkpoint = settings.pop('checkpoint', dict(by_epoch=False, interval=2))
    checkpoint = dict(dict(type='CheckpointHook'), **checkpoint)
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            dataset=data,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        ),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[dict(type='InvalidLossHook', **hook), *settings.pop('hooks', ())],
        default_hooks=dict(checkpoint=checkpoint),
        default_scope='mmdet',
        experiment_name=work_dir.name,
        log_level='ERROR',
        **settings,
    )


@pytest.mark.parametrize(
    ('interval', 'by_epoch', 'value'),
    [(1, False, NAN), (3, False, INF), (100, False, NAN), (3, True, -INF)],
)
def test_the_first_invalid_loss_is_named_with_its_images(
    tmp_path, interval, by_epoch, value
):
    model = Model({4: dict(loss_cls=1.0, loss_bbox=value, acc=NAN)})
    if by_epoch:
        settings = dict(train_cfg=dict(by_epoch=True, max_epochs=2))
        settings['checkpoint'] = dict(interval=1)
    else:
        settings = {}
    runner = runner_of(model, dict(interval=interval), tmp_path, **settings)
    with pytest.raises(FloatingPointError) as error:
        runner.train()
    message = str(error.value)
    assert f'in iteration 5 loss_bbox = {value}. The images of the batch' in message
    assert re.findall(r'\d{3}\.jpg', message) == ['008.jpg', '009.jpg']
    assert 'All boxes of the batch have an area' in message
    assert 'tools/dataset_tools/check_voc.py' in message
    saved = sorted(path.name for path in tmp_path.glob('*.pth'))
    assert saved == ([] if by_epoch else ['iter_2.pth', 'iter_4.pth'])


@pytest.mark.parametrize('interval', [1, 100])
def test_the_only_checkpoint_survives(tmp_path, interval):
    """CheckpointHook deletes an old one before it writes; a NaN must stop both."""
    model = Model({4: dict(loss_cls=NAN)})
    checkpoint = dict(by_epoch=False, interval=2, max_keep_ckpts=1)
    runner = runner_of(model, dict(interval=interval), tmp_path, checkpoint=checkpoint)
    with pytest.raises(FloatingPointError, match='iteration 5 loss_cls = nan'):
        runner.train()
    (kept,) = tmp_path.glob('*.pth')
    assert kept.name == 'iter_4.pth'
    weights = torch.load(kept, weights_only=False)['state_dict']
    assert weights['weight'].isfinite()


EXACT = [dict(type='ExactResumeHook')]
KEEP_ONE = dict(interval=1, max_keep_ckpts=1)
EPOCHS = dict(train_cfg=dict(by_epoch=True, max_epochs=3))
VALIDATED = dict(
    train_cfg=dict(by_epoch=False, max_iters=8, val_interval=4),
    val_dataloader=loader([dict(inputs=torch.zeros(1), data_samples=torch.zeros(1))]),
    val_cfg=dict(),
    val_evaluator=[Restless()],
)
BEST = dict(interval=99, by_epoch=False, save_best='score', rule='greater')
# The step in which the second process has NaN, the settings, and which file is left.
IN_TWO = [
    (step, dict(settings, checkpoint=dict(saving, type=f'{safe}CheckpointHook')), *rest)
    for step, settings, saving, left in [
        (7, EPOCHS, KEEP_ONE, ['epoch_1.pth']),
        (3, {}, dict(KEEP_ONE, by_epoch=False), ['iter_3.pth']),
        (3, VALIDATED, BEST, []),
    ]
    for safe, *rest in [
        ('', left, 1, []),
        ('', left, 99, EXACT),
        ('Safe', left, 99, []),
    ]
]


def error_of(rank, work_dir, model, hook, samples=None, **settings):
    """Train in one of several processes; return why it stopped."""
    os.environ.update(LOCAL_RANK=str(rank))
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
    process = dict(launcher='pytorch', cfg=dict(model_wrapper_cfg=wrapper))
    runner = runner_of(model, hook, work_dir, samples, **settings, **process)
    try:
        runner.train()
    except (FloatingPointError, ValueError) as error:
        return f'{type(error).__name__}: {error}'


def invalid_in_the_second(rank, folder):
    messages = []
    for number, (step, settings, _, interval, hooks) in enumerate(IN_TWO):
        model = Model({step: dict(loss_cls=NAN)} if rank == 1 else {})
        hook, work_dir = dict(interval=interval), folder / f'work_{number}'
        found = error_of(rank, work_dir, model, hook, hooks=hooks, **settings)
        messages.append(found)
    samples = [sample(f'{i:03d}', GOOD) for i in range(16)]
    samples[5] = sample('005', (3, 3, 3, 3))  # of its second step
    messages.append(error_of(rank, folder / 'boxes', Model({}), {}, samples))
    return messages


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    """The folder, and the errors of two trainings of which the second one's is bad."""
    folder = tmp_path_factory.mktemp('stopped')
    return folder, run(invalid_in_the_second, 2, folder, folder)


def test_all_processes_stop_before_the_only_checkpoint_is_replaced(stopped):
    folder, found = stopped
    assert all(len(messages) == len(IN_TWO) + 1 for messages in found)
    cases = enumerate(zip(IN_TWO, *found))
    for number, ((step, _, left, *_), message, own) in cases:
        assert 'a loss of process 1 is not finite' in message
        assert f'in iteration {step + 1} loss_cls = nan. The images' in own
        files = [*(folder / f'work_{number}').glob('*.pth')]
        assert [path.name for path in files] == left
        for path in files:
            assert load_checkpoint(path)['state_dict']['weight'].isfinite()


def test_all_processes_stop_before_a_step_with_a_bad_box_in_one(stopped):
    message, own = (messages[-1] for messages in stopped[1])
    begin = 'ValueError: InvalidLossHook: iteration 2 was not begun, because boxes '
    assert message.startswith(f'{begin}of process 1 have no positive area')
    assert own.startswith(begin) and '005.jpg: class 0, (3, 3, 3, 3)' in own


def test_a_total_that_overflows_is_named_itself(tmp_path):
    model = Model({1: dict(loss_cls=3e38, loss_bbox=3e38)})
    with pytest.raises(FloatingPointError, match=r'iteration 2 loss = inf\.'):
        runner_of(model, {}, tmp_path).train()


def test_infinite_gradients_are_no_error(tmp_path):
    """As AMP's loss scaling has them now and then, and skips the step."""
    model = Model({})
    model.weight.register_hook(lambda grad: grad * INF if model.steps == 4 else grad)
    runner = runner_of(model, {}, tmp_path)
    step = runner.optim_wrapper
    if isinstance(step, dict):
        runner.optim_wrapper = step = runner.build_optim_wrapper(step)
    update = step.optimizer.step

    def skip(*args, **kwargs):
        if model.weight.grad.isfinite():
            update(*args, **kwargs)

    step.optimizer.step = skip
    runner.train()
    assert model.steps == 8 and model.weight.isfinite()


BAD = dict(
    zero=((5, 5, 5, 9), '(5, 5, 5, 9)'),
    inverted=((9, 1, 5, 6), '(9, 1, 5, 6)'),
    nan=((NAN, 1, 5, 6), '(nan, 1, 5, 6)'),
    inf=((1, 1, INF, 6), '(1, 1, inf, 6)'),
)


@pytest.mark.parametrize('wrap', [HorizontalBoxes, torch.Tensor])
@pytest.mark.parametrize('kind', BAD)
def test_a_bad_box_stops_before_its_step(tmp_path, kind, wrap):
    box, shown = BAD[kind]
    samples = [sample(f'{i:03d}', GOOD, wrap=wrap) for i in range(16)]
    samples[5] = sample('005', GOOD, box, wrap=wrap)
    model = Model({})
    with pytest.raises(ValueError) as error:
        runner_of(model, {}, tmp_path, samples).train()
    assert model.steps == 2
    message = str(error.value)
    assert f'JPEGImages/005.jpg: class 1, {shown}' in message
    assert 'iteration 3 was not begun' in message
    assert (
        'tools/dataset_tools/check_voc.py' in message and 'FilterAnnotations' in message
    )
    assert re.findall(r'\d{3}\.jpg', message) == ['005.jpg']


def test_the_message_does_not_grow_without_end(tmp_path):
    samples = [sample('000', *[(1, 1, 1, 1)] * 14), sample('001')]
    with pytest.raises(ValueError, match='and 4 more') as error:
        runner_of(Model({}), {}, tmp_path, samples).train()
    assert str(error.value).count('000.jpg') == 10


def test_without_the_check_the_loss_names_the_box(tmp_path):
    samples = [sample('000', GOOD), sample('001', (3, 3, 3, 3))]
    model = Model({0: dict(loss_bbox=NAN)})
    settings = dict(train_cfg=dict(by_epoch=False, max_iters=1))
    unchecked = dict(check_boxes=False)
    runner = runner_of(model, unchecked, tmp_path, samples, **settings)
    with pytest.raises(FloatingPointError, match='likely cause') as error:
        runner.train()
    assert '001.jpg: class 0, (3, 3, 3, 3)' in str(error.value)
    # The box itself is no error then.
    model = Model({})
    runner_of(model, unchecked, tmp_path / 'b', samples, **settings).train()
    assert model.steps == 1


def test_images_without_objects_and_other_batches_pass():
    hook = InvalidLossHook()
    hook.before_train_iter(None, 0, None)
    hook.before_train_iter(None, 0, (torch.zeros(2), torch.zeros(2)))
    hook.before_train_iter(None, 0, dict(data_samples=[sample('000')]))
    bare = DetDataSample()
    hook.before_train_iter(None, 0, dict(data_samples=[bare]))
    branches = dict(sup=[sample('000', GOOD)], unsup=[bare])
    hook.before_train_iter(None, 0, dict(data_samples=branches))


# A detector that meets such boxes.


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes') / 'data'
    generate(root, 8, 2)
    return root


CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')
BOXES = dict(
    zero=(40, 30, 40, 30), inverted=(60, 60, 40, 30), outside=(170, 20, 220, 60)
)


def damage(shapes, tmp_path, *boxes):
    """Copy the data; the first object of each training image gets one of the boxes."""
    root = tmp_path / 'data'
    shutil.copytree(shapes, root)
    for number in range(1, 9):
        path = root / 'Annotations' / f'{number:06d}.xml'
        content = path.read_text()
        tags = (
            f'<{key}>{value}</{key}>'
            for key, value in zip(CORNERS, boxes[number % len(boxes)])
        )
        content = re.sub('<xmin>.*?</ymax>', ''.join(tags), content, count=1)
        path.write_text(content.replace('<difficult>1', '<difficult>0'))
    return root


FILTER = dict(type='FilterAnnotations', min_gt_bbox_wh=(0, 0), keep_empty=False)
RESIZE = dict(type='Resize', scale_factor=1.0)
# What is between loading and flipping.
PIPELINES = dict(none=[RESIZE], before=[FILTER, RESIZE], after=[RESIZE, FILTER])


def train_demo(root, work_dir, pipeline, config=CE, **hook):
    """Train the demo's detector for two steps."""
    register_all_modules()
    cfg = Config.fromfile(config)
    cfg.custom_hooks = []
    cfg.work_dir = str(work_dir)
    dataset = cfg.train_dataloader.dataset
    dataset.data_root = str(root)
    dataset.pipeline[2:2] = PIPELINES[pipeline]
    cfg.train_dataloader.batch_size = 4
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1)
    for part in ('val', 'test'):
        for key in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{part}_{key}'] = None
    cfg.default_hooks.invalid_loss = dict(type='InvalidLossHook', **hook)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=5)
    cfg.experiment_name = work_dir.name
    cfg.log_level = 'ERROR'
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def test_a_detector_stops_before_the_first_step(shapes, tmp_path):
    root = damage(shapes, tmp_path, *BOXES.values())
    with pytest.raises(ValueError, match='iteration 1 was not begun') as error:
        train_demo(root, tmp_path / 'work', 'none')
    # All four of the batch.
    assert len(re.findall(r'/JPEGImages/00000\d\.jpg: class \d', str(error.value))) == 4


@pytest.mark.slow
@pytest.mark.parametrize('box', ['zero', 'outside'])
def test_such_a_box_is_what_makes_the_loss_nan(shapes, tmp_path, box):
    root = damage(shapes, tmp_path, BOXES[box])
    with pytest.raises(FloatingPointError, match='likely cause') as error:
        train_demo(root, tmp_path / 'work', 'none', check_boxes=False)
    message = str(error.value)
    assert re.search(r'loss_(rpn_)?bbox = (nan|inf)', message)
    assert re.search(r'/JPEGImages/00000\d\.jpg: class \d', message)


@pytest.mark.slow
def test_an_inverted_box_stops_a_cpu_without_a_name_and_is_nan_elsewhere(
    shapes, tmp_path
):
    root = damage(shapes, tmp_path, BOXES['inverted'])
    with pytest.raises(RuntimeError, match='ROIAlign'):
        train_demo(root, tmp_path / 'work', 'none', check_boxes=False)
    anchor = torch.tensor([[30.0, 20.0, 70.0, 60.0]])
    delta = DeltaXYWHBBoxCoder().encode(anchor, torch.tensor([BOXES['inverted']]))
    assert delta.isnan().any()


@pytest.mark.slow
def test_filtering_after_the_resize_trains_with_them(shapes, tmp_path):
    root = damage(shapes, tmp_path, *BOXES.values())
    runner = train_demo(root, tmp_path / 'work', 'after', RAMBO)
    assert runner.iter == 2
    for parameter in runner.model.parameters():
        assert parameter.isfinite().all()


def test_filtering_before_the_resize_does_not_see_boxes_outside(shapes, tmp_path):
    root = damage(shapes, tmp_path, BOXES['outside'])
    with pytest.raises(ValueError, match='iteration 1 was not begun'):
        train_demo(root, tmp_path / 'work', 'before')
