"""Print and draw what tools/benchmark_loss.py has measured.

    python tools/benchmark_report.py docs/results/benchmark.json

Prints the Markdown tables of a file, and draws its sweeps into a PNG beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from markdown_table import markdown_table

OURS, SORT, FOCAL = 'RaMBOLoss', 'torch.sort', 'FocalLoss (mmdet)'
LITERAL = 'literal form, 12 argsorts'
QUARTILES = ('median', 'q1', 'q3')


def ratio(case: dict[str, Any] | None, over: str, under: str) -> float | None:
    """How many times as long ``over`` takes, if both were measured."""
    medians = [(case or {'rivals': {}})['rivals'].get(n, {}) for n in (over, under)]
    if not all('median' in result for result in medians):
        return None
    return medians[0]['median'] / medians[1]['median']


def table(case: dict[str, Any]) -> str:
    """Return the table of a case."""
    gpu = any('host_syncs' in result for result in case['rivals'].values())
    head = ['forward + backward', 'median, ms', 'quartiles', '× sort', '× FocalLoss']
    head += ['after another, ms', 'extra memory, × logits', 'runs']
    head += ['host syncs'] * gpu
    lines = [head]
    for name, result in case['rivals'].items():
        if 'note' in result:
            lines.append([name, result['note']] + [''] * (len(head) - 2))
            continue
        ms = [f'{1e3 * result[key]:.3g}' for key in QUARTILES]
        ratios = [ratio(case, name, under) for under in (SORT, FOCAL)]
        lines.append(
            [name, ms[0], f'{ms[1]}–{ms[2]}']
            + ['' if value is None else f'{value:.3g}' for value in ratios]
            + [f'{1e3 * result["first"]:.3g}']
            + [f'{result["extra_memory"]:.2f}', str(len(result['times']))]
            + [str(result.get('host_syncs', ''))] * gpu
        )
    return markdown_table(lines)


def case_section(label: str, case: dict[str, Any]) -> str:
    size = f'{case["rows"]:,} × {case["classes"]}, {case["positives"]:,} positives'
    return f'\n{label}: {size}; threads: {case["threads"]}\n\n{table(case)}'


def operators_section(label: str, rows: list[tuple[str, float, float]]) -> str:
    """Return what takes the time of one call of our loss, from the profiler."""
    total = sum(row[2] for row in rows)
    small = [row for row in rows if row[2] / row[1] < 10]
    lines = [['operator', 'calls', 'µs', 'share']]
    for name, calls, time in rows[:12]:
        lines.append([name, f'{calls:g}', f'{time:.0f}', f'{time / total:.0%}'])
    return (
        f'\n{label}: {sum(row[1] for row in rows):.0f} operators in one call of our '
        f'loss, {sum(row[1] for row in small):.0f} of them shorter than 10 µs and '
        f'together {sum(row[2] for row in small) / total:.0%} of the time (under the '
        f'profiler)\n\n{markdown_table(lines)}'
    )


def sweep_size(point: dict[str, Any], key: str) -> int:
    return point['positives'] if key == 'p' else point['rows'] * point['classes']


def sweep_table(points: list[dict[str, Any]], key: str) -> str:
    """Return the table of a sweep, medians in ms."""
    lines = [[f'{key.replace("p", "P")}, ms', *points[0]['rivals']]]
    for point in points:
        cells = [
            result['note'] if 'note' in result else f'{1e3 * result["median"]:.3g}'
            for result in point['rivals'].values()
        ]
        lines.append([f'{sweep_size(point, key):,}', *cells])
    return markdown_table(lines, text_columns=())


def sweep_section(key: str, points: list[dict[str, Any]], share: float) -> str:
    return (
        f'\nSweep of {key.replace("p", "P")}, {share:.0%} of the negatives above the '
        f'lowest positive (before the margin)\n\n{sweep_table(points, key)}'
    )


def flatness(points: list[dict[str, Any]]) -> float | None:
    """Largest over smallest time per element of our loss from n = 10⁵ up."""
    sizes = [sweep_size(point, 'n') for point in points]
    per_element = [
        point['rivals'][OURS]['median'] / size
        for point, size in zip(points, sizes)
        if size >= 100_000 and 'median' in point['rivals'][OURS]
    ]
    return max(per_element) / min(per_element) if len(per_element) > 1 else None


def check_targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare with what the project set itself; ``met`` is None if not measured."""
    cases, n_sweep = report['cases'], report['sweeps'].get('n', [])
    roi, dense, dense1k = (cases.get(name) for name in ('roi', 'dense', 'dense1k'))
    measured = dense['rivals'][OURS] if dense else {}
    if report['environment']['device'] == 'cpu':
        rows = {
            'dense, ours / torch.sort ≤ 0.35': ratio(dense, OURS, SORT),
            'dense, ours / FocalLoss ≤ 0.6': ratio(dense, OURS, FOCAL),
            'dense, literal form / ours ≥ 30': ratio(dense, LITERAL, OURS),
            'roi, ours / torch.sort ≤ 0.5': ratio(roi, OURS, SORT),
            'dense1k, ours / torch.sort ≤ 0.7': ratio(dense1k, OURS, SORT),
            'largest / smallest time per element, n ≥ 10⁵ ≤ 1.5': flatness(n_sweep),
            'dense, extra memory / logits ≤ 2': measured.get('extra_memory'),
        }
    else:
        rows = {'dense, host synchronisations ≤ 4': measured.get('host_syncs')}
    targets = []
    for target, value in rows.items():
        sign, bound = target.split()[-2:]
        met = None if value is None else (value <= float(bound)) == (sign == '≤')
        targets.append(dict(target=target, value=value, met=met))
    return targets


