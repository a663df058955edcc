"""Time RaMBOLoss and its rivals: forward + backward on the same logits.

    python tools/analysis_tools/benchmark_loss.py --out docs/results/benchmark
    python tools/analysis_tools/benchmark_loss.py --cases roi --threads 1 --no-sweeps
    python tools/analysis_tools/benchmark_loss.py --device cuda

Prints Markdown tables, writes ``OUT.json`` and, with the sweeps, ``OUT.png``;
benchmark_report.py prints and draws them again. A call of our loss is what a head does
in a training step: forward, the AP for the log, backward. All rivals take turns
within each repeat, so that whatever else the machine does hits them alike. The
yardstick is one ``torch.sort`` of the flattened logits, forward only. How much memory a
call takes is the peak of what PyTorch's allocator has handed out during it, from the
profiler's allocation events (on a GPU, ``max_memory_allocated``), less the gradient
that it leaves. Nothing here fails on a missed target; it is printed. The machine counts
as idle if its load was low before the run, and other processes used little of it while
each problem was measured.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Callable

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function

from tools.analysis_tools import benchmark_report, benchmark_rivals
from tools.analysis_tools.benchmark_report import (
    AP,
    FOCAL,
    IDLE,
    OURS,
    QUARTILES,
    REMEMBERING,
    RS,
    SORT,
)
from tools.common.wrong_calls import Parser, at_least, writable_file

HAS_MMDET = find_spec('mmdet') is not None
if not HAS_MMDET:
    # The losses take no more than the registry and FocalLoss from mmdet, and a machine
    # with a GPU may have PyTorch alone. The package itself must have seen that mmdet is
    # missing.
    import rambo_det  # noqa: F401

    registry = ModuleType('mmdet.registry')
    registry.MODELS = SimpleNamespace(register_module=lambda: lambda cls: cls)
    losses = ModuleType('mmdet.models.losses')
    losses.FocalLoss = torch.nn.Module
    names = ('mmdet', 'mmdet.models')
    sys.modules.update({name: ModuleType(name) for name in names})
    sys.modules.update({part.__name__: part for part in (registry, losses)})
from rambo_det.functional import peers  # noqa: E402
from rambo_det.functional.sequences import positive_indices  # noqa: E402
from rambo_det.losses.rambo_loss import RaMBOLoss  # noqa: E402

CASES = {  # rows, classes, positives
    'roi': (4_096, 20, 512),
    'dense': (224_000, 20, 100),
    'dense1k': (224_000, 20, 1_000),
    'coco': (100_000, 80, 300),
    'lvis': (44_000, 1_203, 300),
}
WITH_MEMORY = ('roi', 'dense')  # where our loss is also timed with past steps
SHARE = 0.1
WARM_BELOW = 0.5  # seconds; a longer call is its own warm-up
ROWS = (500, 1_500, 5_000, 15_000, 50_000, 150_000, 500_000)
SWEEPS = {  # the same
    'n': [(rows, 20, 100) for rows in ROWS],
    'p': [(224_000, 20, count) for count in (1, 10, 100, 1_000, 10_000)],
}
QUICK_SWEEPS = {'n': [(100, 20, 20), (500, 20, 20)]}
QUICK_SWEEPS['p'] = [(1_000, 20, 1), (1_000, 20, 10)]
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
        return positive_indices(self.labels, self.logits.size(1))

    @cached_property
    def quality(self) -> Tensor:
        """IoUs of the positives, for the losses that rank by them."""
        generator = torch.Generator().manual_seed(1)
        quality = torch.rand(len(self.positives), generator=generator) / 2 + 0.5
        return quality.to(self.logits.device)


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


def make_rivals(problem: Problem, past: bool = False) -> list[Rival]:
    """All rivals on one problem; ``past`` adds our loss with a memory."""
    logits, labels, n = problem.logits, problem.labels, float(problem.logits.numel())
    quality, padded = problem.quality, problem.padded

    def sort() -> None:
        torch.sort(logits.detach().reshape(-1))

    def ours(loss: RaMBOLoss) -> Tensor:
        value = loss(logits, labels)
        loss.get_accuracy()
        return value

    def rival(name: str, loss: Callable[..., Tensor], *args: Tensor, work=n) -> Rival:
        return Rival(name, logits, lambda: loss(logits, labels, *args), work)

    rivals = [
        Rival(SORT, logits, sort, n),
        Rival(OURS, logits, partial(ours, RaMBOLoss()), n),
    ]
    if past:
        full, now = RaMBOLoss(class_ap=dict(span='memory')), {}

        def remember() -> None:
            """Each call meets the same seven other steps, of the same distribution."""
            for shift in () if now else range(1, 8):
                with torch.no_grad():
                    full(logits.roll(shift, 0), labels.roll(shift))
            now['loss'] = copy.deepcopy(full)

        rivals.append(
            Rival(REMEMBERING, logits, lambda: ours(now['loss']), n, remember)
        )
    rivals.append(
        Rival('cross-entropy', padded, lambda: cross_entropy(padded, labels), n)
    )
    if HAS_MMDET:
        from mmdet.models.losses import FocalLoss

        rivals.append(rival(FOCAL, FocalLoss()))
    cells = n + problem.logits.size(1) * 200.0**2
    pairs = (
        n + len(quality) ** 2 / 8
    )  # of positives; those with negatives are summed up
    return [
        *rivals,
        rival('literal form, 12 argsorts', benchmark_rivals.literal_loss),
        rival(AP, peers.ap_loss),
        rival(RS, peers.rank_sort_loss, quality, work=pairs),
        rival('Bucketed AP Loss', peers.bucketed_ap_loss),
        rival('Bucketed RS Loss', peers.bucketed_rank_sort_loss, quality, work=pairs),
        rival(
            'mAPLoss histogram',
            benchmark_rivals.map_histogram_loss,
            quality,
            work=cells,
        ),
    ]


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


class OtherWork:
    """How much other processes have computed since this was made."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        stat = Path('/proc/stat')
        text = stat.read_text(encoding='ascii') if stat.exists() else 'cpu' + 7 * ' nan'
        fields = text.split()[1:8]
        # User, nice, system and interrupts; not idle, waiting for a disk, or stolen.
        ticks = sum(float(fields[i]) for i in (0, 1, 2, 5, 6))
        others = ticks / os.sysconf('SC_CLK_TCK') - time.process_time()
        return time.perf_counter(), others

    def cores(self) -> float:
        """Return how many cores they have kept busy."""
        (start, before), (end, after) = self.start, self._now()
        return round(max(after - before, 0) / (end - start), 2)


