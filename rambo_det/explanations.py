"""Errors of mmengine and mmdet that a beginner meets, said so that they help.

Each is raised before the first step: data of which no image is left, classes that the
annotations do not have, and pretrained weights that are not there. No hook runs as
early as that, so :func:`explain_errors` wraps the functions that raise them. What they
return stays as it is.
"""

import difflib
import functools
import http.client
import logging
import os
import os.path as osp
import xml.etree.ElementTree as ET
from collections import Counter
from typing import Any, Callable, Dict, List, Sequence
from typing import Counter as CounterType

import mmengine
from mmdet.datasets import CocoDataset, XMLDataset
from mmengine.fileio import get, load
from mmengine.logging import print_log
from mmengine.model.weight_init import PretrainedInit

CHECK = 'tools/dataset_tools/check_voc.py'
# What configs of this package read, and what they load without it.
_VARIABLES = {
    'RAMBO_MOBILENETV2': 'open-mmlab://mmdet/mobilenet_v2',
    'RAMBO_RESNET50': 'https://download.pytorch.org/models/resnet50-0676ba61.pth',
}
# Files of mmengine with the addresses behind the names.
_HUBS = {'open-mmlab': 'openmmlab.json', 'torchvision': 'torchvision_0.12.json'}
_Method = Callable[..., Any]


def one_string(classes: str) -> str:
    """Say what is wrong with a string in the place of a tuple of names."""
    return (
        f'expected a tuple of class names, got the string classes={classes!r}, each '
        'letter of which would be a class. A single class needs a comma: '
        f'classes=({classes!r},)'
    )


def _annotated(dataset: Any) -> CounterType[str]:
    """Count the objects of each name in the annotations, whatever the classes are."""
    if isinstance(dataset, CocoDataset):
        content = load(dataset.ann_file, 'json', backend_args=dataset.backend_args)
        names = {each['id']: each['name'] for each in content.get('categories', [])}
        found = (each.get('category_id') for each in content.get('annotations', []))
        return Counter(names[each] for each in found if each in names)
    total: CounterType[str] = Counter()
    for info in dataset.data_list:
        root = ET.fromstring(get(info['xml_path'], backend_args=dataset.backend_args))
        total.update(str(each.findtext('name')) for each in root.findall('object'))
    return total


def _meant(name: str, others: Sequence[str]) -> str:
    """Return a class name, and the name that it may be a misspelling of."""
    bare = {other.replace(' ', '').casefold(): other for other in others}
    like = difflib.get_close_matches(name.replace(' ', '').casefold(), bare, 1)
    return f'{name!r} (is {bare[like[0]]!r} meant?)' if like else repr(name)


def _compare_classes(dataset: Any, kept: List[Dict[str, Any]]) -> None:
    """Raise where no image is left, and warn of classes without an object."""
    kind, classes = type(dataset).__name__, dataset.metainfo.get('classes') or ()
    found = {
        instance.get('bbox_label')
        for info in dataset.data_list
        for instance in info.get('instances', [])
    }
    if not dataset.data_list:
        raise ValueError(
            f'{kind}: {dataset.ann_file} names no image. It needs a line for each, '
            'without folder and suffix, like 000001'
        )
    if kept and found >= set(range(len(classes))):
        return
    names = _annotated(dataset)
    missing = [name for name in classes if not names[name]]
    others = sorted(set(names) - set(classes))
    shown = ', '.join(f'{name!r} ({count})' for name, count in names.most_common())
    configured = (_meant(n, others) if n in missing else repr(n) for n in classes)
    table = (
        f'\n  configured: {", ".join(configured)}'
        f'\n  annotated:  {shown or "no object"}'
        f'\n  ({dataset.ann_file})'
    )
    if any(' ' in name for name in names):
        table += '\n  --cfg-options takes blanks out of names; in a config they stay'
    nothing = len(missing) == len(classes)
    if not dataset.test_mode and (not kept or (nothing and names)):
        reason = (
            'no object is of a configured class'
            if nothing
            else f'filter_cfg={dataset.filter_cfg} drops all of them'
        )
        raise ValueError(
            f'{kind}: none of {len(dataset.data_list)} images is left to train with, '
            f'since {reason}. Classes are spelled as in the annotations:{table}'
        )
    if missing and others:
        wrong = ', '.join(map(repr, missing))
        message = f'{kind}: no object is of the class {wrong}:{table}'
        print_log(message, logger='current', level=logging.WARNING)


def _load_data_list(original: _Method) -> _Method:
    def explained(self: Any) -> Any:
        classes = self.metainfo.get('classes')
        if isinstance(classes, str):
            raise ValueError(f'{type(self).__name__}: {one_string(classes)}')
        try:
            return original(self)
        except FileNotFoundError as error:
            if error.filename is None or isinstance(self, CocoDataset):
                raise
            raise FileNotFoundError(
                f'{type(self).__name__}: there is no {error.filename}. Expected in '
                f'data_root={self.data_root!r}: {self.ann_file}, and for each of its '
                f'lines NAME {self.ann_subdir}/NAME.xml and {self.img_subdir}/NAME.jpg.'
                f' {CHECK} tells all that is missing'
            ) from None

    return explained


def _filter_data(original: _Method) -> _Method:
    def explained(self: Any) -> Any:
        kept = original(self)
        _compare_classes(self, kept)
        return kept

    return explained


def _missing_weights(module: Any, checkpoint: str, error: Exception) -> str:
    """Say how to give the pretrained weights of a module."""
    message = (
        f'{type(module).__name__}: cannot load the pretrained weights {checkpoint}: '
        f'{error}'
    )
    read = [
        variable
        for variable, usual in _VARIABLES.items()
        if checkpoint in (os.environ.get(variable), usual)
    ]
    usual = _VARIABLES[read[0]] if read else checkpoint
    scheme, _, name = usual.partition('://')
    if name:
        hub = _HUBS.get(scheme)
        known = load(osp.join(mmengine.__path__[0], 'hub', hub)) if hub else {}
        address = known.get(name, usual)
        unset = f', {read[0]} not being set' if read else ''
        message += f'\n  With a network{unset}: it is downloaded once, from {address}'
        if isinstance(error, ImportError):
            message += f' (install {error.name}, or name that address as below)'
    option = '--cfg-options model.backbone.init_cfg'
    message += '\n  Without one: bring the file here, and name it with '
    if read:
        message += f'{read[0]}=FILE in the environment, or with '
    return f'{message}{option}.checkpoint=FILE\n  From random weights: {option}=None'


def _pretrained(original: _Method) -> _Method:
    def explained(self: Any, module: Any) -> Any:
        try:
            return original(self, module)
        except (OSError, ImportError, http.client.HTTPException) as error:
            message = _missing_weights(module, self.checkpoint, error)
            raise FileNotFoundError(message) from error

    return explained


def explain_errors() -> None:
    """Wrap the functions whose errors are explained here; done once."""
    for owner, name, wrap in (
        (XMLDataset, 'load_data_list', _load_data_list),
        (XMLDataset, 'filter_data', _filter_data),
        (CocoDataset, 'load_data_list', _load_data_list),
        (CocoDataset, 'filter_data', _filter_data),
        (PretrainedInit, '__call__', _pretrained),
    ):
        original = getattr(owner, name)
        if not hasattr(original, '__wrapped__'):
            setattr(owner, name, functools.wraps(original)(wrap(original)))
