"""The data sets that a config names, and whether its model fits them."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator

from tools.common.wrong_calls import read_config, reading
from tools.dataset_tools.coco_data import check_coco
from tools.dataset_tools.splits import compare_parts
from tools.dataset_tools.voc_data import Checked, check
from tools.dataset_tools.voc_files import Problem, Settings

_PARTS = ('train', 'val', 'test')


def _leaves(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yield the data sets that wrappers like RepeatDataset hold."""
    if isinstance(dataset, (list, tuple)):
        for each in dataset:
            yield from _leaves(each)
    elif isinstance(dataset, dict) and ('dataset' in dataset or 'datasets' in dataset):
        yield from _leaves(dataset.get('dataset') or dataset['datasets'])
    elif isinstance(dataset, dict):
        yield dataset


def _join(root: Any, path: Any) -> Path:
    """Join as mmengine's BaseDataset does."""
    return Path(os.path.join(root or '', path or ''))


def _classes(dataset: dict[str, Any], kind: type) -> tuple[str, ...]:
    from rambo_det.explanations import one_string

    found = (dataset.get('metainfo') or {}).get('classes')
    found = kind.METAINFO.get('classes') if found is None else found
    if isinstance(found, str):
        raise ValueError(one_string(found))
    return tuple(found or ())


def _model_problems(cfg: Any, classes: dict[str, tuple[str, ...]]) -> Iterator[Problem]:
    """Build the model, and ask mmdet's NumClassCheckHook."""
    from mmdet.engine.hooks import NumClassCheckHook
    from mmdet.registry import MODELS

    file = Path(cfg.filename).name
    try:
        model = MODELS.build(cfg.model)
    except Exception as error:  # whatever a wrong config leads to
        message = f'the model cannot be built: {type(error).__name__}: {error}'
        yield Problem('num-classes', file, ' '.join(message.split()), '')
        return
    for part, names in classes.items():
        data = SimpleNamespace(dataset=SimpleNamespace(metainfo=dict(classes=names)))
        runner = SimpleNamespace(
            model=model, train_dataloader=data, val_dataloader=data, logger=None
        )
        try:
            NumClassCheckHook()._check_head(runner, 'train')
        except AssertionError as error:
            detail = f'{part}_dataloader: {" ".join(str(error).split())}'
            detail = detail.replace('SimpleNamespace', f'its data, {list(names)}')
            yield Problem('num-classes', file, detail, '')


def _uses(
    cfg: Any,
) -> tuple[dict[tuple[Any, ...], set[str]], dict[str, tuple[str, ...]], list[str]]:
    """Return the data sets that a config names, each with the parts that use it.

    And the classes of each part, and what is not checked.
    """
    from mmdet.datasets import CocoDataset, XMLDataset
    from mmdet.registry import DATASETS

    uses: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    skipped: list[str] = []
    classes: dict[str, tuple[str, ...]] = {}
    for part in _PARTS:
        for data in _leaves((cfg.get(f'{part}_dataloader') or {}).get('dataset')):
            kind = data['type']
            kind = kind if isinstance(kind, type) else DATASETS.get(kind)
            if kind is None or not issubclass(kind, (CocoDataset, XMLDataset)):
                skipped.append(f'{part}_dataloader: {data["type"]} is not checked')
                continue
            names = classes[part] = _classes(data, kind)
            top, prefix = data.get('data_root'), data.get('data_prefix') or {}
            file = _join(top, data.get('ann_file'))
            if issubclass(kind, CocoDataset):
                key = ('coco', _join(top, prefix.get('img')), '', '', names, file)
            else:
                given = 'sub_data_root' in prefix
                root = _join(top, prefix['sub_data_root']) if given else Path()
                folders = (
                    data.get('img_subdir', 'JPEGImages'),
                    data.get('ann_subdir', 'Annotations'),
                )
                key = ('voc', root, *folders, names, file)
            if not file.is_file():
                raise FileNotFoundError(f'{part}_dataloader: there is no file {file}')
            uses[key].add(part)
    return uses, classes, skipped


def check_config(
    path: Path, jobs: int = 1, frame: str = '', copies: bool = False
) -> list[Checked]:
    """Check the data, classes and numbers of classes that a config names.

    Args:
        path: The config.
        jobs: Number of processes.
        frame: As for :func:`~tools.dataset_tools.voc_data.check`.
        copies: Whether to look for copies of photographs.

    Returns:
        Each data set, with what is wrong with all together at the first.

    Raises:
        ValueError: If the config cannot be read, or names no data of VOC or COCO.
    """
    cfg = read_config(path)
    from mmdet.utils import register_all_modules
    from mmengine.registry import init_default_scope

    from rambo_det.own_data import follow_own_data

    register_all_modules(init_default_scope=False)
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    cfg = follow_own_data(cfg)
    with reading(path, 'a config with data as mmdet reads them'):
        uses, classes, skipped = _uses(cfg)
    if not uses:
        raise ValueError(f'{path} names no data of VOC or COCO to check: {skipped}')
    told = {
        key: 'test' if 'test' in parts else min(parts) for key, parts in uses.items()
    }
    lists: dict[Any, list[Any]] = defaultdict(list)
    for *data, file in uses:
        lists[tuple(data)].append(file)
    found = []
    for (kind, root, images, xmls, names), files in lists.items():
        if kind == 'coco':
            for file in files:
                checked = check_coco(file, str(root.absolute()), names, jobs, frame)
                checked.lists[0].told = told[kind, root, images, xmls, names, file]
                checked.lists[0].file = str(file)
                found.append(checked)
            continue
        settings = Settings(root, images, xmls, names, copies=copies)
        named = [
            (
                f,
                str(f) if len(lists) > 1 else os.path.relpath(f, root),
                told[kind, root, images, xmls, names, f],
            )
            for f in files
        ]
        found.append(check(settings, jobs=jobs, frame=frame, named=named))
    parts = [part for checked in found for part in checked.parts]
    overlaps, _, pairs = compare_parts(parts, across=True)
    first = found[0]
    first.pairs += pairs
    first.problems += [replace(problem, repair='') for problem in overlaps]
    first.notes += skipped
    for key, several in uses.items():
        if 'train' in several and len(several) > 1:
            detail = f'{key[-1]} is used for {" and ".join(sorted(several))}'
            first.problems.append(Problem('splits-overlap', path.name, detail, ''))
    if cfg.get('model'):
        first.problems += _model_problems(cfg, classes)
    return found
