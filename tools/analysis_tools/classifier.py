"""The last layer of a detector's classifier: find it, change it, see what it says."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner
from torch import Tensor, nn
from tqdm import tqdm

from tools.analysis_tools.detections import Run, make_run
from tools.common.wrong_calls import read_config

# What mmdet's heads call their last layer.
LAYERS = re.compile(
    r'^(?:roi_head\.)?bbox_head\.(?:\d+\.)?(?:fc_cls|cls_branches|retina_cls|atss_cls|'
    r'gfl_cls|conv_cls|rtm_cls|vfnet_cls|cls_score)(?:\.(\d+))?$'
)


@dataclass(frozen=True)
class Classifier:
    """The last layer of the classifier of a detector.

    Attributes:
        layers: The modules by name; that of each stage, level or decoder layer.
        head: The head that makes the detections.
        classes: The number of classes C.
        columns: C, or C + 1 with a softmax that has a column for the background.
    """

    layers: dict[str, nn.Module]
    head: nn.Module
    classes: int
    columns: int

    @property
    def softmax(self) -> bool:
        """Whether the columns have a softmax, and not a sigmoid each."""
        return self.columns > self.classes

    def fold(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Let each column say scale·z + shift in the place of z.

        Args:
            scale: Of shape (columns,).
            shift: Of shape (columns,).

        Raises:
            ValueError: If that cannot be said by the weights of a layer.
        """
        for name, layer in {id(v): (k, v) for k, v in self.layers.items()}.values():
            weight, bias = layer.weight, layer.bias
            if bias is None or len(weight) % self.columns:
                raise ValueError(
                    f'{name}: expected a bias and a multiple of {self.columns} rows, '
                    f'got {"no bias" if bias is None else len(weight)}'
                )
            # Of several anchors at a place, each has its columns after the other's.
            a, b = (
                torch.as_tensor(np.tile(x, len(weight) // self.columns)).to(weight)
                for x in (scale, shift)
            )
            shape = [-1] + [1] * (weight.dim() - 1)
            probe = torch.rand(1, *weight.shape[1:]).to(weight)
            with torch.no_grad():
                before = layer(probe).movedim(1, -1)
                weight.mul_(a.view(shape))
                bias.mul_(a).add_(b)
                after = layer(probe).movedim(1, -1)
            if not torch.allclose(after, a * before + b, rtol=1e-3, atol=1e-3):
                raise ValueError(
                    f'{name} is a {type(layer).__name__} whose outputs are not linear '
                    'in its weights, so that nothing can be folded into them'
                )


def find_classifier(model: nn.Module) -> Classifier:
    """Find the last layer of the classifier of a detector.

    Raises:
        ValueError: If it has none that is known, or one that must not be changed.
    """
    heads = getattr(model, 'roi_head', model).bbox_head
    stages = list(heads) if isinstance(heads, nn.ModuleList) else [heads]
    # A layer that several decoder layers share has several names.
    layers = {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if LAYERS.match(name) and isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    head, kind = stages[-1], type(stages[-1]).__name__
    if not layers:
        raise ValueError(f'{kind}: no last layer of a classifier is known in it')
    if any('cls_branches' in name for name in layers):
        # The branch of the encoder chooses queries across classes; it stays.
        depth = model.decoder.num_layers
        index = {name: int(LAYERS.match(name)[1]) for name in layers}
        encoder = {id(v) for k, v in layers.items() if index[k] >= depth}
        layers = {k: v for k, v in layers.items() if index[k] < depth}
        if encoder & {id(v) for v in layers.values()}:
            raise ValueError(
                f'{kind}: decoder and encoder share the classifier, and that of the '
                'encoder chooses the queries, across classes: with other scores it '
                'would choose others. Train with with_box_refine=True'
            )
    classes = head.num_classes
    columns = getattr(head, 'cls_out_channels', len(next(iter(layers.values())).weight))
    if columns not in (classes, classes + 1):
        raise ValueError(
            f'{kind}: expected {classes} columns, or {classes + 1} with a softmax, got '
            f'{columns}'
        )
    if any(not getattr(stage, 'reg_class_agnostic', True) for stage in stages[:-1]):
        raise ValueError(
            f'{kind}: a stage of the cascade moves boxes by the class with the highest '
            'logit, so that other logits of the classes would move them elsewhere. '
            'Train with reg_class_agnostic=True, or calibrate by other means'
        )
    return Classifier(layers, head, classes, columns)


def load_config(path: str | Path, options: dict[str, Any] | None = None) -> Config:
    """Read a config with options, ready to build from."""
    from rambo_det.own_data import follow_own_data

    cfg = read_config(path)
    cfg.merge_from_dict(options or {})
    register_all_modules()
    return follow_own_data(cfg)


def load_checkpoint(path: str | Path, cfg: Config) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        ValueError: If it is none, or has other classes than the config's test data.
    """
    from rambo_det.checkpoint import load_checkpoint as load

    content = load(path, 'cpu')
    if not isinstance(content, dict) or 'state_dict' not in content:
        raise ValueError(f'{path}: expected a checkpoint with a state_dict')
    theirs = (content.get('meta', {}).get('dataset_meta') or {}).get('classes')
    ours = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))
    ours = ours.metainfo.get('classes')
    if theirs is not None and tuple(theirs) != tuple(ours):
        raise ValueError(
            f'{path} was trained with the classes {", ".join(theirs)}, and the config '
            f'tests {", ".join(ours)}; give the config that it was trained with'
        )
    return content


def build(cfg: Config, state: dict[str, Tensor]) -> nn.Module:
    """Build a detector with the parameters of a checkpoint.

    Raises:
        ValueError: If they do not fit.
    """
    model_cfg = copy.deepcopy(cfg.model)
    for part in (model_cfg, model_cfg.get('backbone', {})):
        part.pop('init_cfg', None)
    model = MODELS.build(model_cfg)
    try:
        missing, _ = model.load_state_dict(state, strict=False)
        missing = [name for name in missing if '.loss_' not in name]
        text = f'it lacks {", ".join(missing[:3])}' if missing else ''
    except RuntimeError as error:
        text = str(error).splitlines()[1].strip()
    if text:
        raise ValueError(
            f'the checkpoint is not one of this config: {text}; give the config that '
            'it was trained with'
        )
    return model.to(get_device()).eval()


def at_any_score(cfg: Config) -> Config:
    """Return a copy that keeps detections of any score, but no more of an image."""
    cfg = copy.deepcopy(cfg)
    part = cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg)
    if 'score_thr' in part:
        part.score_thr = 0.0
    return cfg


def without_limits(cfg: Config, classifier: Classifier) -> Config:
    """Return a copy that keeps all detections, whatever their score and number."""
    cfg = at_any_score(cfg)
    part = cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg)
    # Those with queries pick the best of queries × classes, and have no NMS.
    queries = cfg.model.get('num_queries', 0)
    queries = queries or cfg.model.get('rpn_head', {}).get('num_proposals', 0)
    per_query = 1 if classifier.softmax else classifier.classes
    part.max_per_img = queries * per_query or 100_000
    return cfg


def _image_logits(scores: Any, columns: int, image: int) -> Tensor:
    """Return the logits (rows, columns) of an image that a head predicts from."""
    if isinstance(scores, Tensor):  # of decoder layers, (layers, images, queries, C)
        return scores[-1][image]
    if scores[0].dim() == 4:  # of levels, (images, anchors * C, H, W) each
        maps = [level[image].permute(1, 2, 0).reshape(-1, columns) for level in scores]
        return torch.cat(maps)
    return scores[image]  # of images, (proposals, C)


@contextmanager
def _recorded(classifier: Classifier) -> Iterator[list[Tensor]]:
    """Keep the logits of each image from which the head makes detections."""
    kept: list[Tensor] = []
    predict = classifier.head.predict_by_feat

    def record(*args: Any, **kwargs: Any) -> Any:
        scores = kwargs.get('cls_scores', args[0] if args else None)
        for image in range(len(kwargs['batch_img_metas'])):
            logits = _image_logits(scores, classifier.columns, image)
            kept.append(logits.cpu())
        return predict(*args, **kwargs)

    classifier.head.predict_by_feat = record
    try:
        yield kept
    finally:
        del classifier.head.predict_by_feat


def detect(cfg: Config, model: nn.Module, name: str, iou: float = 0.5) -> Run:
    """Run a detector on the test data of a config."""
    loader = Runner.build_dataloader(copy.deepcopy(cfg.test_dataloader))
    samples: dict[str, Any] = {}
    for batch in tqdm(loader, name, mininterval=0.5):
        with torch.no_grad():
            for sample in model.test_step(batch):
                found = sample.pred_instances
                keys = ('bboxes', 'scores', 'labels')
                samples[str(sample.img_id)] = {k: found[k].cpu() for k in keys}
    return make_run(cfg, loader.dataset, samples, name, iou)


def detect_columns(
    cfg: Config, model: nn.Module, classifier: Classifier, name: str, iou: float = 0.5
) -> tuple[Run, list[list[np.ndarray]]]:
    """Run a detector whose columns have a softmax, and keep all columns.

    Returns:
        The run; for each image and class the logits (n, C + 1) of its detections.

    Raises:
        ValueError: If a score is not the softmax of a row.
    """
    with _recorded(classifier) as kept:
        run = detect(cfg, model, name, iou)
    if len(kept) != len(run.images):
        raise ValueError(
            f'{type(classifier.head).__name__}: its logits cannot be read, so that '
            'columns with a softmax cannot be calibrated'
        )
    result = []
    for logits, image in zip(kept, run.detections):
        scores, columns = logits.softmax(dim=-1).numpy(), []
        for label, rows in enumerate(image):
            order = np.argsort(scores[:, label])
            known = scores[order, label]
            right = np.searchsorted(known, rows[:, 4]).clip(0, len(known) - 1)
            left = (right - 1).clip(0)
            nearer = abs(known[left] - rows[:, 4]) < abs(known[right] - rows[:, 4])
            place = np.where(nearer, left, right)
            if (abs(known[place] - rows[:, 4]) > 1e-6).any():
                raise ValueError(
                    f'{type(classifier.head).__name__}: the score of a detection is '
                    'not the softmax of its logits: something else is multiplied in, '
                    'which weights of the classifier cannot calibrate'
                )
            columns.append(logits.numpy()[order[place]])
        result.append(columns)
    return run, result
