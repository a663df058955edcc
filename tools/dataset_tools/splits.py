"""What two splits share that must not: images, files, and photographs."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Iterator, Mapping, Sequence, Tuple

import numpy as np

from tools.dataset_tools.voc_files import Examined, Problem
from tools.dataset_tools.voc_lists import ImageList

Part = Tuple[ImageList, Mapping[str, Examined]]
# Of two images that show the same: list, name, list, name, and how it was found.
Pair = Tuple[str, str, str, str, str]
# From a list to the one that decides: of an image in both, the former loses it.
_ROLES = ('train', 'trainval', 'val', 'test')
_PARTS = {('train', 'trainval'), ('trainval', 'val')}
# Roboflow's NAME_jpg.rf.HASH.jpg
ROBOFLOW = re.compile(r'(_(jpe?g|png|bmp|webp))?\.rf\.[0-9A-Za-z]+$', re.I)
# Hashes of 64 bits and thumbnails of one photograph, of another size or compression.
_BITS, _CORRELATION = 10, 0.97
_POPCOUNT = np.array([bin(i).count('1') for i in range(256)], np.uint8)


def _pairs(parts: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
    """Yield the pairs that must not share images, the one that loses them first."""
    known = [part for part in parts if part[0].role]
    known.sort(key=lambda part: _ROLES.index(part[0].role[0]))
    for position, first in enumerate(known):
        for second in known[position + 1 :]:
            roles = first[0].role[0], second[0].role[0]
            # train_fold1 and val_fold2 may share images, train_fold1 and test not.
            rests = {first[0].role[1], second[0].role[1]} - {''}
            if roles[0] != roles[1] and roles not in _PARTS and len(rests) < 2:
                yield first, second


def _looks(part: Part) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the images of a list that have a look, their hashes and thumbnails."""
    each, examined = part
    names = [name for name in each.names if examined[name].look]
    rows = [np.frombuffer(examined[name].look, np.uint8) for name in names]
    table = np.stack(rows) if rows else np.zeros((0, 9), np.uint8)
    thumbs = table[:, 8:].astype(np.float32)
    thumbs -= thumbs.mean(1, keepdims=True)
    thumbs /= np.maximum(np.linalg.norm(thumbs, axis=1, keepdims=True), 16)
    return names, table[:, :8], thumbs


def _alike(first: Part, second: Part) -> Iterator[tuple[str, str, str]]:
    """Yield images that look the same, each with how near their hashes are."""
    names, codes, thumbs = _looks(first)
    others, other_codes, other_thumbs = _looks(second)
    for name, code, thumb in zip(names, codes, thumbs):
        distance = _POPCOUNT[code ^ other_codes].sum(1, dtype=np.int64)
        for at in np.flatnonzero(distance <= _BITS):
            if other_thumbs[at] @ thumb > _CORRELATION:
                yield name, others[at], f'hash, {distance[at]} of 64 bits differ'


def _copies(first: Part, second: Part) -> Iterator[tuple[str, str, str]]:
    """Yield copies of one photograph, by their names and by their looks."""
    by_name = defaultdict(list)
    for name in second[0].names:
        if ROBOFLOW.search(name):
            by_name[ROBOFLOW.sub('', name).rpartition('/')[2]].append(name)
    seen = set()
    for name in first[0].names:
        if ROBOFLOW.search(name):
            for other in by_name[ROBOFLOW.sub('', name).rpartition('/')[2]]:
                seen.add((name, other))
                yield name, other, 'name'
    for name, other, how in _alike(first, second):
        if (name, other) not in seen:
            yield name, other, how


def _without_emptying(part: Part, lost: set[str]) -> set[str]:
    """Return what a list may lose: less than half, and no class as a whole."""
    each, examined = part
    if 2 * len(lost) > len(each.names):
        return set()
    left: Counter[str] = Counter()
    for name in each.names:
        if name not in lost:
            left.update(examined[name].counting)
    return {name for name in lost if all(left[c] for c in examined[name].counting)}


def compare_parts(
    parts: Sequence[Part], across: bool = False
) -> tuple[list[Problem], dict[str, set[str]], list[Pair]]:
    """Find images that are in two splits, by name, by content or by look.

    Args:
        parts: The lists with what was found in their images.
        across: Compare lists of different data sets alone.

    Returns:
        The problems, for each list the images that its repaired copy loses, and the
        pairs of copies.
    """
    found: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    pairs: list[Pair] = []
    by_place = {part[0].place: part for part in parts}
    for first, second in _pairs(parts):
        same_data = first[1] is second[1]
        if same_data and across:
            continue
        copies = {second[1][name].digest: name for name in second[0].names}
        copies.pop(None, None)
        others = set(second[0].names) if same_data else set()
        stem, place = second[0].stem, first[0].place
        exact = set()
        for name in first[0].names:
            same = copies.get(first[1][name].digest)
            if name in others:
                detail = f'{name} is also in {stem}'
                found[place].append((name, 'splits-overlap', detail))
            elif same is not None:
                detail = f'{name} is the same image as {same} in {stem}'
                found[place].append((name, 'splits-same-content', detail))
            else:
                continue
            exact.add(name)
        by_other: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name, other, how in _copies(first, second):
            if name not in exact and not (same_data and other in first[0].names):
                by_other[name].append((other, how))
                pairs.append((place, name, second[0].place, other, how))
        for name, twins in by_other.items():
            more = f' and {len(twins) - 1} more' if len(twins) > 1 else ''
            detail = f'{name} shows what {twins[0][0]} in {stem} does{more}'
            detail += f' ({twins[0][1]})'
            found[place].append((name, 'splits-copies', detail))
    problems, losses = [], {}
    for place, rows in found.items():
        lost = {name for name, kind, _ in rows if kind != 'splits-copies'}
        losses[place] = kept = _without_emptying(by_place[place], lost)
        for name, kind, detail in rows:
            repair = f'taken out of {by_place[place][0].stem}' if name in kept else ''
            if kind == 'splits-copies':
                repair = ''
            problems.append(Problem(kind, place, detail, repair))
    return problems, losses, pairs
