"""Stop a training whose loss is NaN, and say which images did it."""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from mmdet.registry import HOOKS
from mmdet.structures.bbox import get_box_tensor
from mmengine.dist import all_gather
from mmengine.hooks import Hook
from torch import Tensor

from .model import check_interval, checkpoint_is_due

_SHOWN = 10  # boxes or images in a message
_CORNERS = '(xmin, ymin, xmax, ymax; after the pipeline)'
_REPAIR = (
    'Find all of them with tools/dataset_tools/check_voc.py, which also repairs them '
    '(--fix)'
)


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


def _bad_boxes(samples: List[Any], only_cpu: bool = False) -> List[str]:
    """Describe each box without a positive, finite area."""
    bad = []
    for sample in samples:
        truth = sample.get('gt_instances')
        if truth is None or 'bboxes' not in truth:
            continue
        boxes = get_box_tensor(truth.bboxes).detach()
        if boxes.ndim != 2 or boxes.size(1) != 4 or (only_cpu and not boxes.is_cpu):
            continue
        # NaN compares false, and inf - inf is NaN, so that both count as bad here.
        sides = boxes[:, 2:] - boxes[:, :2]
        good = ((sides > 0) & (sides < math.inf)).all(dim=1)
        for index in (~good).nonzero().flatten().tolist():
            label = truth.labels[index] if 'labels' in truth else None
            corners = ', '.join(f'{corner:g}' for corner in boxes[index].tolist())
            bad.append(f'{_file(sample)}: class {label}, ({corners})')
    return bad


def _which(failed: bool) -> str:
    """Return which processes have failed; all have to call this at the same time."""
    found = torch.cat(list(all_gather(torch.tensor([failed], dtype=torch.int32))))
    return ', '.join(map(str, found.nonzero().flatten().tolist()))


def _list(lines: List[str]) -> str:
    more = [f'and {len(lines) - _SHOWN} more'] if len(lines) > _SHOWN else []
    return ''.join(f'\n  {line}' for line in lines[:_SHOWN] + more)


@HOOKS.register_module()
class InvalidLossHook(Hook):
    """Stop at a box that would make the loss NaN, and at a loss that is NaN or inf.

    Boxes are checked before each step, after the whole pipeline of the data, while they
    are still on the CPU: one without a positive area is an error before it can destroy
    the weights. Losses are checked after the step. The weights in memory are lost then,
    but no checkpoint is: all losses are read before one is written or replaced. In
    distributed training all processes stop at a box or a loss of any of them.

    mmdet's ``CheckInvalidLossHook`` checks the total of every 50th iteration and names
    nothing. This hook names the losses, the images of the first iteration in which one
    was not finite, and their boxes.

    Infinite gradients are no error: with mixed precision, the scaler skips such steps.

    Args:
        interval (int): Losses are read every so many iterations, at the end, and before
            a checkpoint or a validation. Reading waits for the other processes, and for
            the GPU as mmengine's ``RuntimeInfoHook`` does in each iteration. The
            message names the right images with any interval. Defaults to 1.
        check_boxes (bool): Whether boxes are checked. Switch it off for a loss that
            such boxes do no harm. Defaults to True. With several processes, each step
            then begins with a flag of all.

    Raises:
        ValueError: If ``interval`` is not a positive integer, or at such a box.
        FloatingPointError: If a loss is not finite.

    Example:
        In ``default_hooks``, since configs that inherit this one replace the list
        ``custom_hooks``::

            default_hooks = dict(invalid_loss=dict(type='InvalidLossHook'))
    """

    def __init__(self, interval: int = 1, check_boxes: bool = True) -> None:
        self.interval = check_interval(self, interval)
        self.check_boxes = check_boxes
        self._steps: List[_Step] = []

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Stop before a step whose boxes would make the loss NaN, in all processes."""
        if not self.check_boxes:
            return
        bad = _bad_boxes(_samples(data_batch), only_cpu=True)
        processes = _which(bool(bad))
        if not processes:
            return
        if bad:
            what = (
                f'boxes {_CORNERS} have no positive area, which makes the box loss '
                f'NaN:{_list(bad)}\n{_REPAIR}. Or drop them in the pipeline, after all '
                "transforms that move boxes: dict(type='FilterAnnotations', "
                'min_gt_bbox_wh=(0, 0), keep_empty=False)'
            )
        else:
            what = (
                f'boxes of process {processes} have no positive area; its own error '
                'message names them'
            )
        raise ValueError(
            f'{type(self).__name__}: iteration {runner.iter + 1} was not begun, '
            f'because {what}. Nothing is lost: go on with --resume'
        )

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Keep the losses; read them every ``interval`` iterations.

        ``before_save_checkpoint`` is too late to read them: where ``max_keep_ckpts`` is
        set, an earlier checkpoint has been deleted by then.
        """
        losses = {
            name: value.detach().float().mean()
            for name, value in (outputs or {}).items()
            if 'loss' in name and isinstance(value, Tensor) and value.numel()
        }
        if losses:
            values = torch.stack([*losses.values()])
            samples = _samples(data_batch)
            self._steps.append(_Step(runner.iter + 1, (*losses,), values, samples))
        if self.every_n_train_iters(runner, self.interval) or checkpoint_is_due(runner):
            self._agree()

    def _agree(self, *_: Any, **__: Any) -> None:
        """Raise in all processes if a loss that any of them kept is not finite.

        All have to call this at the same time, as they do at all stages but saving.
        """
        message = self._read()
        invalid = _which(message is not None)
        if message is not None:
            raise FloatingPointError(message)
        if invalid:
            raise FloatingPointError(
                f'{type(self).__name__}: a loss of process {invalid} is not finite, '
                'so that the weights of all are lost; its own error message names the '
                'loss and the images. Checkpoints are from before it: go on with '
                '--resume'
            )

    # What comes before a checkpoint is written, or becomes the best one.
    after_train_epoch = before_val = after_train = _agree

    def before_save_checkpoint(self, *_: Any, **__: Any) -> None:
        """Read what only the process that saves has kept since then, if anything."""
        message = self._read()
        if message is not None:
            raise FloatingPointError(message)

    def _read(self) -> Optional[str]:
        """Say which of the losses that were kept is not finite."""
        steps, self._steps = self._steps, []
        for step in steps:
            values = dict(zip(step.names, step.values.tolist()))
            invalid = {n: v for n, v in values.items() if not math.isfinite(v)}
            if invalid:
                # The total follows from its parts; it is named if they are all finite.
                parts = {n: v for n, v in invalid.items() if n != 'loss'} or invalid
                return self._message(step, parts)
        return None

    def _message(self, step: _Step, invalid: Dict[str, float]) -> str:
        losses = ', '.join(f'{name} = {value}' for name, value in invalid.items())
        files = _list([_file(sample) for sample in step.samples])
        bad = _bad_boxes(step.samples)
        if bad:
            cause = (
                f'Boxes {_CORNERS} without a positive area are the likely cause:'
                f'{_list(bad)}\n{_REPAIR}.'
            )
        else:
            cause = (
                'All boxes of the batch have an area. Check the data with '
                'tools/dataset_tools/check_voc.py; if they are well, the training '
                'diverged: lower the learning rate, clip gradients '
                '(optim_wrapper.clip_grad), or train without AMP.'
            )
        return (
            f'{type(self).__name__}: in iteration {step.iteration} {losses}. The '
            f'images of the batch:{files or " unknown"}\n{cause} The weights in memory '
            'are lost; checkpoints are from before it: go on with --resume'
        )
