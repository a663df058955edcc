"""Train and evaluate a box head on cached RoIs, for tools/ablate_head.py.

The head, its losses, the optimiser, the schedules, the post-processing and the metric
are those of mmdet and of this package; only the loop over them is here.
"""

from __future__ import annotations

import copy
import time
from types import SimpleNamespace
from typing import Any, Iterator, Sequence

import torch
from mmdet.evaluation import VOCMetric, eval_map
from mmdet.registry import HOOKS, MODELS
from mmdet.structures.bbox import bbox2roi
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData
from roi_cache import ImageRois, Progress, RoiCache, RoiTable
from torch import Tensor

from rambo_det import RaMBOLoss

SCHEDULE = 'RaMBOScheduleHook'


# One step


def build_head(config: dict[str, Any]) -> Any:
    """A new box head, its weights drawn as at the start of a full training."""
    head = MODELS.build(ConfigDict(config))
    head.init_weights()
    return head.train()


def _features(images: list[ImageRois]) -> Tensor:
    return torch.cat([image.features for image in images]).float()


def head_losses(
    head: Any, images: list[ImageRois], train_cfg: dict[str, Any]
) -> dict[str, Tensor]:
    """Return what ``StandardRoIHead.loss`` returns for these RoIs."""
    return losses_of_outputs(head, head(_features(images)), images, train_cfg)


def losses_of_outputs(
    head: Any,
    outputs: tuple[Tensor, Tensor],
    images: list[ImageRois],
    train_cfg: dict[str, Any],
) -> dict[str, Tensor]:
    """The losses of the head's logits and box deltas."""
    sampled = []
    for image in images:
        count = len(image.object_labels)
        sampled.append(
            SimpleNamespace(
                pos_priors=image.boxes[:count],
                neg_priors=image.boxes[count:],
                pos_gt_bboxes=image.object_boxes,
                pos_gt_labels=image.object_labels,
            )
        )
    rois = bbox2roi([image.boxes for image in images])
    result = head.loss_and_target(*outputs, rois, sampled, ConfigDict(train_cfg))
    return result['loss_bbox']


def total(losses: dict[str, Any], part: str = 'loss') -> Tensor:
    """Sum what counts as a loss, as mmengine's models do."""
    return sum(torch.mean(value) for name, value in losses.items() if part in name)


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient as one vector, zero where the loss does not reach."""
    grads: Sequence[Tensor | None] = [None] * len(parameters)
    if loss.requires_grad:
        grads = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True
        )
    return torch.cat(
        [
            torch.zeros_like(value).flatten() if grad is None else grad.flatten()
            for value, grad in zip(parameters, grads)
        ]
    )


class Diagnosis:
    """Measures in each step what the shared layers and the positives are taught.

    It changes nothing: the random numbers of the training stay the same.
    """

    def __init__(self, head: Any, train_cfg: dict[str, Any]) -> None:
        self.head, self.train_cfg = head, train_cfg
        shared = getattr(head, 'shared_fcs', None) or head
        self.shared = [
            value
            for name, value in shared.named_parameters()
            if not name.startswith(('fc_cls', 'fc_reg'))
        ]
        self.parts = dict(loss_cls=head.loss_cls)
        if isinstance(head.loss_cls, RaMBOLoss) and len(head.loss_cls.terms) > 1:
            for term in head.loss_cls.terms:
                self.parts[term.name] = copy.deepcopy(head.loss_cls)
                self.parts[term.name].terms = (term,)
        self.restart()

    def restart(self) -> None:
        """Begin an epoch."""
        self.norms: dict[str, list[float]] = dict(cls_norm=[], box_norm=[], cosine=[])
        self.zero = dict.fromkeys(self.parts, 0)
        self.positives = 0

    def logit_gradients(
        self, outputs: tuple[Tensor, Tensor], images: list[ImageRois]
    ) -> dict[str, Tensor]:
        """The gradient of the logits by part of the loss, at the same margins.

        A zero for a positive means that it is taught nothing: that λ does not reach
        the next negative, or that none is above it.
        """
        loss, result = self.head.loss_cls, {}
        state = loss.get_extra_state() if isinstance(loss, RaMBOLoss) else None
        for name, part in self.parts.items():
            part = copy.deepcopy(part)
            if state is not None:
                part.set_extra_state(state)
                part.factors = dict(loss.factors)
            leaf = outputs[0].detach().requires_grad_()
            self.head.loss_cls = part
            try:
                with torch.random.fork_rng():
                    losses = losses_of_outputs(
                        self.head, (leaf, outputs[1].detach()), images, self.train_cfg
                    )
            finally:
                self.head.loss_cls = loss
            (result[name],) = torch.autograd.grad(total(losses, 'loss_cls'), leaf)
        return result

    def losses(self, images: list[ImageRois]) -> dict[str, Tensor]:
        """What :func:`head_losses` returns, measured."""
        outputs = self.head(_features(images))
        rows, labels = [], []
        for offset, image in zip(_offsets(images), images):
            rows.append(torch.arange(len(image.object_labels)) + offset)
            labels.append(image.object_labels)
        index = (torch.cat(rows), torch.cat(labels))
        self.positives += len(index[0])
        for name, gradient in self.logit_gradients(outputs, images).items():
            self.zero[name] += int((gradient[index] == 0).sum())
        losses = losses_of_outputs(self.head, outputs, images, self.train_cfg)
        cls, box = (
            flat_gradient(total(losses, part), self.shared)
            for part in ('loss_cls', 'loss_bbox')
        )
        norms = cls.norm(), box.norm()
        cosine = (cls * box).sum() / (norms[0] * norms[1]).clamp(min=1e-30)
        for name, value in zip(self.norms, (*norms, cosine)):
            self.norms[name].append(float(value))
        return losses

    def report(self) -> dict[str, Any]:
        """Means over the epoch's steps; the shares are of all positives in it."""
        means = {k: sum(v) / max(len(v), 1) for k, v in self.norms.items()}
        shares = {k: v / max(self.positives, 1) for k, v in self.zero.items()}
        return dict(means, zero_share=shares)


