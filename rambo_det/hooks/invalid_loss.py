"""Stop a training whose loss is NaN, and say which images did it."""

import math
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from mmdet.registry import HOOKS
from mmdet.structures.bbox import get_box_tensor
from mmengine.hooks import CheckpointHook, Hook
from torch import Tensor

_SHOWN = 10  # boxes or images in a message


class _Step(NamedTuple):
    """What is kept of an iteration until its losses are read."""

    iteration: int
    names: Tuple[str, ...]
    values: Tensor
    samples: List[Any]


def _samples(batch: Any) -> List[Any]:
    """Return the data samples of a batch; those of all branches, where it has some."""
    found = batch.get('data_samples') if isinstance(batch, dict) else None
    if isinstance(found, dict):
        return [sample for branch in found.values() for sample in branch]
    return list(found or [])


def _file(sample: Any) -> str:
    return str(sample.get('img_path', 'an image without img_path'))


def _bad_boxes(samples: List[Any], only_cpu: bool) -> Iterator[Tuple[str, str]]:
    """Yield the file and a description of each box without a positive, finite area."""
    for sample in samples:
        truth = sample.get('gt_instances')
        if truth is None or 'bboxes' not in truth:
            continue
        boxes = get_box_tensor(truth.bboxes).detach()
        if (
            boxes.ndim != 2
            or boxes.size(1) != 4
            or (only_cpu and boxes.device.type != 'cpu')
        ):
            continue
        # NaN compares false, and inf - inf is NaN, so that both count as bad here.
        sides = boxes[:, 2:] - boxes[:, :2]
        good = ((sides > 0) & (sides < math.inf)).all(dim=1)
        if good.all():
            continue
        labels = truth.labels if 'labels' in truth else [None] * len(boxes)
        for box, label, fine in zip(boxes.tolist(), labels, good.tolist()):
            if not fine:
                corners = ', '.join(f'{corner:g}' for corner in box)
                yield _file(sample), f'class {label}, ({corners})'


def _list(lines: List[str]) -> str:
    more = [f'and {len(lines) - _SHOWN} more'] if len(lines) > _SHOWN else []
    return ''.join(f'\n  {line}' for line in lines[:_SHOWN] + more)


