"""What tools/ablate_head.py prints of its results, and how well orders agree."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Iterable, Sequence

import numpy as np
from markdown_table import markdown_row, markdown_table
from results_table import read_ap50
from scipy import stats


def header(epochs: int) -> str:
    """The head of the table that grows while results come."""
    names = ['setting', 'seed', *map(str, range(1, epochs + 1)), 'minutes']
    return markdown_table([names])


def row(name: str, seed: str, run: dict[str, Any], epochs: int) -> str:
    """One run's AP50 after each epoch."""
    found = dict(zip(run['epochs'], run['ap50']))
    cells = [f'{found[e]:.1f}' if e in found else '' for e in range(1, epochs + 1)]
    return markdown_row([name, seed, *cells, f'{run["minutes"]:.1f}'])


def final_ap50(settings: dict[str, Any]) -> dict[str, list[float]]:
    """AP50 at the end of each seed's run, by setting."""
    return {
        name: [run['ap50'][-1] for run in setting['runs'].values()]
        for name, setting in settings.items()
        if setting['runs']
    }


def seeds_table(settings: dict[str, Any]) -> str:
    """Mean and standard deviation of the final AP50 over the seeds."""
    rows = [['setting', 'seeds', 'final AP50', 'sd']]
    for name, values in final_ap50(settings).items():
        spread = f'{stdev(values):.2f}' if len(values) > 1 else ''
        rows.append([name, str(len(values)), f'{mean(values):.2f}', spread])
    return markdown_table(rows)


def per_class_table(settings: dict[str, Any], classes: Sequence[str]) -> str:
    """Final AP50 of each class, mean over the seeds: a row per class."""
    means = {
        name: np.mean([run['per_class'] for run in setting['runs'].values()], axis=0)
        for name, setting in settings.items()
        if setting['runs']
    }
    rows = [['class', *means]]
    for index, name in enumerate(classes):
        rows.append([name, *(f'{values[index]:.1f}' for values in means.values())])
    return markdown_table(rows)


def diagnosis_table(settings: dict[str, Any]) -> str:
    """The diagnosis of each epoch of all runs that have one."""
    columns = dict(
        cls_norm='cls gradient', box_norm='box gradient', cosine='their cosine'
    )
    names = ['setting', 'seed', 'epoch', *columns.values()]
    rows = [[*names, 'positives without gradient']]
    for name, setting in settings.items():
        for seed, run in setting['runs'].items():
            for epoch, found in enumerate(run.get('diagnosis', []), start=1):
                shares = (
                    f'{k} {100 * v:.1f} %' for k, v in found['zero_share'].items()
                )
                values = (f'{found[column]:.3g}' for column in columns)
                rows.append([name, seed, str(epoch), *values, ', '.join(shares)])
    return markdown_table(rows, text_columns=(0, len(names)))


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


def rank_correlations(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Kendall's tau-b and Spearman's rho; NaN where one side is constant."""
    if min(len(set(a)), len(set(b))) < 2:  # scipy would warn
        return float('nan'), float('nan')
    return float(stats.kendalltau(a, b)[0]), float(stats.spearmanr(a, b)[0])


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
    tau, rho = rank_correlations(
        [heads[name] for name in names], [full[name] for name in names]
    )
    rows = [['setting', 'head only', 'full training']]
    for name in sorted(names, key=lambda name: -full[name]):
        rows.append([name, f'{heads[name]:.1f}', f'{full[name]:.1f}'])
    lines = [
        markdown_table(rows),
        '',
        f"Kendall's tau {tau:.2f}, Spearman's rho {rho:.2f} over {len(names)} "
        'settings.',
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
