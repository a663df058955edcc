"""The table and the pictures of compare.py, from the files it has written.

A folder holds two files for each run, ``CONFIG_seed_N.json`` and, with its matched
detections, ``CONFIG_seed_N.npz``, and ``comparison.json`` with the intervals, which
take the detections of all runs to compute.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

from tools.analysis_tools.matched_ap import (
    RECALLS,
    Matches,
    paired_interval,
    resampled_ap,
)
from tools.common.atomic_file import atomic_file
from tools.common.markdown_table import markdown_table

COMPARISON = 'comparison.json'
LEVEL = 0.95
# For each config, by the stem of its file name, the record of each seed.
Groups = Mapping[str, Mapping[int, 'dict[str, Any]']]


def now() -> str:
    """Return the time as it stands in the files."""
    return datetime.now(timezone.utc).isoformat(timespec='seconds')


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, a line for each key, at once or not at all."""
    lines = [f' {json.dumps(key)}: {json.dumps(record[key])}' for key in record]
    with atomic_file(path) as draft:
        draft.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')


def read_json(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: If the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{path} is no JSON file ({error}); restore it, or delete it to have it '
            'written anew'
        ) from error


def run_name(stem: str, seed: int) -> str:
    """Return the name of a run's file."""
    return f'{stem}_seed_{seed}.json'


def matches_path(record: Path) -> Path:
    """Return where the matched detections of a run are, given its file."""
    return record.with_suffix('.npz')