def _offsets(images: list[ImageRois]) -> Iterator[int]:
    offset = 0
    for image in images:
        yield offset
        offset += len(image.boxes)


# Training and evaluation


def build_optimizer(head: Any, config: dict[str, Any]) -> Any:
    """The config's optimiser, where it can, in one pass over the weights.

    With one thread AdamW's separate operations take as long as forward and backward.
    """
    wrapper = build_optim_wrapper(head, ConfigDict(config))
    major, minor = (int(part) for part in torch.__version__.split('.')[:2])
    optimizer = wrapper.optimizer
    if (major, minor) >= (2, 4) and type(optimizer) in (
        torch.optim.AdamW,
        torch.optim.Adam,
    ):
        for group in optimizer.param_groups:
            group['fused'] = True
    return wrapper


def build_schedule(definition: dict[str, Any], optimizer: Any, steps: int) -> list[Any]:
    """The schedulers of the learning rate, as mmengine's runner builds them."""
    result = []
    for scheduler in definition['param_scheduler']:
        epochs = definition['epochs']
        last = epochs if scheduler.get('by_epoch', True) else epochs * steps
        result.append(
            PARAM_SCHEDULERS.build(
                {'end': last, **scheduler},
                default_args=dict(optimizer=optimizer, epoch_length=steps),
            )
        )
    return result


def _schedule_loss(
    head: Any, schedules: list[dict[str, Any]], epochs: int, steps: int
) -> Iterator[None]:
    """Set the factors of the loss before each step, as the hooks do."""
    hooks = [HOOKS.build(dict(type=SCHEDULE, **schedule)) for schedule in schedules]
    losses = [m for m in head.modules() if isinstance(m, RaMBOLoss)]
    if hooks and not losses:
        raise ValueError(
            'ablate_head: schedules are for a head with a RaMBOLoss, got loss_cls '
            f'{type(head.loss_cls).__name__}; remove them from the setting'
        )
    for step in range(epochs * steps):
        for hook in hooks:
            factor = hook.factor(step, epochs * steps, steps)
            for loss in losses:
                loss.factors[hook.param] = factor
        yield


@torch.no_grad()
def detect(
    head: Any, images: list[ImageRois], test_cfg: dict[str, Any]
) -> list[InstanceData]:
    """Return what ``StandardRoIHead.predict_bbox`` returns, in pixels of the files."""
    rois = bbox2roi([image.boxes for image in images])
    counts = [len(image.boxes) for image in images]
    cls_scores, bbox_preds = head(_features(images))
    return head.predict_by_feat(
        rois=rois.split(counts),
        cls_scores=cls_scores.split(counts),
        bbox_preds=bbox_preds.split(counts),
        batch_img_metas=[image.meta for image in images],
        rcnn_test_cfg=ConfigDict(test_cfg),
        rescale=True,
    )


