"""Time RaMBOLoss and its rivals: forward + backward on the same logits.

    python tools/benchmark_loss.py --out docs/results/benchmark
    python tools/benchmark_loss.py --cases roi --threads 1 --no-sweeps --paper
    python tools/benchmark_loss.py --device cuda

Prints Markdown tables, writes ``OUT.json`` and, with the sweeps, ``OUT.png``;
tools/benchmark_report.py prints and draws them again. All
rivals take turns within each repeat, so that whatever else the machine does hits them
alike. In each turn the first call finds caches and memory as another rival left them,
the second as itself did; both are reported, ratios are of the second. The yardstick is
one ``torch.sort`` of the flattened logits, forward only. How
much memory a call takes is the peak of what PyTorch's allocator has handed out during
it, from the profiler's allocation events (on a GPU, ``max_memory_allocated``), less the
gradient that it leaves. Nothing here fails on a missed target; it is printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Callable

import benchmark_report
import numpy as np
import torch
from benchmark_report import FOCAL, LITERAL, OURS, QUARTILES, SORT
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function

HAS_MMDET = find_spec('mmdet') is not None
if not HAS_MMDET:
    # The loss takes no more than the registry from mmdet, and a machine with a GPU may
    # have PyTorch alone. The package itself must have seen that mmdet is missing.
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import rambo_det.baselines  # noqa: F401

    registry = ModuleType('mmdet.registry')
    registry.MODELS = SimpleNamespace(register_module=lambda: lambda cls: cls)
    sys.modules.update({'mmdet': ModuleType('mmdet'), registry.__name__: registry})
from rambo_det.baselines import (  # noqa: E402
    ap_loss,
    literal_loss,
    positive_index,
    rank_sort_loss,
)
from rambo_det.losses.rambo_loss import RaMBOLoss  # noqa: E402

CASES = {  # rows, classes, positives
    'roi': (4_096, 20, 512),
    'dense': (224_000, 20, 100),
    'dense1k': (224_000, 20, 1_000),
    'coco': (100_000, 80, 300),
}
ONE_THREAD = 'roi, 1 thread'
SHARE = 0.1
WARM_BELOW = 0.5  # seconds; a longer call is its own warm-up
SWEEPS = {  # the same
    'n': [
        (500, 20, 100),
        (1_500, 20, 100),
        (5_000, 20, 100),
        (15_000, 20, 100),
        (50_000, 20, 100),
        (150_000, 20, 100),
        (500_000, 20, 100),
    ],
    'p': [(224_000, 20, count) for count in (1, 10, 100, 1_000, 10_000)],
}
QUICK_SWEEPS = {
    'n': [(100, 20, 20), (500, 20, 20)],
    'p': [(1_000, 20, 1), (1_000, 20, 10)],
}
SYNCS = (
    'cudaStreamSynchronize',
    'cudaDeviceSynchronize',
    'cudaEventSynchronize',
    'cudaMemcpy',
)


@dataclass
class Problem:
    """Logits N(−2, 1) and labels; one class of each positive row is positive."""

    logits: Tensor
    labels: Tensor

    @classmethod
    def draw(
        cls, rows: int, classes: int, positives: int, share: float = 0, device='cpu'
    ) -> Problem:
        """Draw a problem, always the same one.

        Without ``share`` positives are 3 higher than negatives. With it, that share of
        the negatives lies above the lowest positive whatever N and P: positive k = 1..P
        is put at the quantile ``1 - share * k / P`` of the negatives' distribution,
        and the classes take turns.
        """
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(rows, classes, generator=generator).sub_(2)
        labels = torch.full((rows,), classes)
        index = torch.randperm(rows, generator=generator)[:positives]
        if share:
            order = torch.arange(1, positives + 1, dtype=torch.float64)
            labels[index] = torch.arange(positives) % classes
            scores = torch.special.ndtri(1 - share * order / positives) - 2
            logits[index, labels[index]] = scores.float()
        else:
            labels[index] = torch.randint(classes, (positives,), generator=generator)
            logits[index, labels[index]] += 3
        return cls(logits.to(device).requires_grad_(), labels.to(device))

    @cached_property
    def padded(self) -> Tensor:
        """The same with the background column that cross-entropy needs, (N, C + 1)."""
        logits = self.logits.detach()
        return torch.cat([logits, logits.new_zeros(len(logits), 1)], 1).requires_grad_()

    @cached_property
    def positives(self) -> Tensor:
        return positive_index(self.logits, self.labels)

    @cached_property
    def quality(self) -> Tensor:
        """IoUs of the positives, for RS Loss."""
        generator = torch.Generator().manual_seed(1)
        quality = torch.rand(len(self.positives), generator=generator) / 2 + 0.5
        return quality.to(self.logits.device)

    @cached_property
    def pairs(self) -> float:
        """What AP Loss' loop works through; 20,000 stand for the calls of one step."""
        flat = self.logits.detach().reshape(-1)
        relevant = int((flat >= flat[self.positives].min() - 1).sum())
        return len(self.positives) * (relevant + 20_000.0)


