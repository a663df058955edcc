"""RoI features of a frozen detector on disk, computed once, for tools/ablate_head.py.

A cache is a folder: ``cache.json`` says what it was made from, and each table beside it
(``train0``, ``train1``, ... one per pass over the training images, and ``val``) holds
the RoIs of its images one after the other, as .npy files. Features are float16 and
memory-mapped. A table that was not finished is made again, one that is missing is
added, and a cache made from something else is refused.

Images go through the detector one by one, so none is padded to the size of another,
and in evaluation mode, since it is frozen.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator

import numpy as np
import torch
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.utils import unpack_gt_instances
from mmdet.registry import DATASETS, MODELS
from mmdet.structures.bbox import bbox2roi, get_box_tensor
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import CheckpointLoader, set_random_seed
from torch import Tensor

import rambo_det  # noqa: F401 - registers its modules, allows its checkpoints

FORMAT = 1
HEAD = 'roi_head.bbox_head.'
META = ('img_path', 'ori_shape', 'img_shape', 'scale_factor')
HEADER = 128  # bytes of the header of a .npy file whose length is known at the end


@dataclass
class ImageRois:
    """The RoIs of one image.

    Attributes:
        boxes: (N, 4) in pixels of the network's input.
        features: (N, C, H, W), what the box head gets; float16 in a table.
        object_boxes: (M, 4). In a training table the object matched to each positive;
            the positives are the first M RoIs. In a validation table the objects of
            the image, in pixels of the file.
        object_labels: (M,).
        object_ignored: (M,) whether an object is to be neither found nor missed.
        meta: What post-processing has to know of the image.
    """

    boxes: Tensor
    features: Tensor
    object_boxes: Tensor
    object_labels: Tensor
    object_ignored: Tensor
    meta: dict[str, Any]


class Progress:
    """How many of something are done, on standard error, every few seconds."""

    def __init__(self, what: str, total: int, every: float = 10.0) -> None:
        self.what, self.total, self.every = what, total, every
        self.done, self.start = 0, time.monotonic()
        self.shown = self.start

    def step(self, note: str = '') -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.shown < self.every:
            return
        self.shown = now
        left = (now - self.start) / self.done * (self.total - self.done)
        text = f'{self.what}: {self.done}/{self.total}, {left:.0f} s left{note}'
        print(text, file=sys.stderr, flush=True)


# Tables


def _npy_header(shape: tuple[int, ...], dtype: type) -> bytes:
    """The header of a .npy file, always of the same length."""
    text = repr(dict(descr=np.dtype(dtype).str, fortran_order=False, shape=shape))
    body = text.ljust(HEADER - 11).encode('latin1') + b'\n'
    return b'\x93NUMPY\x01\x00' + len(body).to_bytes(2, 'little') + body


def _half(image: ImageRois) -> np.ndarray:
    """The features of an image as float16."""
    with np.errstate(over='ignore'):
        half = image.features.cpu().numpy().astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(
            f'roi_cache: the features of {image.meta["img_path"]} do not fit into '
            f'float16: the largest is {float(image.features.abs().max()):g}, expected '
            'less than 65504; check that the checkpoint belongs to the config'
        )
    return half


def write_table(folder: Path, images: Iterable[ImageRois]) -> None:
    """Write a table, its ``table.json`` last: without it, the table does not exist."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    small: dict[str, list[np.ndarray]] = {
        name: []
        for name in ('boxes', 'object_boxes', 'object_labels', 'object_ignored')
    }
    metas, rows, shape = [], 0, None
    # Nobody knows how many rows there will be, so the header is written at the end.
    with open(folder / 'features.npy', 'wb') as file:
        file.write(bytes(HEADER))
        for image in images:
            half = _half(image)
            rows, shape = rows + len(half), half.shape[1:]
            file.write(half.tobytes())
            for name, values in small.items():
                values.append(getattr(image, name).cpu().numpy())
            metas.append(image.meta)
        if shape is None:
            raise ValueError(f'roi_cache: there is no image for {folder}')
        file.seek(0)
        file.write(_npy_header((rows, *shape), np.float16))
    for name, key in (('offsets', 'boxes'), ('object_offsets', 'object_boxes')):
        counts = [len(values) for values in small[key]]
        np.save(folder / f'{name}.npy', np.cumsum([0, *counts]))
    for name, values in small.items():
        np.save(folder / f'{name}.npy', np.concatenate(values))
    (folder / 'table.json').write_text(json.dumps(metas))


