"""The rivals compute what their papers define, and the benchmark runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmdet', reason='needs mmdet')

import benchmark_loss
import benchmark_report
import oracle

from rambo_det import baselines

TOOLS = Path(__file__).resolve().parents[1] / 'tools'


def draw(seed, rows=9, classes=3, positives=4, spread=1.5):
    """Float64 logits without ties, and labels; background rows among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.full((rows,), classes)
    index = torch.randperm(rows, generator=generator)[:positives]
    labels[index] = torch.randint(classes, (positives,), generator=generator)
    return (spread * logits).requires_grad_(), labels


def split(logits, labels):
    """Flat scores, and the flat indices of positives and negatives, as lists."""
    scores, classes = logits.detach().reshape(-1).tolist(), logits.size(1)
    positives = [i * classes + k for i, k in enumerate(labels.tolist()) if k < classes]
    negatives = [i for i in range(len(scores)) if i not in positives]
    return scores, positives, negatives


def step(x, delta):
    """The smoothed Heaviside function H of AP Loss and RS Loss."""
    if abs(x) <= delta:
        return x / (2 * delta) + 0.5
    return float(x > 0)


def assert_loss_and_gradient(loss, logits, expected, gradient):
    (3 * loss).backward()  # an incoming gradient other than 1
    torch.testing.assert_close(loss.item(), expected, rtol=0, atol=1e-12)
    gradient = 3 * torch.tensor(gradient, dtype=torch.float64).view_as(logits)
    torch.testing.assert_close(logits.grad, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize('seed', range(20))
def test_literal_form_is_algorithm_1(seed):
    """The literal form at λ is ours at λ · weight / K."""
    logits, labels = draw(seed)
    lambd, margin, classes = 0.7, 0.3, logits.size(1)
    targets = torch.nn.functional.one_hot(labels, classes + 1)[:, :classes]
    scores = (logits.detach() - margin * (targets - 0.5)).tolist()
    present = [c for c in range(classes) if targets[:, c].any()]
    expected, gradient = 0.0, torch.zeros_like(logits)
    for c in present:
        factor = 2 / 3 / len(present)
        column = [row[c] for row in scores]
        loss, grad = oracle.ap_loss(column, targets[:, c].tolist(), lambd * factor)
        expected += factor * loss
        gradient[:, c] += factor * torch.tensor(grad, dtype=torch.float64)
    flat = [score for row in scores for score in row]
    loss, grad = oracle.ap_loss(flat, targets.reshape(-1).tolist(), lambd / 3)
    expected += loss / 3
    gradient += torch.tensor(grad, dtype=torch.float64).view_as(gradient) / 3
    result = baselines.literal_loss(logits, labels, lambd, margin)
    result.backward()
    assert result.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(logits.grad, gradient, rtol=0, atol=1e-12)


def test_literal_form_does_twelve_argsorts():
    logits, labels = draw(0)
    with torch.profiler.profile() as run:
        baselines.literal_loss(logits, labels).backward()
    assert sum(event.name == 'aten::argsort' for event in run.events()) == 12


@pytest.mark.parametrize('seed', range(20))
def test_ap_loss_is_its_definition(seed):
    """Chen et al.: L_ij, the interpolated precision, and the error-driven update."""
    logits, labels = draw(seed)
    scores, positives, negatives = split(logits, labels)
    delta = 0.6
    expected, gradient, highest = 0.0, [0.0] * len(scores), 0.0
    for i in sorted(positives, key=lambda i: scores[i]):
        h = {j: step(scores[j] - scores[i], delta) for j in range(len(scores))}
        rank = 1 + sum(value for j, value in h.items() if j != i)
        precision = 1 - sum(h[j] / rank for j in negatives)
        highest = max(highest, precision)
        scale = (1 - highest) / (1 - precision) if precision < 1 else 0.0
        for j in negatives:
            error = h[j] / rank * scale / len(positives)
            expected += error
            gradient[i] -= error
            gradient[j] += error
    loss = baselines.ap_loss(logits, labels, delta)
    assert_loss_and_gradient(loss, logits, expected, gradient)


@pytest.mark.parametrize('seed', range(20))
def test_rank_sort_loss_is_its_definition(seed):
    """Oksuz et al.: ranking and sorting errors, spread by their primary terms."""
    logits, labels = draw(seed)
    scores, positives, negatives = split(logits, labels)
    delta = 0.6
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(positives), generator=generator, dtype=torch.float64)
    quality = dict(zip(positives, drawn.tolist()))
    expected, gradient = 0.0, [0.0] * len(scores)
    for i in positives:
        h = {j: step(scores[j] - scores[i], delta) for j in range(len(scores))}
        false = sum(h[j] for j in negatives)
        place = sum(h[j] for j in positives)
        ranking = false / (place + false)
        right = [j for j in positives if quality[j] >= quality[i]]
        wrong = {j: h[j] for j in positives if quality[j] < quality[i]}
        now = sum(h[j] * (1 - quality[j]) for j in positives) / place
        goal = sum(h[j] * (1 - quality[j]) for j in right) / sum(h[j] for j in right)
        shares = [({j: h[j] for j in negatives}, ranking), (wrong, now - goal)]
        for causes, error in shares:
            expected += error / len(positives)
            total = sum(causes.values())
            for j, part in causes.items():
                if total > 0:
                    gradient[j] += part / total * error / len(positives)
                    gradient[i] -= part / total * error / len(positives)
    loss = baselines.rank_sort_loss(logits, labels, drawn, delta)
    assert_loss_and_gradient(loss, logits, expected, gradient)


