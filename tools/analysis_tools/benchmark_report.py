"""Print and draw what tools/analysis_tools/benchmark_loss.py has measured.

    python tools/analysis_tools/benchmark_report.py docs/results/benchmark.json
    python tools/analysis_tools/benchmark_report.py docs/results/benchmark.json --all

Prints the summary of a file (``--all``: its tables), and draws its sweeps into a PNG
beside it. ``--update docs/benchmark.md`` puts the summary into the page.
"""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import fill
from typing import Any

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from tools.common.markdown_table import markdown_table, split_page, update_page
from tools.common.wrong_calls import Parser, read_json, readable_file, reading

OURS, SORT, FOCAL = 'RaMBOLoss', 'torch.sort', 'FocalLoss (mmdet)'
REMEMBERING, AP, RS = 'RaMBOLoss, memory 7', 'AP Loss', 'RS Loss'
QUARTILES = ('median', 'q1', 'q3')
IDLE = 0.3  # the load, or the cores that others use, above which nobody is idle
MARKS = ('<!-- benchmark -->', '<!-- end benchmark -->')


def ratio(case: dict[str, Any] | None, over: str, under: str) -> float | None:
    """How many times as long ``over`` takes, if both were measured."""
    medians = [(case or {'rivals': {}})['rivals'].get(n, {}) for n in (over, under)]
    if not all('median' in result for result in medians):
        return None
    return medians[0]['median'] / medians[1]['median']


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def with_quartiles(result: dict[str, Any]) -> str:
    if 'note' in result:
        return result['note']
    median, low, high = (milliseconds(result[key]) for key in QUARTILES)
    return f'{median} ({low}–{high})'


def case_size(case: dict[str, Any]) -> str:
    return f'{case["rows"]:,} × {case["classes"]:,}, {case["positives"]:,} positives'


def case_section(label: str, case: dict[str, Any]) -> str:
    """Return all that was measured of a case."""
    head = ['forward + backward', 'median, ms (quartiles)', '× sort', '× FocalLoss']
    head += ['extra memory, × logits', 'runs', 'host syncs']
    lines = [head]
    for name, result in case['rivals'].items():
        ratios = [ratio(case, name, under) for under in (SORT, FOCAL)]
        numbers = [*ratios, result.get('extra_memory')]
        cells = ['' if value is None else f'{value:.3g}' for value in numbers]
        cells += [len(result.get('times', ())), result.get('host_syncs', '')]
        lines.append([name, with_quartiles(result), *cells])
    return f'\n{label}: {case_size(case)}\n\n{markdown_table(lines)}'


def sweep_size(point: dict[str, Any], key: str) -> int:
    return point['positives'] if key == 'p' else point['rows'] * point['classes']


def sweep_section(key: str, points: list[dict[str, Any]], share: float) -> str:
    """Return the table of a sweep, medians in ms."""
    lines = [[f'{key.replace("p", "P")}, ms', *points[0]['rivals']]]
    for point in points:
        cells = [
            result.get('note') or milliseconds(result['median'])
            for result in point['rivals'].values()
        ]
        lines.append([f'{sweep_size(point, key):,}', *cells])
    return (
        f'\nSweep of {key.replace("p", "P")}, {share:.0%} of the negatives above the '
        f'lowest positive (before the margin)\n\n{markdown_table(lines, ())}'
    )


def flatness(points: list[dict[str, Any]]) -> float | None:
    """Largest over smallest time per element of our loss from n = 10⁵ up."""
    sizes = [sweep_size(point, 'n') for point in points]
    per_element = [
        point['rivals'][OURS]['median'] / size
        for point, size in zip(points, sizes)
        if size >= 100_000
    ]
    return max(per_element) / min(per_element) if len(per_element) > 1 else None