def targets_section(report: dict[str, Any]) -> str:
    lines = ['\nTargets' + ' (meaningless with --quick)' * report['quick'], '']
    for row in report['targets']:
        verdict = {True: 'met', False: 'MISSED', None: 'not measured'}[row['met']]
        value = '' if row['value'] is None else f'{row["value"]:.3g}, '
        lines.append(f'- {row["target"]}: {value}{verdict}')
    return '\n'.join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw both sweeps on logarithmic axes, medians with quartiles."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 6.2), sharey=True)
    for axis, (key, points) in zip(axes, report['sweeps'].items()):
        for number, name in enumerate(points[0]['rivals']):
            found = [
                [sweep_size(point, key), *(1e3 * result[q] for q in QUARTILES)]
                for point in points
                if 'note' not in (result := point['rivals'][name])
            ]
            if not found:
                continue
            x, median, low, high = np.array(found).T
            axis.errorbar(
                x,
                median,
                yerr=(median - low, high - median),
                label=name,
                color='black' if name == OURS else f'C{number}',
                linestyle='--' if name == SORT else '-',
                linewidth=2.6 if name == OURS else 1.5,
                marker='osD^vP*X'[number % 8],
                markersize=5,
                capsize=2,
            )
        axis.set(xscale='log', yscale='log')
        axis.grid(which='major', alpha=0.4)
        axis.grid(which='minor', alpha=0.12)
    first = {key: points[0] for key, points in report['sweeps'].items()}
    logits = sweep_size(first['p'], 'n')
    axes[0].set_xlabel(f'logits, n (20 classes, {first["n"]["positives"]} positives)')
    axes[1].set_xlabel(f'positives, P (n = {logits:,}, 20 classes)')
    axes[0].set_ylabel('forward + backward, ms (torch.sort: forward)')
    env = report['environment']
    where = f'threads: {env["threads"]}' if env['device'] == 'cpu' else env['gpu']
    figure.suptitle(
        f'Time of one step, {where}, {report["share"]:.0%} of the negatives above '
        'the lowest positive\n(medians and quartiles; a curve ends where a call would '
        f'take more than {report["limit"]:g} s)',
        fontsize=11,
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='lower center', ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def environment_section(env: dict[str, Any]) -> str:
    return '\n'.join(f'- {key}: {value}' for key, value in env.items())


def text(report: dict[str, Any]) -> str:
    """Return all of it as Markdown."""
    sections = [environment_section(report['environment'])]
    for label, case in report['cases'].items():
        sections.append(case_section(label, case))
        if 'operators' in case:
            sections.append(operators_section(label, case['operators']))
    for key, points in report['sweeps'].items():
        sections.append(sweep_section(key, points, report['share']))
    return '\n'.join([*sections, targets_section(report)])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('file', type=Path)
    path = parser.parse_args().file
    content = json.loads(path.read_text(encoding='utf-8'))
    print(text(content))
    if content['sweeps']:
        plot(content, path.with_suffix('.png'))