class Benchmark:
    """Measures problems one after the other and remembers how fast the rivals are."""

    def __init__(self, repeats: int, limit: float, device: str) -> None:
        self.repeats, self.limit, self.device = repeats, limit, device
        self.rates: dict[str, float] = {}
        self.measure((2_000, 20, 50))  # what a rival needs per work, and a warm-up

    def measure(
        self,
        size: tuple[int, int, int],
        share: float = 0,
        memory: bool = False,
        past: bool = False,
    ) -> dict[str, Any]:
        """Time all rivals on a problem of ``size`` rows, classes and positives.

        With ``memory`` also measure memory (and synchronisations on a GPU).
        """
        problem = Problem.draw(*size, share=share, device=self.device)
        rivals = make_rivals(problem, past)
        found: dict[str, dict[str, Any]] = {rival.name: {} for rival in rivals}
        runs: dict[str, int] = {}
        work = OtherWork()
        for rival in rivals:
            slow = self.rates.get(rival.name, 0) * rival.work > self.limit
            if slow and rival.name not in (OURS, REMEMBERING, FOCAL):
                found[rival.name]['note'] = f'> {self.limit:g} s'
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
            turn = seconds * (1 + (seconds < WARM_BELOW))
            runs[rival.name] = max(3, int(self.limit / turn))
            found[rival.name]['times'] = []
        for turn in range(self.repeats):
            first = turn % len(rivals)  # who follows whom inside a turn is the same,
            for rival in rivals[first:] + rivals[:first]:  # who begins is not
                if turn < runs.get(rival.name, 0):
                    seconds = rival.seconds()
                    if seconds < WARM_BELOW:  # caches were as another rival left them
                        seconds = rival.seconds()
                    found[rival.name]['times'].append(round(seconds, 7))
        others = work.cores()
        for rival in rivals:
            result = found[rival.name]
            if 'note' in result:
                continue
            quartiles = np.percentile(result['times'], [50, 25, 75]).round(7)
            result.update(zip(QUARTILES, quartiles.tolist()))
            self.rates[rival.name] = min(result['times']) / rival.work
            if memory:
                share_of_logits = extra_bytes(rival) / problem.logits.nbytes
                result['extra_memory'] = round(share_of_logits, 3)
                if problem.logits.is_cuda:
                    result['host_syncs'] = host_syncs(rival)
        sizes = dict(zip(('rows', 'classes', 'positives'), size))
        return dict(sizes, others=others, rivals=found)


