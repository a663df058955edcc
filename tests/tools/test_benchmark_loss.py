"""What is only timed computes what its paper defines, and the benchmark runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmdet', reason='needs mmdet')

from rambo_det.functional import peers
from tests import ROOT
from tests.helpers import oracle
from tools.analysis_tools import benchmark_loss, benchmark_report, benchmark_rivals


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
    result = benchmark_rivals.literal_loss(logits, labels, lambd, margin)
    result.backward()
    assert result.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(logits.grad, gradient, rtol=0, atol=1e-12)


def test_literal_form_does_twelve_argsorts():
    logits, labels = draw(0)
    with torch.profiler.profile() as run:
        benchmark_rivals.literal_loss(logits, labels).backward()
    assert sum(event.name == 'aten::argsort' for event in run.events()) == 12


def test_bucketing_hardly_changes_the_gradient():
    """At the δ of the papers, among scores like those of the benchmark."""
    problem = benchmark_loss.Problem.draw(4_096, 20, 64)
    logits, labels, quality = problem.logits, problem.labels, problem.quality
    for plain, bucketed in (
        (peers.ap_loss, peers.bucketed_ap_loss),
        (peers.rank_sort_loss, peers.bucketed_rank_sort_loss),
    ):
        extra = (quality,) * ('rank' in plain.__name__)
        pair = [
            torch.autograd.grad(loss(logits, labels, *extra), logits)[0]
            for loss in (plain, bucketed)
        ]
        assert 0 < (pair[1] - pair[0]).norm() < 0.03 * pair[0].norm()


@pytest.mark.parametrize('seed', range(20))
def test_map_histogram_loss_is_its_definition(seed):
    """Places beyond the bins go to their ends, with a gradient that leads back.

    Negatives beyond the lowest bin do not count.
    """
    logits, labels = draw(seed, positives=8, spread=2.5)
    logits.data += seed % 4  # some beyond either end
    bins, limit, progress = 6, 3.0, 0.3
    low, high, last = 1e-4, bins - 1 - 1e-4, bins - 1
    grid = torch.arange(bins, dtype=torch.float64)
    place = (limit - logits.detach().flatten()) / (2 * limit) * last
    _, positives, negatives = split(logits, labels)
    negatives = [j for j in negatives if place[j] < high]
    quality = torch.linspace(0.3, 1, len(positives), dtype=torch.float64)
    used = place.clamp(low, high).requires_grad_()
    shares = (1 - (used.unsqueeze(1) - grid).abs()).clamp(min=0)
    overlap = ((1 - quality) * last).clamp(low, high)
    overlap = (1 - (overlap.unsqueeze(1) - grid).abs()).clamp(min=0)
    of_class = torch.eye(3, dtype=torch.float64).repeat(len(labels), 1)
    where = of_class[positives], shares[positives], overlap
    hits = torch.einsum('ic,ia,ib->cab', *where)
    misses = torch.einsum('ic,ia->ca', of_class[negatives], shares[negatives])
    weight = torch.sigmoid(10 * math.log(1 - progress) * (grid / last - 0.5))

    def ap(hits, misses):
        total = 0
        for a in range(bins):
            found = hits[:, : a + 1].sum((1, 2)) + misses[:, : a + 1].sum(1)
            for b in range(bins):
                true = hits[:, : a + 1, : b + 1].sum((1, 2))
                step = hits[:, a, : b + 1].sum(1)
                total += weight[b] * true * step / found.clamp(min=1e-12)
        return total / weight.sum() / hits.sum((1, 2)).detach().clamp(min=1e-12)

    pooled = ap(hits.sum(0, keepdim=True), misses.sum(0, keepdim=True))
    expected = 1 - progress * ap(hits, misses).mean() - (1 - progress) * pooled[0]
    (gradient,) = torch.autograd.grad(expected, used)
    outward = (place < low) & (gradient > 0) | (place > high) & (gradient < 0)
    gradient[outward & (labels.repeat_interleave(3) == torch.arange(3).repeat(9))] = 0
    gradient = (-last / (2 * limit) * gradient).tolist()
    loss = benchmark_rivals.map_histogram_loss(
        logits, labels, quality, bins, limit, progress
    )
    assert_loss_and_gradient(loss, logits, expected.item(), gradient)


def test_histogram_without_positives():
    logits, labels = draw(0, positives=0)
    loss = benchmark_rivals.map_histogram_loss(logits, labels, logits.new_zeros(0))
    loss.backward()
    assert loss == 1 and not logits.grad.any()


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


def test_benchmark_measures_everything(run):
    report, _ = run
    assert list(report['cases']) == list(benchmark_loss.CASES)
    counts = {name: len(case['rivals']) for name, case in report['cases'].items()}
    assert counts == dict(roi=11, dense=11, dense1k=10, coco=10, lvis=10)
    for case in report['cases'].values():
        for name, result in case['rivals'].items():
            assert 'note' not in result, (name, result)
            assert 0 < result['q1'] <= result['median'] <= result['q3']
            assert len(result['times']) == 2
            assert result['extra_memory'] > 0
    for points in report['sweeps'].values():
        assert all('note' not in r for p in points for r in p['rivals'].values())
    verdicts = {row['target']: row['met'] for row in report['targets']}
    assert len(verdicts) == 11
    assert [name for name, met in verdicts.items() if met is None] == [
        'n from 10⁵ to 10⁷: largest / smallest time per element'
    ]


def test_benchmark_writes_what_it_found(run):
    report, out = run
    stored = json.loads(Path(f'{out}.json').read_text(encoding='utf-8'))
    assert stored == report
    assert Path(f'{out}.png').read_bytes().startswith(b'\x89PNG')
    text = benchmark_report.text(stored) + benchmark_report.all_tables(stored)
    for part in ('threads: 1', 'load was', 'no meaning', '| RS Loss |', 'Sweep of P'):
        assert part in text.replace('\n', ' ')


def test_slow_rivals_are_skipped_and_named():
    benchmark = benchmark_loss.Benchmark(repeats=1, limit=60, device='cpu')
    benchmark.rates.update({'AP Loss': 1.0, 'RaMBOLoss': 1.0})
    case = benchmark.measure((100, 5, 10), memory=True)
    assert case['rivals']['AP Loss'] == {'note': '> 60 s'}
    assert '| AP Loss | > 60 s |' in benchmark_report.case_section('', case)
    assert case['rivals']['RaMBOLoss']['median'] > 0  # what the targets are about


def test_targets():
    names = dict(ours='RaMBOLoss', sort='torch.sort', focal='FocalLoss (mmdet)')
    names.update(past='RaMBOLoss, memory 7', ap='AP Loss', rs='RS Loss')

    def case(rows=5_000, count=1, **medians):
        rivals = {names[k]: dict(median=v, extra_memory=3) for k, v in medians.items()}
        return dict(rows=rows, classes=20, positives=count, rivals=rivals)

    def verdicts(device):
        report = dict(environment=dict(device=device), cases=cases, sweeps=sweeps)
        rows = benchmark_report.check_targets(report)
        return [(row['value'], row['met']) for row in rows]

    cases = dict(dense=case(ours=0.3, sort=1.0, past=0.8), roi=case(ours=0.4, sort=1.0))
    cases['lvis'] = case(ours=0.4, focal=1.0)
    few = [case(count=1, ours=2.0, ap=1.0, rs=4.0), case(count=10, ours=2, ap=2, rs=1)]
    sweeps = dict(n=[case(500, ours=9), case(ours=1.0), case(50_000, ours=14.0)])
    sweeps['p'] = [*few, case(count=100, ours=9.0, ap=1.0, rs=1.0)]
    assert verdicts('cpu') == [
        (0.4, True),
        (0.3, False),
        (None, None),
        (3, False),
        (None, None),
        (2.0, False),
        (None, None),
        (pytest.approx(0.8 / 0.3), True),
        (pytest.approx(1.4), True),
        (0.4, True),
        (3, True),
    ]
    cases['dense']['rivals']['RaMBOLoss']['host_syncs'] = 2
    assert verdicts('cuda') == [(None, None), (2, False)]


def test_memory_meets_the_same_steps_in_every_call():
    problem = benchmark_loss.Problem.draw(200, 20, 30)
    alone, rival = benchmark_loss.make_rivals(problem, past=True)[1:3]
    losses = []
    for called in (rival, rival, alone):
        called.ready()
        torch.manual_seed(1)
        losses.append(called.forward().item())
    assert losses[0] == losses[1] != losses[2]


def test_other_processes_make_the_machine_busy():
    spin = [sys.executable, '-c', 'while True: pass']
    with subprocess.Popen(spin) as process:
        work = benchmark_loss.OtherWork()
        time.sleep(1)
        busy = work.cores()
        process.kill()
    assert busy > benchmark_report.IDLE


@pytest.mark.parametrize(('load', 'others'), [(0.3, 0.3), (0.2, 0.8), (0.5, 0)])
def test_only_an_idle_machine_is_called_idle(monkeypatch, load, others):
    monkeypatch.setattr(benchmark_loss.os, 'getloadavg', lambda: (load, 9, 9))
    monkeypatch.setattr(benchmark_loss.OtherWork, 'cores', lambda self: others)
    arguments = '--quick --cases roi --no-sweeps --threads 1 --repeats 1'
    report = benchmark_loss.main(arguments.split())
    assert report['environment']['idle'] is (load == others)
    line = benchmark_report.environment_line(report['environment'])
    assert ('**not idle**' in line) is (load != others)
    assert f'load was {load:g} before' in line and f'up to {others:g} of a' in line


def test_benchmark_without_mmdet():
    """A machine with a GPU may have PyTorch alone."""
    code = (
        'import importlib.util as u; f = u.find_spec\n'
        "u.find_spec = lambda name, *a: None if name == 'mmdet' else f(name, *a)\n"
        f'import sys; sys.path.insert(0, {str(ROOT)!r})\n'
        'from tools.analysis_tools import benchmark_loss as b\n'
        "arguments = ['--quick', '--cases', 'roi', '--no-sweeps', '--threads', '1']\n"
        "report = b.main([*arguments, '--repeats', '1'])\n"
        "print(len(report['cases']['roi']['rivals']), 'mmcv' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '10 False'