def check_targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare with what the project set itself; ``met`` is None if not measured."""
    cases, sweeps = report['cases'], report['sweeps']
    roi, dense, dense1k, lvis = map(cases.get, ('roi', 'dense', 'dense1k', 'lvis'))

    def ours(case: dict[str, Any] | None, key: str) -> float | None:
        return case['rivals'][OURS].get(key) if case else None

    few = [point for point in sweeps.get('p', []) if point['positives'] in (1, 10)]
    against = [ratio(point, OURS, port) for point in few for port in (AP, RS)]
    slowest = max(against) if against and None not in against else None
    flat = flatness(sweeps.get('n', []))
    rows = [
        ('roi: time, × one sort', ratio(roi, OURS, SORT), 0.5),
        ('dense: time, × one sort', ratio(dense, OURS, SORT), 0.2),
        ('dense: time, × FocalLoss', ratio(dense, OURS, FOCAL), 1.0),
        ('dense: extra memory, × logits', ours(dense, 'extra_memory'), 2.0),
        ('dense1k: time, × one sort', ratio(dense1k, OURS, SORT), 0.35),
        ('1 or 10 positives: time, × AP Loss and RS Loss', slowest, 1.0),
        ('roi, 7 past steps: time, × without', ratio(roi, REMEMBERING, OURS), 3.0),
        ('dense, 7 past steps: time, × without', ratio(dense, REMEMBERING, OURS), 3.0),
        ('n from 10⁵ to 10⁷: largest / smallest time per element', flat, 1.5),
        ('lvis: time, × FocalLoss', ratio(lvis, OURS, FOCAL), 0.5),
        ('lvis: extra memory, × logits', ours(lvis, 'extra_memory'), 3.0),
    ]
    if report['environment']['device'] != 'cpu':
        rows = [
            (f'{name}: waits of the host', ours(cases.get(name), 'host_syncs'), 1)
            for name in ('roi', 'dense')
        ]
    targets = [dict(zip(('target', 'value', 'bound'), row)) for row in rows]
    for row in targets:
        row['met'] = None if row['value'] is None else row['value'] <= row['bound']
    return targets


def targets_table(report: dict[str, Any]) -> str:
    lines = [['target', 'at most', 'measured', '']]
    for row in report['targets']:
        verdict = {True: 'met', False: '**MISSED**', None: 'not measured'}[row['met']]
        value = '' if row['value'] is None else f'{row["value"]:.3g}'
        lines.append([row['target'], f'{row["bound"]:g}', value, verdict])
    return markdown_table(lines, text_columns=(0, 3))


def summary_table(cases: dict[str, Any]) -> str:
    """Return the rivals' medians and quartiles in each case."""
    names = dict.fromkeys(name for case in cases.values() for name in case['rivals'])
    last = 'dense' if 'dense' in cases else next(iter(cases))
    lines = [['ms', *cases, f'extra memory, {last}, × logits']]
    for name in names:
        found = [case['rivals'].get(name) for case in cases.values()]
        cells = ['' if result is None else with_quartiles(result) for result in found]
        memory = cases[last]['rivals'].get(name, {}).get('extra_memory')
        lines.append([name, *cells, '' if memory is None else f'{memory:.2f}'])
    return markdown_table(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw both sweeps on logarithmic axes, medians with quartiles."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 6.2), layout='constrained')
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
            style = dict(linewidth=1.5, color=f'C{number}', capsize=2, markersize=5)
            if name in (OURS, SORT):
                style.update(linewidth=2.6, color='black')
            style['linestyle'] = '--' if name == SORT else '-'
            error = median - low, high - median
            mark = 'osD^vP*X'[number % 8]
            axis.errorbar(x, median, error, label=name, marker=mark, **style)
        axis.set(xscale='log', yscale='log')
        axis.grid(which='major', alpha=0.4)
        axis.grid(which='minor', alpha=0.12)
    first = {key: points[0] for key, points in report['sweeps'].items()}
    logits = sweep_size(first['p'], 'n')
    axes[0].set_xlabel(f'logits, n (20 classes, {first["n"]["positives"]} positives)')
    axes[1].set_xlabel(f'positives, P (n = {logits:,}, 20 classes)')
    axes[0].set_ylabel('forward + backward, ms (torch.sort: forward)')
    axes[0].legend(fontsize=9)
    env = report['environment']
    where = f'threads: {env["threads"]}' if env['device'] == 'cpu' else env['gpu']
    figure.suptitle(
        f'Time of one step, {where}, {report["share"]:.0%} of the negatives above '
        'the lowest positive\n(medians and quartiles; a line ends where a call would '
        f'take more than {report["limit"]:g} s)',
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def environment_line(env: dict[str, Any]) -> str:
    """Say where and when, and whether anything else was running."""
    where = f'{env["cpu"]}, cores: {env["cores"]}, threads: {env["threads"]}'
    versions = [f'{n} {env[n]}' for n in ('torch', 'mmdet', 'mmcv') if n in env]
    idle = 'idle' if env['idle'] else '**not idle**'
    return (
        f'{env["date"]}: {env.get("gpu", where)}, {", ".join(versions)}. '
        f'The machine was {idle}: its load was {env["load"]:g} before the run, and '
        f'other processes used up to {env["others"]:g} of a core during it. '
        f'The run took {env["minutes"]:g} minutes.'
    )


def text(report: dict[str, Any]) -> str:
    """Return what the page shows."""
    env, cases = report['environment'], report['cases']
    sizes = '; '.join(f'{name}: {case_size(case)}' for name, case in cases.items())
    quick = ['**Small sizes, no meaning (`--quick`).**'] * report['quick']
    lines = [*quick, environment_line(env), f'Rows × classes: {sizes}.']
    sections = [fill(line, 88, break_on_hyphens=False) for line in lines]
    return '\n\n'.join([*sections, summary_table(cases), targets_table(report)])


RESULTS = 'the JSON of benchmark_loss --out'


def all_tables(report: dict[str, Any]) -> str:
    sections = [case_section(*item) for item in report['cases'].items()]
    for key, points in report['sweeps'].items():
        sections.append(sweep_section(key, points, report['share']))
    return '\n'.join(sections)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('file', type=readable_file)
    parser.add_argument('--all', action='store_true', help='print every table')
    parser.add_argument('--update', type=readable_file, metavar='PAGE')
    args = parser.parse_args(argv)
    with parser.refusing():
        content = read_json(args.file, RESULTS)
        with reading(args.file, RESULTS):
            shown = all_tables(content) if args.all else text(content)
        if args.update:
            split_page(args.update, *MARKS)
    print(shown)
    if content['sweeps']:
        plot(content, args.file.with_suffix('.png'))
    if args.update:
        update_page(args.update, *MARKS, text(content))


if __name__ == '__main__':
    main()