def load_before(patience: float = 0) -> float:
    """Return the load of the last minute; wait a little for earlier work to end."""
    until = time.monotonic() + patience
    while (load := os.getloadavg()[0]) > IDLE and time.monotonic() < until:
        time.sleep(5)
    return round(load, 2)


def environment(device: str, patience: float) -> dict[str, Any]:
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
        load=load_before(patience),
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
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', nargs='*', choices=CASES, default=list(CASES))
    parser.add_argument('--repeats', type=at_least(1), default=9)
    parser.add_argument('--threads', type=at_least(1), default=2)
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--no-sweeps', dest='sweeps', action='store_false')
    parser.add_argument('--quick', action='store_true', help='small sizes, no meaning')
    parser.add_argument(
        '--limit',
        type=at_least(0, float),
        default=3.0,
        metavar='SECONDS',
        help='time for a rival on a problem; one whose call is longer is left out',
    )
    parser.add_argument(
        '--out', type=writable_file, help='path of the files, without suffix'
    )
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    with parser.refusing(RuntimeError, AssertionError):  # torch without CUDA, say
        torch.empty(0, device=args.device)
    env = environment(args.device, patience=0 if args.quick else 90)
    start = time.monotonic()
    report: dict[str, Any] = dict(environment=env, limit=args.limit, quick=args.quick)
    report.update(share=SHARE, cases={}, sweeps={})
    benchmark = Benchmark(args.repeats, args.limit, args.device)
    for name in args.cases:
        size = CASES[name]
        if args.quick:
            size = (size[0] // 50, min(size[1], 80), size[2] // 10)
        case = benchmark.measure(size, memory=True, past=name in WITH_MEMORY)
        report['cases'][name] = case
        print(benchmark_report.case_section(name, case), flush=True)
    if args.sweeps:
        for key, sizes in (QUICK_SWEEPS if args.quick else SWEEPS).items():
            report['sweeps'][key] = [benchmark.measure(size, SHARE) for size in sizes]
            text = benchmark_report.sweep_section(key, report['sweeps'][key], SHARE)
            print(text, flush=True)
    measured = chain(report['cases'].values(), *report['sweeps'].values())
    env['others'] = max(problem['others'] for problem in measured)
    env['idle'] = env['load'] <= IDLE and env['others'] <= IDLE
    env['minutes'] = round((time.monotonic() - start) / 60, 1)
    report['targets'] = benchmark_report.check_targets(report)
    print(f'\n{benchmark_report.text(report)}')
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1, ensure_ascii=False)
        Path(f'{args.out}.json').write_text(text + '\n', encoding='utf-8')
        if args.sweeps:
            benchmark_report.plot(report, Path(f'{args.out}.png'))
    return report


if __name__ == '__main__':
    main()