def test_no_positive():
    logits, labels = draw(0, positives=0)
    for loss in (
        baselines.ap_loss(logits, labels),
        baselines.rank_sort_loss(logits, labels, logits.new_zeros(0)),
    ):
        loss.backward()
        assert loss == 0
        assert not logits.grad.any()


def test_sweeps_hold_the_share():
    for rows, positives in ((500, 100), (20_000, 100), (20_000, 1), (20_000, 2_000)):
        problem = benchmark_loss.Problem.draw(rows, 20, positives, share=0.1)
        assert len(problem.positives) == positives
        flat = problem.logits.detach().reshape(-1)
        negative = torch.ones_like(flat, dtype=torch.bool)
        negative[problem.positives] = False
        lowest = flat[problem.positives].min()
        share = (flat[negative] > lowest).double().mean().item()
        assert share == pytest.approx(0.1, abs=0.01)


def test_memory_is_counted():
    """Two temporaries of the size of the logits, beside the gradient."""
    logits = torch.randn(1_000, 100, requires_grad=True)

    class Temporaries(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            a = x.clone()
            b = a.clone()
            del a
            ctx.save_for_backward(b)
            return b[0, 0].clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.zeros_like(ctx.saved_tensors[0])

    rival = benchmark_loss.Rival('', logits, lambda: Temporaries.apply(logits), 1)
    # The peak is two at a time: both temporaries, then the second and the gradient.
    assert benchmark_loss.extra_bytes(rival) / logits.nbytes == pytest.approx(1, 0.01)

    def two_at_once():
        return [logits.detach().clone(), logits.detach().clone()].clear()

    rival = benchmark_loss.Rival('', logits, two_at_once, 1)
    assert benchmark_loss.extra_bytes(rival) / logits.nbytes == pytest.approx(2, 0.01)


@pytest.fixture(scope='module', autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('benchmark') / 'new' / 'quick'
    # One thread: two that wait for each other are slow on a machine with other work.
    arguments = ['--quick', '--repeats', '2', '--threads', '1', '--out', str(out)]
    return benchmark_loss.main(arguments), out


def test_roi_is_measured_with_one_thread_too():
    arguments = ['--quick', '--cases', 'roi', '--no-sweeps', '--repeats', '1']
    report = benchmark_loss.main([*arguments, '--threads', '2'])
    threads = {name: case['threads'] for name, case in report['cases'].items()}
    assert threads == {'roi': 2, 'roi, 1 thread': 1}
    assert torch.get_num_threads() == 2


def test_the_papers_settings_can_be_timed():
    arguments = '--quick --paper --cases roi --no-sweeps --threads 1 --repeats 1'
    report = benchmark_loss.main(arguments.split())
    names = [name for name in report['cases']['roi']['rivals'] if 'RaMBO' in name]
    assert names == ['RaMBOLoss', 'RaMBOLoss, random margins', 'RaMBOLoss, memory 7']
    ours = benchmark_loss.ours(paper=True)
    assert {loss.perturb for loss in ours.values()} == {'together'}
    assert [loss.margin_noise for loss in ours.values()] == [False, True, False]


def test_benchmark_measures_everything(run):
    report, _ = run
    assert list(report['cases']) == list(benchmark_loss.CASES)
    for case in report['cases'].values():
        assert len(case['rivals']) == 10
        for name, result in case['rivals'].items():
            assert 'note' not in result, (name, result)
            assert 0 < result['q1'] <= result['median'] <= result['q3']
            assert len(result['times']) == 2
            assert result['extra_memory'] > 0
    for points in report['sweeps'].values():
        assert all('note' not in r for p in points for r in p['rivals'].values())
    verdicts = {row['target']: row['met'] for row in report['targets']}
    assert len(verdicts) == 7
    assert [name for name, met in verdicts.items() if met is None] == [
        'largest / smallest time per element, n ≥ 10⁵ ≤ 1.5'
    ]


def test_benchmark_writes_what_it_found(run):
    report, out = run
    stored = json.loads(Path(f'{out}.json').read_text(encoding='utf-8'))
    assert stored == report
    assert Path(f'{out}.png').read_bytes().startswith(b'\x89PNG')
    text = benchmark_report.text(stored)
    for part in ('torch: ', 'threads: 1', 'date: ', '| RS Loss |', 'Sweep of P'):
        assert part in text


def test_slow_rivals_are_skipped_and_named():
    benchmark = benchmark_loss.Benchmark(repeats=1, limit=60, device='cpu')
    benchmark.rates['AP Loss'] = 1.0
    case = benchmark.measure((100, 5, 10), memory=True)
    assert case['rivals']['AP Loss'] == {'note': 'skipped: > 60 s'}
    assert '| AP Loss | skipped: > 60 s |' in benchmark_report.table(case)


def test_targets():
    def case(**seconds):
        names = dict(ours='RaMBOLoss', sort='torch.sort')
        rivals = {
            names[k]: {'median': v, 'extra_memory': 3} for k, v in seconds.items()
        }
        return dict(rows=5_000, classes=20, positives=1, rivals=rivals)

    sweep = [case(ours=1.0), {**case(ours=14.0), 'rows': 50_000}]
    report = dict(
        environment=dict(device='cpu'),
        cases=dict(dense=case(ours=0.3, sort=1.0), roi=case(ours=0.6, sort=1.0)),
        sweeps=dict(n=sweep),
    )
    rows = benchmark_report.check_targets(report)
    assert [(row['value'], row['met']) for row in rows] == [
        (0.3, True),
        (None, None),
        (None, None),
        (0.6, False),
        (None, None),
        (pytest.approx(1.4), True),
        (3, False),
    ]


def test_benchmark_without_mmdet():
    """A machine with a GPU may have PyTorch alone."""
    code = (
        'import importlib.util as u; f = u.find_spec\n'
        "u.find_spec = lambda name, *a: None if name == 'mmdet' else f(name, *a)\n"
        f'import sys; sys.path.insert(0, {str(TOOLS)!r})\n'
        'import benchmark_loss as b\n'
        "arguments = ['--quick', '--cases', 'roi', '--no-sweeps', '--threads', '1']\n"
        "report = b.main([*arguments, '--repeats', '1'])\n"
        "print(len(report['cases']['roi']['rivals']), 'mmcv' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '9 False'