@dataclass
class Rival:
    """Something to time."""

    name: str
    leaf: Tensor  # gets the gradient
    forward: Callable[[], Any]  # a loss, or None where there is no backward
    work: float  # the time is roughly proportional to it
    prepare: Callable[[], None] = lambda: None  # not timed

    def ready(self) -> None:
        self.prepare()
        self.leaf.grad = None
        self.synchronise()

    def synchronise(self) -> None:
        if self.leaf.is_cuda:
            torch.cuda.synchronize(self.leaf.device)

    def step(self) -> None:
        loss = self.forward()
        if loss is not None:
            loss.backward()

    def seconds(self) -> float:
        self.ready()
        start = time.perf_counter()
        self.step()
        self.synchronise()
        return time.perf_counter() - start


def ours(paper: bool) -> dict[str, RaMBOLoss]:
    """Our loss as users call it, and then other settings of it, by name.

    Checks of values are on. ``paper``: positives moved together and the paper's margin,
    over the batch, instead of the defaults.
    """
    if paper:
        settings = dict(perturb='together', lambd=30.0, margin=0.15)
        settings.update(class_ap=dict(weight=2 / 3), pooled_ap=dict(weight=1 / 3))
        past = dict(settings, class_ap=dict(weight=2 / 3, span='memory'))
        return {
            OURS: RaMBOLoss(**settings, margin_noise=False),
            f'{OURS}, random margins': RaMBOLoss(**settings),
            f'{OURS}, memory 7': RaMBOLoss(**past, margin_noise=False),
        }
    together = dict(perturb='together', lambd=30.0, margin_noise=False)
    return {
        OURS: RaMBOLoss(),
        f'{OURS}, fixed margin': RaMBOLoss(margin_noise=False),
        f'{OURS}, moved together, fixed margin': RaMBOLoss(**together),
        f'{OURS}, memory 7': RaMBOLoss(class_ap=dict(span='memory')),
    }


def make_rivals(problem: Problem, variants: bool, paper: bool) -> list[Rival]:
    """All rivals on one problem; ``variants`` adds other settings of our loss."""
    logits, labels, n = problem.logits, problem.labels, float(problem.logits.numel())

    def sort() -> None:
        torch.sort(logits.detach().reshape(-1))

    def rival(name: str, loss: Callable[..., Tensor], *args: Tensor, work=n) -> Rival:
        return Rival(name, logits, lambda: loss(logits, labels, *args), work)

    rivals = [Rival(SORT, logits, sort, n)]
    for name, loss in ours(paper).items():
        if name != OURS and not variants:
            continue
        rivals.append(rival(name, loss))
        if loss.remembered is not None:
            state: dict[str, list[Tensor]] = dict(scores=[], labels=[])
            for shift in range(1, 8):  # seven other steps, of the same distribution
                state['scores'].append(logits.detach().roll(shift, 0))
                state['labels'].append(labels.roll(shift))
            # Each call meets the same seven, not what the call before has left.
            rivals[-1].prepare = partial(loss.set_extra_state, state)
    padded = problem.padded
    rivals.append(
        Rival('cross-entropy', padded, lambda: cross_entropy(padded, labels), n)
    )
    if HAS_MMDET:
        from mmdet.models.losses import FocalLoss

        rivals.append(rival(FOCAL, FocalLoss()))
    rivals.append(rival(LITERAL, literal_loss))
    rivals.append(rival('AP Loss', ap_loss, work=problem.pairs))
    rivals.append(rival('RS Loss', rank_sort_loss, problem.quality, work=problem.pairs))
    return rivals