def read_groups(out: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Read the files of all runs in a folder, sorted by config and seed."""
    records = [read_json(path) for path in out.glob('*_seed_*.json')]
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for record in sorted(records, key=lambda r: (r['config'], r['seed'])):
        groups.setdefault(record['config'], {})[record['seed']] = record
    return groups


def _fingerprints(groups: Groups) -> dict[str, list[Any]]:
    """What of the runs the intervals depend on."""
    return {
        run_name(stem, seed): [record['config_sha'], record['ap50']]
        for stem, records in groups.items()
        for seed, record in records.items()
    }


def compare(
    name: str,
    groups: Groups,
    matches: Mapping[str, Mapping[int, Matches]],
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the intervals of the paired differences to the first config.

    Args:
        name: What the comparison is called.
        groups: The runs' records; the first config is the baseline.
        matches: The runs' matched detections.
        resamples: How many resamples of test images and seeds.
        seed: Seed of the generator that draws them.

    Returns:
        The record for ``comparison.json``.
    """
    keys = [(stem, s) for stem, records in groups.items() for s in records]
    drawn = resampled_ap([matches[stem][s] for stem, s in keys], resamples, seed)
    ap = dict(zip(keys, drawn))
    baseline, *others = groups
    intervals = {}
    for stem in others:
        common = common_seeds(groups, stem)
        if common:
            differences = np.stack([ap[stem, s] - ap[baseline, s] for s in common])
            intervals[stem] = paired_interval(differences, seed, LEVEL)
    return dict(
        name=name,
        date=now(),
        configs=list(groups),
        level=LEVEL,
        resamples=resamples,
        bootstrap_seed=seed,
        intervals=intervals,
        runs=_fingerprints(groups),
    )


def common_seeds(groups: Groups, stem: str) -> list[int]:
    """Return the seeds that a config shares with the baseline, the first config."""
    return sorted(set(groups[stem]) & set(groups[next(iter(groups))]))


def read_comparison(out: Path) -> tuple[dict[str, Any], Groups]:
    """Read a folder's comparison and the runs in it.

    Raises:
        ValueError: If there is none, or if the runs have changed since.
    """
    path = out / COMPARISON
    if not path.is_file():
        raise ValueError(
            f'{path} does not exist; run compare.py with the configs and '
            'without --table-only first'
        )
    comparison = read_json(path)
    found = read_groups(out)
    wanted = comparison['runs']
    groups = {
        stem: {
            seed: record
            for seed, record in found.get(stem, {}).items()
            if run_name(stem, seed) in wanted
        }
        for stem in comparison['configs']
    }
    have = _fingerprints(groups)
    changed = sorted(key for key in wanted if wanted[key] != have.get(key))
    if changed:
        raise ValueError(
            f'{path} was computed from other runs than those in {out}: '
            f'{", ".join(changed)} changed or went; run compare.py with the '
            'configs and without --table-only to compute it anew'
        )
    return comparison, groups


def short_names(stems: Sequence[str]) -> dict[str, str]:
    """Return names without what all of them begin or end with."""
    parts = [stem.split('_') for stem in stems]
    shortest = min(map(len, parts))
    if len(set(stems)) < 2:
        return {stem: stem for stem in stems}
    first = 0
    while first < shortest and len({part[first] for part in parts}) == 1:
        first += 1
    last = 0
    while last < shortest - first and len({part[-1 - last] for part in parts}) == 1:
        last += 1
    names = ['_'.join(part[first : len(part) - last]) for part in parts]
    return dict(zip(stems, names if all(names) else stems))


def _percent(values: Sequence[float]) -> str:
    """Lay out a mean, with the standard deviation where there is one."""
    text = f'{100 * np.mean(values):.1f}'
    return f'{text} ± {100 * np.std(values, ddof=1):.1f}' if len(values) > 1 else text


def _difference(groups: Groups, stem: str, key: str) -> float:
    """Return the mean difference to the baseline, in percent."""
    baseline = groups[next(iter(groups))]
    seeds = common_seeds(groups, stem)
    return 100 * np.mean([groups[stem][s][key] - baseline[s][key] for s in seeds])


def table(comparison: Mapping[str, Any], groups: Groups) -> str:
    """Return the comparison as a Markdown table with a line that explains it."""
    names = short_names(list(groups))
    level = f'{100 * comparison["level"]:.0f} %'
    rows = [['config', 'seeds', 'AP50', 'AP', f'Δ AP50 [{level} interval]', 'Δ AP']]
    for place, (stem, records) in enumerate(groups.items()):
        cells = [_percent([r[key] for r in records.values()]) for key in ('ap50', 'ap')]
        differences = ['', '']
        if place and stem in comparison['intervals']:
            low, high = (100 * bound for bound in comparison['intervals'][stem])
            differences = [
                f'{_difference(groups, stem, "ap50"):+.1f} [{low:+.1f}, {high:+.1f}]',
                f'{_difference(groups, stem, "ap"):+.1f}',
            ]
        elif place:
            differences = ['no common seed', '']
        rows.append([names[stem], str(len(records)), *cells, *differences])
    baseline = next(iter(groups))
    images = next(iter(groups[baseline].values()))['images']
    note = (
        f'In percent, on {images} test images; mean ± standard deviation over seeds. '
        'AP50 is that of VOC (area), AP that of COCO.'
    )
    if len(groups) > 1:
        note += (
            f' Δ is the difference to `{names[baseline]}` with the same seeds; its '
            'interval is a paired bootstrap over images and seeds, '
            f'{comparison["resamples"]} resamples.'
        )
    return f'{markdown_table(rows)}\n\n{note}'


def marks(name: str) -> tuple[str, str]:
    """Return the lines of a page between which a comparison's table stands."""
    return f'<!-- compare {name} -->', f'<!-- end {name} -->'


def _series(record: Mapping[str, Any], key: str) -> tuple[list[int], list[float]]:
    """Return the epochs at which a value is known, and the values."""
    points = [(point['epoch'], point[key]) for point in record['curve'] if key in point]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _draw_training(axis: Any, groups: Groups, key: str, scale: float = 1.0) -> None:
    """Draw a value by epoch, thin for each seed and thick for the mean."""
    for place, records in enumerate(groups.values()):
        colour = f'C{place % 10}'
        by_epoch: dict[int, list[float]] = {}
        for record in records.values():
            epochs, values = _series(record, key)
            values = [scale * value for value in values]
            axis.plot(epochs, values, color=colour, lw=0.8, alpha=0.5)
            for epoch, value in zip(epochs, values):
                by_epoch.setdefault(epoch, []).append(value)
        means = {epoch: np.mean(by_epoch[epoch]) for epoch in sorted(by_epoch)}
        axis.plot(means.keys(), means.values(), color=colour, lw=2.2, marker='.')
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel('epoch')
    axis.grid(alpha=0.3)


def plot(groups: Groups, path: str | Path) -> None:
    """Draw validation AP50 and the classification loss by epoch, and precision.

    The loss has an axis of logarithms: losses of different kinds have different
    scales, and only their course can be compared.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.4), layout='constrained')
    _draw_training(axes[0], groups, 'val_ap50', scale=100)
    axes[0].set_title('AP50 during training, percent', fontsize=10)
    _draw_training(axes[1], groups, 'loss_cls')
    axes[1].set_yscale('log')
    # Numbers at 1, 2 and 5 of each decade: all nine would overlap.
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_major_formatter('{x:g}')
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set_title('loss_cls, mean of the epoch', fontsize=10)
    names = short_names(list(groups))
    for place, (stem, records) in enumerate(groups.items()):
        curves = [record['pr_curve'] for record in records.values()]
        mean = np.mean([record['ap50'] for record in records.values()])
        seeds = f'{len(curves)} seed{"s" * (len(curves) > 1)}'
        label = f'{names[stem]}: AP50 {100 * mean:.1f} ({seeds})'
        colour = f'C{place % 10}'
        for curve in curves:
            axes[2].plot(RECALLS, curve, color=colour, lw=0.8, alpha=0.5)
        axes[2].plot(
            RECALLS, np.mean(curves, axis=0), color=colour, lw=2.2, label=label
        )
    axes[2].set(xlim=(0, 1.02), ylim=(0, 1.04), xlabel='recall')
    axes[2].set_title('precision at IoU 0.5, mean over classes', fontsize=10)
    axes[2].grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=min(3, len(groups)), fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