class RoiTable:
    """The RoIs of a sequence of images; their features stay on disk."""

    def __init__(self, folder: Path) -> None:
        self.metas = json.loads((folder / 'table.json').read_text())
        self.features = np.load(folder / 'features.npy', mmap_mode='r')
        self._arrays = {
            name: np.load(folder / f'{name}.npy')
            for name in ('boxes', 'object_boxes', 'object_labels', 'object_ignored')
        }
        self._offsets = np.load(folder / 'offsets.npy')
        self._object_offsets = np.load(folder / 'object_offsets.npy')

    def __len__(self) -> int:
        return len(self.metas)

    def __getitem__(self, index: int) -> ImageRois:
        rows = slice(*self._offsets[index : index + 2])
        objects = slice(*self._object_offsets[index : index + 2])
        values = {
            name: torch.from_numpy(array[objects if 'object' in name else rows].copy())
            for name, array in self._arrays.items()
        }
        features = torch.from_numpy(np.array(self.features[rows]))
        return ImageRois(features=features, meta=self.metas[index], **values)


# What the detector says


def frozen_detector(cfg: Config, checkpoint: Path, device: str = 'cpu') -> Any:
    """Build the config's detector with a checkpoint's weights, to be only looked at.

    Raises:
        ValueError: If it is no two-stage detector with one box head, or if the
            checkpoint lacks weights outside of this head.
    """
    model = MODELS.build(copy.deepcopy(cfg.model))
    head = getattr(getattr(model, 'roi_head', None), 'bbox_head', None)
    if not isinstance(head, BBoxHead) or not getattr(model, 'with_rpn', False):
        raise ValueError(
            'roi_cache: the config must be that of a two-stage detector with an RPN '
            f'and one box head, such as FasterRCNN, got {type(model).__name__} with '
            f'roi_head.bbox_head {type(head).__name__}'
        )
    loaded = CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu')
    loaded = loaded.get('state_dict', loaded)
    # The head is not used here, and may be that of another loss.
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(HEAD)}
    lacking = [k for k in own if k not in loaded or loaded[k].shape != own[k].shape]
    if lacking:
        raise ValueError(
            f'roi_cache: {checkpoint} lacks {len(lacking)} of the {len(own)} weights '
            f'of the detector, or has them in another shape, the first {lacking[0]!r}; '
            'give the checkpoint of a training with this config'
        )
    model.load_state_dict({k: loaded[k] for k in own}, strict=False)
    return model.to(device).eval().requires_grad_(False)