@HOOKS.register_module()
class InvalidLossHook(Hook):
    """Stop at a box that would make the loss NaN, and at a loss that is NaN or inf.

    Boxes are looked at before each step, where they are still on the CPU, after the
    whole pipeline of the data: one without a positive area is an error before it can
    destroy the weights. Losses are looked at after the step. The weights in memory are
    then lost, but no checkpoint: all losses are read before one is written or replaced,
    so that what is on the disk is from before.

    mmdet's ``CheckInvalidLossHook`` looks at the total of every 50th iteration and
    names nothing. This one names the losses, the images of the first iteration in which
    one was not finite, and their boxes.

    With mixed precision, gradients of the scaled loss may be inf in some steps, which
    the scaler skips. That is normal and no error here; the losses themselves are not
    scaled.

    Args:
        interval (int): Losses are read every so many iterations, at the end, and before
            a checkpoint. Reading waits for the GPU. With 1 this adds no wait where
            mmengine's ``RuntimeInfoHook`` runs, as it does by default: it reads all
            losses in each iteration. The message names the right images with any
            interval. Defaults to 1.
        check_boxes (bool): Stop at a box without a positive area before the step.
            Switch it off for a loss that such boxes do no harm. Defaults to True.

    Raises:
        ValueError: If ``interval`` is not a positive integer, or at such a box.
        FloatingPointError: If a loss is not finite.

    Example:
        In ``default_hooks``, which configs that inherit this one add to, unlike the
        list ``custom_hooks``, which they replace::

            default_hooks = dict(invalid_loss=dict(type='InvalidLossHook'))
    """

    def __init__(self, interval: int = 1, check_boxes: bool = True) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(
                f'{type(self).__name__}: interval must be an integer of 1 or more '
                f'iterations, got {interval!r}'
            )
        self.interval, self.check_boxes = interval, check_boxes
        self._steps: List[_Step] = []

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Optional[Any] = None
    ) -> None:
        """Stop before a step whose boxes would make the loss NaN."""
        if not self.check_boxes:
            return
        bad = [f'{file}: {box}' for file, box in _bad_boxes(_samples(data_batch), True)]
        if bad:
            raise ValueError(
                f'{type(self).__name__}: iteration {runner.iter + 1} was not begun, '
                f'because boxes (xmin, ymin, xmax, ymax; after the pipeline) have no '
                f'positive area, which makes the box loss NaN:{_list(bad)}\n'
                'Find all of them with tools/check_voc.py, which also repairs them '
                '(--fix). Or drop them in the pipeline, after all transforms that '
                "move boxes: dict(type='FilterAnnotations', min_gt_bbox_wh=(0, 0), "
                'keep_empty=False). Nothing is lost: go on with --resume'
            )

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Optional[Any] = None,
        outputs: Optional[Dict[str, Any]] = None,
    ) -> None:
        """Keep the losses, and read those that have come together."""
        losses = {
            name: value.detach().float().mean()
            for name, value in (outputs or {}).items()
            if 'loss' in name and isinstance(value, Tensor) and value.numel()
        }
        if losses:
            values = torch.stack([*losses.values()])
            samples = _samples(data_batch)
            self._steps.append(_Step(runner.iter + 1, (*losses,), values, samples))
        if self.every_n_train_iters(runner, self.interval) or self._saves(runner):
            self._read()

    def after_train_epoch(self, runner: Any) -> None:
        """Read the last losses before a checkpoint of the epoch is written."""
        self._read()

    def before_val(self, runner: Any) -> None:
        """Read the last losses before a checkpoint may become the best one."""
        self._read()

    def before_save_checkpoint(self, runner: Any, checkpoint: Dict[str, Any]) -> None:
        """Read the last losses before a hook of someone else writes a checkpoint."""
        self._read()

    def after_train(self, runner: Any) -> None:
        """Read the last losses."""
        self._read()

    def _saves(self, runner: Any) -> bool:
        """Tell whether a checkpoint is due after this iteration.

        ``before_save_checkpoint`` is too late: where ``max_keep_ckpts`` is set, the
        hook has by then deleted an earlier one to make room.
        """
        return any(
            isinstance(hook, CheckpointHook)
            and not hook.by_epoch
            and (
                self.every_n_train_iters(runner, hook.interval, hook.save_begin)
                or self.is_last_train_iter(runner)
            )
            for hook in runner.hooks
        )

    def _read(self) -> None:
        steps, self._steps = self._steps, []
        for step in steps:
            values = dict(zip(step.names, step.values.tolist()))
            invalid = {n: v for n, v in values.items() if not math.isfinite(v)}
            if invalid:
                # The total follows from its parts; it is named if they are all finite.
                parts = {n: v for n, v in invalid.items() if n != 'loss'} or invalid
                raise FloatingPointError(self._message(step, parts))

    def _message(self, step: _Step, invalid: Dict[str, float]) -> str:
        losses = ', '.join(f'{name} = {value}' for name, value in invalid.items())
        files = _list([_file(sample) for sample in step.samples])
        bad = [f'{file}: {box}' for file, box in _bad_boxes(step.samples, False)]
        if bad:
            cause = (
                f'Boxes (xmin, ymin, xmax, ymax; after the pipeline) without a '
                f'positive area are the likely cause:{_list(bad)}\nFind all of them '
                'with tools/check_voc.py, which also repairs them (--fix).'
            )
        else:
            cause = (
                'All boxes of the batch have an area. Check the data with '
                'tools/check_voc.py all the same; if they are well, the training '
                'diverged: lower the learning rate, clip gradients '
                '(optim_wrapper.clip_grad), or train without AMP.'
            )
        return (
            f'{type(self).__name__}: in iteration {step.iteration} {losses}. The '
            f'images of the batch:{files or " unknown"}\n{cause} The weights in memory '
            'are lost; checkpoints are from before it: go on with --resume'
        )
