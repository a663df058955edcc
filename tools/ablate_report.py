"""What tools/ablate_head.py prints of its results, and how well orders agree."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Iterable, Sequence

import numpy as np
from results_table import read_ap50


def markdown(rows: Iterable[Sequence[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


def header(epochs: int) -> str:
    """The head of the table that grows while results come."""
    names = ['setting', 'seed', *map(str, range(1, epochs + 1)), 'minutes']
    return markdown([names, ['---'] + ['---:'] * (len(names) - 1)])


def row(name: str, seed: str, run: dict[str, Any], epochs: int) -> str:
    """One run's AP50 after each epoch."""
    found = dict(zip(run['epochs'], run['ap50']))
    cells = [f'{found[e]:.1f}' if e in found else '' for e in range(1, epochs + 1)]
    return markdown([[name, seed, *cells, f'{run["minutes"]:.1f}']])


def final_ap50(settings: dict[str, Any]) -> dict[str, list[float]]:
    """AP50 at the end of each seed's run, by setting."""
    return {
        name: [run['ap50'][-1] for run in setting['runs'].values()]
        for name, setting in settings.items()
        if setting['runs']
    }


def seeds_table(settings: dict[str, Any]) -> str:
    """Mean and standard deviation of the final AP50 over the seeds."""
    rows = [['setting', 'seeds', 'final AP50', 'sd'], ['---'] + ['---:'] * 3]
    for name, values in final_ap50(settings).items():
        spread = f'{stdev(values):.2f}' if len(values) > 1 else ''
        rows.append([name, str(len(values)), f'{mean(values):.2f}', spread])
    return markdown(rows)


def per_class_table(settings: dict[str, Any], classes: Sequence[str]) -> str:
    """Final AP50 of each class, mean over the seeds: a row per class."""
    means = {
        name: np.mean([run['per_class'] for run in setting['runs'].values()], axis=0)
        for name, setting in settings.items()
        if setting['runs']
    }
    rows = [['class', *means], ['---'] + ['---:'] * len(means)]
    for index, name in enumerate(classes):
        rows.append([name, *(f'{values[index]:.1f}' for values in means.values())])
    return markdown(rows)


def diagnosis_table(settings: dict[str, Any]) -> str:
    """The diagnosis of each epoch of all runs that have one."""
    columns = dict(
        cls_norm='cls gradient', box_norm='box gradient', cosine='their cosine'
    )
    names = ['setting', 'seed', 'epoch', *columns.values()]
    names.append('positives without gradient')
    rows = [names, ['---'] + ['---:'] * 5 + ['---']]
    for name, setting in settings.items():
        for seed, run in setting['runs'].items():
            for epoch, found in enumerate(run.get('diagnosis', []), start=1):
                shares = (
                    f'{k} {100 * v:.1f} %' for k, v in found['zero_share'].items()
                )
                values = (f'{found[column]:.3g}' for column in columns)
                rows.append([name, seed, str(epoch), *values, ', '.join(shares)])
    return markdown(rows)


# Agreement with full training


def read_full(paths: Iterable[Path]) -> dict[str, float]:
    """AP50 of full training in percent, by setting.

    Args:
        paths: JSON objects of AP50 by setting, or ``scalars.json`` of trainings, named
            like the setting, whose last evaluation counts.

    Raises:
        ValueError: If a file is neither.
    """
    result = {}
    for path in paths:
        text = path.read_text()
        try:
            values = json.loads(text)
        except json.JSONDecodeError:  # an object per line
            values = {path.stem: list(read_ap50(path).values())[-1]}
        if not isinstance(values, dict) or not all(
            isinstance(value, (int, float)) for value in values.values()
        ):
            raise ValueError(
                f'ablate_report: --full {path} must be a JSON object of AP50 by '
                'setting, such as {"ce": 43.1}, or the scalars.json of a training'
            )
        result.update(values)
    return result


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b, which allows for ties; NaN where one side is constant."""
    above = np.triu_indices(len(a), k=1)
    signs = [np.sign(np.subtract.outer(values, values))[above] for values in (a, b)]
    untied = np.sqrt(np.prod([np.count_nonzero(sign) for sign in signs]))
    return float(np.sum(signs[0] * signs[1]) / untied) if untied else float('nan')


def spearman_rho(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of the ranks, ties sharing theirs; NaN where one is constant."""
    ranks = [np.sign(np.subtract.outer(values, values)).sum(1) for values in (a, b)]
    scale = np.sqrt(np.prod([np.sum(rank**2) for rank in ranks]))
    return float(np.sum(ranks[0] * ranks[1]) / scale) if scale else float('nan')


def agreement(settings: dict[str, Any], full: dict[str, float]) -> str:
    """Say how well the head's order of settings is that of full training.

    Raises:
        ValueError: If the two have less than two settings in common.
    """
    heads = {name: mean(values) for name, values in final_ap50(settings).items()}
    names = [name for name in heads if name in full]
    if len(names) < 2:
        raise ValueError(
            'ablate_report: --full must have at least two settings in common with the '
            f'results to compare orders, got {sorted(full)} and {sorted(heads)}'
        )
    a, b = [heads[name] for name in names], [full[name] for name in names]
    rows = [['setting', 'head only', 'full training'], ['---', '---:', '---:']]
    for name in sorted(names, key=lambda name: -full[name]):
        rows.append([name, f'{heads[name]:.1f}', f'{full[name]:.1f}'])
    lines = [
        markdown(rows),
        '',
        f"Kendall's tau {kendall_tau(a, b):.2f}, Spearman's rho "
        f'{spearman_rho(a, b):.2f} over {len(names)} settings.',
    ]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            here, there = heads[first] - heads[second], full[first] - full[second]
            if here * there < 0:
                lines.append(
                    f'Wrong order: {first} against {second}, {here:+.1f} here and '
                    f'{there:+.1f} in full training.'
                )
    return '\n'.join(lines)