def _roi_features(model: Any, x: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """What ``StandardRoIHead`` gives its box head for boxes in one image."""
    roi_head = model.roi_head
    extractor = roi_head.bbox_roi_extractor
    features = extractor(x[: extractor.num_inputs], bbox2roi([boxes]))
    return roi_head.shared_head(features) if roi_head.with_shared_head else features


def _meta(sample: Any) -> dict[str, Any]:
    values = {name: sample.metainfo[name] for name in META if name in sample.metainfo}
    return {k: v if isinstance(v, str) else list(v) for k, v in values.items()}


@torch.no_grad()
def training_rois(model: Any, item: dict[str, Any]) -> ImageRois:
    """Sample RoIs of one item of a training data set as a training step would.

    Args:
        model: The detector.
        item: What ``PackDetInputs`` made.
    """
    data = model.data_preprocessor(pseudo_collate([item]), training=True)
    samples = data['data_samples']
    (objects,), (ignored,), metas = unpack_gt_instances(samples)
    x = model.extract_feat(data['inputs'])
    proposal_cfg = model.train_cfg.get('rpn_proposal', model.test_cfg.rpn)
    (proposals,) = model.rpn_head.predict_by_feat(
        *model.rpn_head(x), batch_img_metas=metas, cfg=proposal_cfg
    )
    proposals.priors = proposals.pop('bboxes')
    roi_head = model.roi_head
    assigned = roi_head.bbox_assigner.assign(proposals, objects, ignored)
    sampled = roi_head.bbox_sampler.sample(
        assigned, proposals, objects, feats=[level[:1] for level in x]
    )
    boxes = get_box_tensor(sampled.priors)
    labels = sampled.pos_gt_labels
    return ImageRois(
        boxes=boxes,
        features=_roi_features(model, x, boxes),
        object_boxes=get_box_tensor(sampled.pos_gt_bboxes),
        object_labels=labels,
        object_ignored=torch.zeros_like(labels, dtype=torch.bool),
        meta=_meta(samples[0]),
    )


@torch.no_grad()
def validation_rois(model: Any, item: dict[str, Any]) -> ImageRois:
    """Return all proposals of one item of a test data set, and its objects."""
    data = model.data_preprocessor(pseudo_collate([item]), training=False)
    samples = data['data_samples']
    x = model.extract_feat(data['inputs'])
    (proposals,) = model.rpn_head.predict(x, samples, rescale=False)
    boxes = get_box_tensor(proposals.bboxes)
    groups = (samples[0].gt_instances, samples[0].ignored_instances)
    truth = [get_box_tensor(group.bboxes) for group in groups]
    labels = torch.cat([group.labels for group in groups])
    return ImageRois(
        boxes=boxes,
        features=_roi_features(model, x, boxes),
        object_boxes=torch.cat(truth),
        object_labels=labels,
        object_ignored=torch.arange(len(labels)) >= len(truth[0]),
        meta=_meta(samples[0]),
    )


# Data sets


def _plain(config: Any, **changes: Any) -> Any:
    """A data set's config without repetitions, changed where the files are read."""
    config = copy.deepcopy(config)
    if config['type'] == 'RepeatDataset':
        return _plain(config['dataset'], **changes)
    if 'datasets' in config:
        config['datasets'] = [_plain(part, **changes) for part in config['datasets']]
    elif 'dataset' in config:
        raise ValueError(
            'roi_cache: train_dataloader.dataset must be a plain data set, or a '
            f'RepeatDataset or ConcatDataset of such, got {config["type"]!r}; replace '
            'it in the config by the data set that it wraps'
        )
    else:
        config.update(changes)
    return config


def split(cfg: Config, val_images: int) -> tuple[Any, list[int], Any, list[int]]:
    """Hold out the last images of the training split, with the test pipeline.

    Returns:
        The training data set, the indices of its images that are trained on, the same
        data as a test data set, and the indices of the images held out.

    Raises:
        ValueError: If not both parts have an image.
    """
    config = cfg.train_dataloader.dataset
    pipeline = cfg.val_dataloader.dataset.pipeline
    train = DATASETS.build(_plain(config))
    # Test mode drops no image, so it knows them all.
    val = DATASETS.build(_plain(config, test_mode=True, pipeline=pipeline))
    if not 0 < val_images < len(val):
        raise ValueError(
            f'roi_cache: val_images must be 1 to {len(val) - 1}, less than the images '
            f'of the training split, got {val_images}'
        )
    held = list(range(len(val) - val_images, len(val)))
    names = {val.get_data_info(index)['img_path'] for index in held}
    kept = [
        index
        for index in range(len(train))
        if train.get_data_info(index)['img_path'] not in names
    ]
    if not kept:
        raise ValueError(
            f'roi_cache: val_images={val_images} leaves no training image with objects'
        )
    return train, kept, val, held


def _sampled(model: Any, dataset: Any, indices: list[int], what: str) -> Iterator:
    progress = Progress(what, len(indices))
    for index in indices:
        item = dataset[index]
        progress.step()
        # A training set replaces an image whose objects were all filtered out, perhaps
        # by one that is held out.
        expected = dataset.get_data_info(index)['img_path']
        if item['data_samples'].img_path == expected:
            yield training_rois(model, item)


def _validated(model: Any, dataset: Any, indices: list[int], what: str) -> Iterator:
    progress = Progress(what, len(indices))
    for index in indices:
        yield validation_rois(model, dataset[index])
        progress.step()


# The cache


def digest(value: Any) -> str:
    """The SHA-256 of a file, or of a value as JSON."""
    if isinstance(value, Path):
        return hashlib.sha256(value.read_bytes()).hexdigest()
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def origin(cfg: Config, checkpoint: Path, val_images: int, seed: int) -> dict[str, Any]:
    """Say what the content of a cache depends on, each thing by its name."""
    model = copy.deepcopy(cfg.model.to_dict())
    model['roi_head'].pop('bbox_head', None)
    model['backbone'].pop('init_cfg', None)
    model.get('test_cfg', {}).pop('rcnn', None)
    return dict(
        format=FORMAT,
        model=digest(model),
        dataset=digest(cfg.train_dataloader.dataset.to_dict()),
        test_pipeline=digest(list(cfg.val_dataloader.dataset.pipeline)),
        checkpoint=digest(checkpoint),
        val_images=val_images,
        seed=seed,
    )


@dataclass
class RoiCache:
    """A table per pass over the training images, and that of the held-out ones."""

    train: list[RoiTable]
    val: RoiTable
    classes: list[str]
    origin: dict[str, Any]


def _check_origin(folder: Path, expected: dict[str, Any]) -> None:
    """Refuse a folder that is no cache, or one of something else."""
    path = folder / 'cache.json'
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f'roi_cache: --cache {folder} holds files but no cache.json, so it is '
                'no cache; name another folder'
            )
        return
    found = json.loads(path.read_text())['origin']
    changed = [name for name in expected if found.get(name) != expected[name]]
    if changed:
        details = '; '.join(
            f'{name} {str(found.get(name))[:12]} there, {str(expected[name])[:12]} here'
            for name in changed
        )
        raise ValueError(
            f'roi_cache: --cache {folder} was made from another '
            f'{" and another ".join(changed)} ({details}); name another folder, or '
            'make it anew with --rebuild'
        )