def extra_bytes(rival: Rival) -> int:
    """Peak memory of one call beyond its inputs and the gradient it leaves."""
    rival.ready()
    if rival.leaf.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        rival.step()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            rival.step()
        events = run.profiler.kineto_results.events()
        events = [event for event in events if event.name() == '[memory]']
        events.sort(key=lambda event: event.start_ns())
        peak = max(np.cumsum([0] + [event.nbytes() for event in events]))
    gradient = rival.leaf.grad
    return int(peak) - (0 if gradient is None else gradient.nbytes)


def host_syncs(rival: Rival) -> int:
    """How often one call makes the host wait for the GPU."""
    rival.ready()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        with record_function('one call'):
            rival.step()
        rival.synchronise()
    events = run.events()
    # The profiler itself synchronises, and so does the line above.
    span = next(
        event.time_range
        for event in events
        if event.name == 'one call' and event.device_type == DeviceType.CPU
    )
    waits = [event.time_range for event in events if event.name in SYNCS]
    return sum(span.start <= wait.start <= span.end for wait in waits)


def operators(rival: Rival, calls: int = 20) -> list[tuple[str, float, float]]:
    """Return name, number and microseconds of the operators of one call, dearest first.

    Under the profiler a call takes longer; the shares are what matters.
    """
    rival.ready()
    with profile(activities=[ProfilerActivity.CPU]) as run:
        for _ in range(calls):
            rival.step()
    rows = [
        (row.key, row.count / calls, round(row.self_cpu_time_total / calls, 1))
        for row in run.key_averages()
    ]
    return sorted(rows, key=lambda row: -row[2])


class Benchmark:
    """Measures problems one after the other and remembers how fast the rivals are."""

    def __init__(
        self, repeats: int, limit: float, device: str, paper: bool = False
    ) -> None:
        self.repeats, self.limit, self.device = repeats, limit, device
        self.paper = paper
        self.rates: dict[str, float] = {}
        self.measure((2_000, 20, 50))  # what a rival needs per work, and a warm-up

    def measure(
        self, size: tuple[int, int, int], share: float = 0, memory: bool = False
    ) -> dict[str, Any]:
        """Time all rivals on a problem of ``size`` rows, classes and positives.

        With ``memory`` also measure memory (and synchronisations on a GPU), and
        include the variants of our loss.
        """
        problem = Problem.draw(*size, share=share, device=self.device)
        rivals = make_rivals(problem, memory, self.paper)
        found: dict[str, dict[str, Any]] = {rival.name: {} for rival in rivals}
        runs: dict[str, int] = {}
        for rival in rivals:
            if self.rates.get(rival.name, 0) * rival.work > self.limit:
                found[rival.name]['note'] = f'skipped: > {self.limit:g} s'
                continue
            try:
                seconds = rival.seconds()
                if seconds < self.limit / 10:  # the first call may be slower
                    seconds = rival.seconds()
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                # mmcv without its CUDA operators, say, or no memory left.
                if rival.name == OURS:
                    raise
                found[rival.name]['note'] = f'failed: {str(error).splitlines()[0]}'
                continue
            self.rates[rival.name] = seconds / rival.work
            runs[rival.name] = max(1, min(self.repeats, int(self.limit / seconds)))
            found[rival.name].update(times=[], first_times=[])
        for turn in range(self.repeats):
            first = turn % len(rivals)  # who follows whom inside a turn is the same,
            for rival in rivals[first:] + rivals[:first]:  # who begins is not
                if turn < runs.get(rival.name, 0):
                    times = [rival.seconds()]
                    if times[0] < WARM_BELOW:
                        times.append(rival.seconds())
                    found[rival.name]['first_times'].append(round(times[0], 7))
                    found[rival.name]['times'].append(round(times[-1], 7))
        for rival in rivals:
            result = found[rival.name]
            if 'note' in result:
                continue
            quartiles = np.percentile(result['times'], [50, 25, 75]).round(7)
            result.update(zip(QUARTILES, quartiles.tolist()))
            result['first'] = round(float(np.median(result['first_times'])), 7)
            if memory:
                share_of_logits = extra_bytes(rival) / problem.logits.nbytes
                result['extra_memory'] = round(share_of_logits, 3)
                if problem.logits.is_cuda:
                    result['host_syncs'] = host_syncs(rival)
        rows, classes, positives = size
        return dict(rows=rows, classes=classes, positives=positives, rivals=found)