class _PerClassMetric(VOCMetric):
    """VOCMetric that, if asked, also keeps AP50 by class."""

    per_class: list[float] | None = None

    def keep_per_class(self) -> None:
        truth, found = zip(*self.results)
        _, classes = eval_map(
            found, truth, iou_thr=0.5, logger='silent', use_legacy_coordinate=True
        )
        self.per_class = [100 * float(result['ap']) for result in classes]


def evaluate(
    head: Any,
    table: RoiTable,
    classes: list[str],
    test_cfg: dict[str, Any],
    per_class: bool = False,
    batch_size: int = 4,
) -> tuple[float, list[float] | None]:
    """AP50 in percent, area under the curve, and that of each class if asked."""
    head.eval()
    device = next(head.parameters()).device
    metric = _PerClassMetric(eval_mode='area')
    metric.dataset_meta = dict(classes=classes)
    for start in range(0, len(table), batch_size):
        images = _load(table, range(start, min(start + batch_size, len(table))), device)
        for image, found in zip(images, detect(head, images, test_cfg)):
            ignored = image.object_ignored
            groups = [
                dict(bboxes=image.object_boxes[rows], labels=image.object_labels[rows])
                for rows in (~ignored, ignored)
            ]
            names = ('gt_instances', 'ignored_instances')
            metric.process({}, [dict(zip(names, groups), pred_instances=found)])
    if per_class:
        metric.keep_per_class()
    head.train()
    result = metric.evaluate(len(table))
    return 100 * float(result['pascal_voc/mAP']), metric.per_class


def _load(table: RoiTable, indices: Any, device: Any) -> list[ImageRois]:
    images = [table[int(index)] for index in indices]
    if device.type != 'cpu':
        for image in images:
            for name, value in vars(image).items():
                if isinstance(value, Tensor):
                    setattr(image, name, value.to(device))
    return images


def train_head(
    definition: dict[str, Any],
    cache: RoiCache,
    seed: int,
    *,
    name: str = 'head',
    val_interval: int = 1,
    diagnose: bool = False,
    device: str = 'cpu',
) -> dict[str, Any]:
    """Train and evaluate a setting.

    Returns:
        dict: 'epochs' and 'ap50' of the evaluations, 'per_class' of the last one, means
        of the 'losses' by epoch, 'minutes', and 'diagnosis' by epoch if asked.
    """
    start = time.perf_counter()
    set_random_seed(seed)
    head = build_head(definition['bbox_head']).to(device)
    wrapper = build_optimizer(head, definition['optim_wrapper'])
    epochs, size = definition['epochs'], definition['batch_size']
    count = len(cache.train[0])
    steps = -(-count // size)
    schedule = build_schedule(definition, wrapper.optimizer, steps)
    factors = _schedule_loss(head, definition['schedules'], epochs, steps)
    # The images' order is the same whatever the loss draws.
    generator = torch.Generator().manual_seed(seed)
    diagnosis = Diagnosis(head, definition['train_cfg']) if diagnose else None
    result: dict[str, Any] = dict(epochs=[], ap50=[], losses=[], diagnosis=[])
    progress = Progress(f'{name}, seed {seed}', epochs * steps)
    for epoch in range(epochs):
        table = cache.train[epoch % len(cache.train)]
        order = torch.randperm(len(table), generator=generator).split(size)[:steps]
        sums: dict[str, float] = {}
        for indices in order:
            next(factors)
            images = _load(table, indices, next(head.parameters()).device)
            with wrapper.optim_context(head):
                losses = (
                    diagnosis.losses(images)
                    if diagnosis
                    else head_losses(head, images, definition['train_cfg'])
                )
            loss = total(losses)
            wrapper.update_params(loss)
            for scheduler in schedule:
                if not scheduler.by_epoch:
                    scheduler.step()
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach())
            progress.step(f', epoch {epoch + 1}, loss {float(loss.detach()):.3f}')
        for scheduler in schedule:
            if scheduler.by_epoch:
                scheduler.step()
        means = {key: round(value / len(order), 5) for key, value in sums.items()}
        result['losses'].append(means)
        if diagnosis:
            result['diagnosis'].append(diagnosis.report())
            diagnosis.restart()
        last = epoch + 1 == epochs
        if last or (epoch + 1) % val_interval == 0:
            ap50, per_class = evaluate(
                head, cache.val, cache.classes, definition['test_cfg'], last
            )
            result['epochs'].append(epoch + 1)
            result['ap50'].append(round(ap50, 3))
            if last:
                result['per_class'] = [round(value, 2) for value in per_class]
    result['minutes'] = round((time.perf_counter() - start) / 60, 2)
    if not diagnose:
        del result['diagnosis']
    return result