def _clear(folder: Path) -> bool:
    """Delete a cache, and nothing else in its folder; return whether there was one."""
    if not (folder / 'cache.json').is_file():
        return False
    for path in [folder / 'val', *folder.glob('train[0-9]*')]:
        shutil.rmtree(path, ignore_errors=True)
    (folder / 'cache.json').unlink()
    return True


def open_cache(
    folder: Path,
    cfg: Config,
    checkpoint: Path,
    *,
    val_images: int,
    samples: int,
    seed: int = 0,
    device: str = 'cpu',
    rebuild: bool = False,
) -> RoiCache:
    """Open a cache, after making what is missing of it.

    Args:
        folder: Where it lies or shall lie.
        cfg: Config of the detector; its training split is divided.
        checkpoint: The detector's weights.
        val_images: How many images, the last ones, are held out of the training.
        samples: Passes over the training images; each draws flips and RoIs anew.
        seed: Seed of the first pass, counted on for the others.
        device: Where the detector computes.
        rebuild: Whether to begin anew instead of refusing what does not fit.

    Raises:
        ValueError: If the folder holds something else, or an argument is not possible.
    """
    made_from = origin(cfg, checkpoint, val_images, seed)
    if not (rebuild and _clear(folder)):
        _check_origin(folder, made_from)
    names = ['val', *(f'train{index}' for index in range(samples))]
    missing = [name for name in names if not (folder / name / 'table.json').is_file()]
    if missing:
        model = frozen_detector(cfg, checkpoint, device)
        train, kept, val, held = split(cfg, val_images)
        folder.mkdir(parents=True, exist_ok=True)
        about = dict(origin=made_from, classes=list(val.metainfo['classes']))
        (folder / 'cache.json').write_text(json.dumps(about, indent=1))
        for name in missing:
            what = f'RoI features of {name}'
            if name == 'val':
                write_table(folder / name, _validated(model, val, held, what))
                continue
            set_random_seed(seed + int(name[len('train') :]))
            write_table(folder / name, _sampled(model, train, kept, what))
    return RoiCache(
        train=[RoiTable(folder / name) for name in names[1:]],
        val=RoiTable(folder / 'val'),
        classes=json.loads((folder / 'cache.json').read_text())['classes'],
        origin=made_from,
    )
