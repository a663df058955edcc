"""What tools/experiments/compare.py asks of configs before it trains them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger

# What the last test of a run depends on and its training does not.
TEST_KEYS = ('model.test_cfg.', 'test_cfg.', 'test_dataloader.', 'test_evaluator.')
# Where types are imported from, and a check that stops a training or does nothing.
IMPORTS, CHECK = 'custom_imports', 'NumClassCheckHook'
_VARIABLE = re.compile(r'\{\{[\'"]?\s*\$(\w+)\s*:\s*(\S*?)\s*[\'"]?\}\}')


@dataclass(frozen=True)
class Candidate:
    """A config to be compared.

    Attributes:
        path: Its file.
        cfg: The config with the options merged in.
        resolved: The same, but for the seed and what cannot change a result, and
            with the names of environment variables where the others have the
            paths in them, so that it does not change where the data are moved.
        name: What to call it instead of by its file.
    """

    path: Path
    cfg: Config
    resolved: dict[str, Any]
    name: str = ''

    @property
    def stem(self) -> str:
        """The name of the config."""
        return self.name or self.path.stem

    @property
    def sha(self) -> str:
        """The SHA-256 of the resolved config."""
        return hashlib.sha256(json.dumps(self.resolved).encode()).hexdigest()

    @property
    def epochs(self) -> int:
        """How many epochs it trains.

        Raises:
            ValueError: If it does not train by epochs.
        """
        epochs = (self.cfg.get('train_cfg') or {}).get('max_epochs')
        if not isinstance(epochs, int) or epochs < 1:
            raise ValueError(
                f'{self.path}: train_cfg.max_epochs must be a positive number of '
                f'epochs, got {epochs!r}; runs are continued and compared by epochs'
            )
        return epochs


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _load(path: Path, options: Mapping[str, Any]) -> Config:
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options)
    return cfg


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Parse ``--cfg-options`` as mmdet's scripts do.

    Raises:
        ValueError: If an option is no pair or would set the seed.
    """
    for option in options:
        if '=' not in option:
            raise ValueError(f'--cfg-options must be pairs key=value, got {option!r}')
        if option.startswith('randomness.seed='):
            raise ValueError(
                f'--cfg-options must leave the seed alone, got {option!r}; name the '
                'seeds with --seeds'
            )
    if not options:
        return {}
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='+', action=DictAction)
    return parser.parse_args(['--options', *options]).options


def load(path: Path, options: Mapping[str, Any]) -> Candidate:
    """Load a config.

    Raises:
        ValueError: If there is no such file.
    """
    if not path.is_file():
        raise ValueError(f'CONFIG must be a config file, got {path}')
    # mmengine tells of every environment variable that it reads.
    MMLogger.get_instance('mmengine').setLevel(logging.WARNING)
    cfg = _load(path, options)
    # A default with a slash says that the variable holds a path.
    paths = [name for name, default in _VARIABLE.findall(cfg.text) if '/' in default]
    with _environment({name: f'${name}' for name in paths}):
        portable = _load(path, {**options, 'randomness.seed': None})
    text = json.dumps(portable.to_dict(), sort_keys=True, default=repr)
    resolved = _what_counts(json.loads(text))
    return Candidate(path=path, cfg=cfg, resolved=resolved)


def _what_counts(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what cannot change a result."""
    found = {key: value for key, value in resolved.items() if key != IMPORTS}
    hooks = found.get('default_hooks')
    if hooks:
        found['default_hooks'] = {
            name: hook
            for name, hook in hooks.items()
            if not isinstance(hook, dict) or hook.get('type') != CHECK
        }
    return found


def _flat(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the path of every leaf, and the leaf."""
    if isinstance(value, (dict, list)) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in pairs:
            yield from _flat(child, f'{path}.{key}' if path else str(key))
    else:
        yield path, value


def _changed(old: Any, new: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the path of every leaf that differs, and how both look."""
    before, after = dict(_flat(old)), dict(_flat(new))
    missing = object()
    for key in sorted(set(before) | set(after)):
        values = before.get(key, missing), after.get(key, missing)
        if values[0] != values[1]:
            shown = ['nothing' if v is missing else repr(v) for v in values]
            yield key, shown[0], shown[1]


def trained_alike(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two resolved configs differ in nothing but how the detector is tested."""
    # A run of before these were left out goes on.
    changed = _changed(_what_counts(old), _what_counts(new))
    return all(key.startswith(TEST_KEYS) for key, *_ in changed)


def changes(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 5) -> str:
    """Say in a line what differs between two resolved configs."""
    texts = [f'{key}: {was} -> {now}' for key, was, now in _changed(old, new)]
    more = f' and {len(texts) - limit} more' if len(texts) > limit else ''
    return '; '.join(texts[:limit]) + more


def _find(value: Any, key: str) -> Iterator[Any]:
    """Yield what stands under a key, at any depth."""
    if isinstance(value, Mapping):
        for name, child in value.items():
            if name == key:
                yield child
            else:
                yield from _find(child, key)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _find(child, key)


def _test_split(candidate: Candidate) -> dict[str, Any]:
    dataset = candidate.cfg.test_dataloader.dataset
    keys = ('type', 'data_root', 'ann_file', 'data_prefix', 'metainfo')
    return {key: dataset.get(key) for key in keys}


def _classes(candidate: Candidate) -> list[int]:
    heads = [h for h in _find(candidate.cfg.model, 'bbox_head') if h is not None]
    return sorted(set(_find(heads, 'num_classes')))


def _check_files(candidate: Candidate) -> None:
    """Refuse data and weights that are not there."""
    cfg = candidate.cfg
    loaders = [cfg.get(f'{name}_dataloader') for name in ('train', 'val', 'test')]
    needed = [('data_root', root) for root in _find(loaders, 'data_root')]
    needed += [('checkpoint', path) for path in _find(cfg.model, 'checkpoint')]
    needed.append(('load_from', cfg.get('load_from')))
    for key, path in needed:
        # Not a path: something to download.
        if not isinstance(path, str) or '://' in path or Path(path).exists():
            continue
        names = [
            name
            for name, default in _VARIABLE.findall(cfg.text)
            if path.startswith(os.environ.get(name, default))
        ]
        advice = 'put it there'
        if names:
            now = os.environ.get(names[0])
            value = 'is not set' if now is None else f'is {now!r}'
            advice += f', or name the path in {names[0]}, which {value}'
        raise ValueError(f'{candidate.path}: {key} {path!r} does not exist; {advice}')


def check(candidates: Sequence[Candidate]) -> None:
    """Refuse configs that cannot be compared or trained here.

    Raises:
        ValueError: If names are not distinct, test splits, classes or epochs
            differ, or data or weights are missing.
    """
    first = candidates[0]
    for place, candidate in enumerate(candidates):
        for other in candidates[:place]:
            if other.stem == candidate.stem:
                raise ValueError(
                    f'{other.path} and {candidate.path} have the same name, by which '
                    'results are told apart; rename one'
                )
        for what, ask in (
            ('test split', _test_split),
            ('number of classes', _classes),
            ('number of epochs', lambda c: c.epochs),
        ):
            values = ask(first), ask(candidate)
            if values[0] != values[1]:
                raise ValueError(
                    f'{first.stem} and {candidate.stem} differ in the {what}: '
                    f'{values[0]} and {values[1]}; a comparison needs configs that '
                    'share test split, classes and epochs'
                )
        _check_files(candidate)