def environment(device: str) -> dict[str, Any]:
    """What has to be known of the machine to read the numbers."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(': ')[1] for line in lines if line.startswith('model name')]
    now = datetime.datetime.now(datetime.timezone.utc)
    env: dict[str, Any] = dict(
        date=now.strftime('%Y-%m-%d %H:%M UTC'),
        device=device,
        threads=torch.get_num_threads(),
        cpu=models[0] if models else platform.machine(),
        cores=os.cpu_count(),
        load=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        torch=torch.__version__,
    )
    if HAS_MMDET:
        import mmcv
        import mmdet

        env.update(mmdet=mmdet.__version__, mmcv=mmcv.__version__)
    if device != 'cpu':
        env.update(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
    return env


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', nargs='*', choices=CASES, default=list(CASES))
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--sweeps', action='store_true', default=True)
    parser.add_argument('--no-sweeps', dest='sweeps', action='store_false')
    parser.add_argument(
        '--paper', action='store_true', help="the paper's margin, moved together"
    )
    parser.add_argument('--quick', action='store_true', help='small sizes, no meaning')
    parser.add_argument('--limit', type=float, default=60.0, metavar='SECONDS')
    parser.add_argument('--profile', action='store_true', help="our loss' operators")
    parser.add_argument('--out', type=Path, help='path of the files, without suffix')
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    env = environment(args.device)
    report: dict[str, Any] = dict(environment=env, limit=args.limit, quick=args.quick)
    report.update(share=SHARE, cases={}, sweeps={})
    print(benchmark_report.environment_section(env))
    benchmark = Benchmark(args.repeats, args.limit, args.device, args.paper)
    for name in args.cases:
        rows, classes, positives = CASES[name]
        if args.quick:
            rows, positives = rows // 50, max(1, positives // 10)
        size = (rows, classes, positives)
        both = name == 'roi' and args.device == 'cpu' and args.threads > 1
        for label, threads in ((name, args.threads), (ONE_THREAD, 1))[: 1 + both]:
            torch.set_num_threads(threads)
            case = benchmark.measure(size, memory=True)
            torch.set_num_threads(args.threads)
            report['cases'][label] = dict(threads=threads, **case)
            text = benchmark_report.case_section(label, report['cases'][label])
            print(text, flush=True)
        if args.profile:
            problem = Problem.draw(*size, device=args.device)
            rows = operators(make_rivals(problem, False, args.paper)[1])
            report['cases'][name]['operators'] = rows
            print(benchmark_report.operators_section(name, rows))
    if args.sweeps:
        for key, sizes in (QUICK_SWEEPS if args.quick else SWEEPS).items():
            report['sweeps'][key] = [benchmark.measure(size, SHARE) for size in sizes]
            text = benchmark_report.sweep_section(key, report['sweeps'][key], SHARE)
            print(text, flush=True)
    env['load_at_end'] = round(os.getloadavg()[0], 2)
    report['targets'] = benchmark_report.check_targets(report)
    print(benchmark_report.targets_section(report))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1, ensure_ascii=False)
        Path(f'{args.out}.json').write_text(text + '\n', encoding='utf-8')
        if args.sweeps:
            benchmark_report.plot(report, Path(f'{args.out}.png'))
    return report


if __name__ == '__main__':
    main()
