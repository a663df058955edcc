"""Train every shipped detector for some steps on generated images, and look.

    python tools/experiments/check_detectors.py --update docs/detectors.md
    python tools/experiments/check_detectors.py --only retinanet fcos
    python tools/experiments/check_detectors.py --table-only

Each config gets a small backbone, the demo data and a fixed number of steps. Checked
are: all losses are finite; the AP of the class scores on the training images, without
the margin with which the loss ranks them, rises well above its start; the evaluation
runs; a checkpoint holds the whole state, and a training that resumes from it continues;
two processes take a step and stay equal.
Configs that become the same when shrunken are trained once. Results go to one file;
the table in the docs is what this tool prints of it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools import ROOT
from tools.common.atomic_file import atomic_file
from tools.common.markdown_table import markdown_table, split_page, update_page
from tools.common.wrong_calls import (
    Parser,
    at_least,
    read_json,
    readable_file,
    reading,
    writable_file,
    writable_folder,
)

RESULTS = ROOT / 'docs' / 'results' / 'detectors.json'
CONFIGS = ROOT / 'configs'
IMAGES = 8
STEPS = 100
LR = 2e-3
# These are known for a slow start: their queries first have to find their places. And
# one keeps its full width of 256, for which the rate is too high.
SLOW = {'detr': 5, 'conditional-detr': 5, 'dab-detr': 5, 'sparse-rcnn': 5}
GENTLE = {'conditional-detr': 5e-4}
SHARE = 0.25  # of what is missing to AP 1 at the start has to be gained
MARKS = ('<!-- detectors -->', '<!-- end detectors -->')
START, END = 5, 10  # steps whose mean AP is that of the start and of the end


def configs() -> list[Path]:
    """Return the shipped configs that train with RaMBO.

    Not those in own_data, nor for fine-tuning, which repeat detectors, nor retrieval.
    """
    return sorted(
        path
        for path in CONFIGS.glob('*/*.py')
        if path.parent.name not in ('_base_', 'own_data', 'reid')
        and 'rambo' in path.stem
        and not any(part in path.stem for part in ('finetune', 'before'))
    )


def _load(path: Path, data: Path, steps: int) -> Any:
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    import rambo_det  # noqa: F401
    from tools.common.shrink_config import shrink

    warnings.filterwarnings('ignore')
    register_all_modules()
    lr = GENTLE.get(path.stem.split('_')[0], LR)
    return shrink(Config.fromfile(path), data, steps, lr)


def _state(runner: Any) -> dict[str, Any]:
    """Return a copy of the state of the model, the loss' memory included."""
    model = getattr(runner.model, 'module', runner.model)
    return copy.deepcopy(dict(model.state_dict()))


def _recorder() -> Any:
    """Return a hook that keeps what every step reports, and its exact AP."""
    from mmengine.hooks import Hook

    from rambo_det.functional import Ranking, detection_average_precision
    from rambo_det.hooks.model import named_losses

    class Record(Hook):
        priority = 'LOWEST'

        def __init__(self) -> None:
            self.logs: list[dict[str, float]] = []
            self.precisions: list[float] = []
            self.seen: list[float] = []  # of the calls in a step
            self.first_iter: int | None = None
            self.state: dict[str, Any] = {}

        def before_train(self, runner):
            """Look at what the last stage ranks."""
            losses = named_losses(runner)
            last = [name for name in losses if 'rpn' not in name][-1]
            losses[last].ranked.register_forward_hook(self.see)

        def see(self, module, args, ranked):
            value = detection_average_precision(*ranked, Ranking(1.0, per_class=True))
            self.seen.append(float(value.nanmean().nan_to_num(0.0)))

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if self.first_iter is None:
                self.first_iter = runner.iter
                self.state = _state(runner)

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            self.logs.append({k: float(v) for k, v in outputs.items()})
            # Decoder layers are the first calls; the last of them is what predicts.
            layers = sum(bool(re.fullmatch(r'(d\d+\.)?loss_cls', k)) for k in outputs)
            self.precisions.append(self.seen[max(layers, 1) - 1])
            self.seen.clear()

    return Record()


def _same(a: Any, b: Any) -> bool:
    import torch

    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    return bool(a == b)


def _run(cfg: Any, work_dir: Path) -> tuple[Any, Any]:
    """Train as configured; return the runner and what was recorded."""
    from mmengine.runner import Runner

    cfg = cfg.copy()
    cfg.work_dir = str(work_dir)
    record = _recorder()
    runner = Runner.from_cfg(cfg)
    runner.register_hook(record)
    runner.train()
    return runner, record


def _train(path: Path, data: Path, work_dir: Path, steps: int) -> dict[str, Any]:
    """Train, evaluate, save and resume; return what was found."""
    from rambo_det import RaMBOLoss

    cfg = _load(path, data, steps)
    runner, record = _run(cfg, work_dir)
    heads = {
        type(module).__name__
        for module in runner.model.modules()
        if isinstance(getattr(module, 'loss_cls', None), RaMBOLoss)
    }
    losses = [v for log in record.logs for k, v in log.items() if 'loss' in k]
    scalars = runner.message_hub.log_scalars
    metrics = {
        key.split('val/', 1)[1]: float(value.current())
        for key, value in scalars.items()
        if key.startswith('val/') and key.endswith(('AP50', 'mAP', 'mAP_50'))
    }
    result = dict(
        heads=sorted(heads),
        start=statistics.fmean(record.precisions[:START]),
        end=statistics.fmean(record.precisions[-END:]),
        finite=all(math.isfinite(value) for value in losses) and bool(losses),
        metrics=metrics,
    )

    finished = _state(runner)
    more = cfg.copy()
    more.train_cfg = dict(cfg.train_cfg, max_iters=steps + 2, val_interval=1000)
    more.resume, more.load_from = True, str(work_dir / f'iter_{steps}.pth')
    more.experiment_name = f'{work_dir.name}_resumed'
    _, again = _run(more, work_dir)
    result['resumed'] = (
        again.first_iter == steps
        and len(again.logs) == 2
        and _same(finished, again.state)
    )
    return result


def _meeting(work_dir: Path) -> Path:
    """Return the file by which two processes find each other; it must be new."""
    return work_dir.resolve().with_suffix('.meeting')


def _step_of_two(rank: int, path: Path, data: Path, work_dir: Path) -> bool:
    """Take two steps in one of two processes; return whether it worked."""
    import torch
    import torch.distributed as dist

    os.environ.update(LOCAL_RANK=str(rank))
    meeting = f'file://{_meeting(work_dir)}'
    dist.init_process_group('gloo', init_method=meeting, rank=rank, world_size=2)
    cfg = _load(path, data, 2)
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg.val_interval = 1000
    cfg.launcher = 'pytorch'
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,  # on the CPU
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    runner, record = _run(cfg, work_dir)
    parameters = torch.cat([p.detach().flatten() for p in runner.model.parameters()])
    other = parameters.clone()
    dist.broadcast(other, src=0)
    finite = all(math.isfinite(v) for log in record.logs for v in log.values())
    worked = torch.equal(parameters, other) and finite and len(record.logs) == 2
    dist.barrier()
    dist.destroy_process_group()
    return worked


def _describe(path: Path, data: Path, steps: int) -> str:
    """Hash what is trained, not where the data lie."""
    cfg = _load(path, data, steps)
    names = ('model', 'optim_wrapper', 'train_cfg', 'custom_hooks')
    text = repr({name: cfg.get(name) for name in names})
    text += cfg.train_dataloader.dataset.type
    return hashlib.sha256(text.encode()).hexdigest()


def _begin(log: Path) -> None:
    """Let the output of this process go to a file."""
    import torch

    torch.set_num_threads(1)
    with log.open('a') as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


def _call(folder: Path, function: Any, *jobs: tuple[Any, ...]) -> list[Any] | None:
    """Call a function in new processes; return the results, or ``None`` on an error.

    They start with everything imported, and nothing else.
    """
    context = multiprocessing.get_context('forkserver')
    modules = ['tools.common.shrink_config', 'mmdet.apis', 'rambo_det']
    context.set_forkserver_preload(modules)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / 'output.log'
    with ProcessPoolExecutor(len(jobs), context, _begin, (log,)) as workers:
        futures = [workers.submit(function, *job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except Exception:
            with log.open('a') as stream:
                traceback.print_exc(file=stream)
            return None


def check(path: Path, data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Check one config and return what was found."""
    begin = time.monotonic()
    (found,) = _call(folder, _train, (path, data, folder / 'run', steps)) or [{}]
    if found:
        _meeting(folder / 'two').unlink(missing_ok=True)
        pair = [(rank, path, data, folder / 'two') for rank in (0, 1)]
        found['two_processes'] = all(_call(folder, _step_of_two, *pair) or [False])
    return dict(found, seconds=round(time.monotonic() - begin), ok=passed(found))


def passed(found: dict[str, Any]) -> bool:
    """Whether all checks passed, and AP gained its share of what was missing."""
    parts = [found.get(k) for k in ('finite', 'metrics', 'resumed', 'two_processes')]
    if not all(parts):
        return False
    return bool(found['end'] - found['start'] >= SHARE * (1 - found['start']))


def table(results: dict[str, Any]) -> str:
    """Return the Markdown table of a results file; failed configs are not in it."""
    rows = [['config', 'heads', 'class AP', 'evaluated', 'resumed', 'two processes']]
    groups: dict[str, list[str]] = {}
    for name, found in sorted(results.items()):
        if found.get('ok'):
            groups.setdefault(found['key'], []).append(f'`{name}`')
    for names in groups.values():
        found = results[names[0].strip('`')]
        heads = ', '.join(f'`{head}`' for head in found['heads'])
        rise = f'{found["start"]:.2f} → {found["end"]:.2f}'
        answers = (found[key] for key in ('metrics', 'resumed', 'two_processes'))
        yes = ('yes' if answer else 'no' for answer in answers)
        rows.append(['<br>'.join(names), heads, rise, *yes])
    return markdown_table(rows, text_columns=range(6))


def run(
    args: argparse.Namespace, chosen: dict[Path, str], results: dict[str, Any]
) -> list[str]:
    """Check configs, keep the results as they come; return the names that failed."""
    from tools.dataset_tools.make_demo_voc import generate, write_coco

    os.environ.setdefault('OMP_NUM_THREADS', '1')
    work_dir = args.work_dir or Path(tempfile.mkdtemp(prefix='check_detectors'))
    data = (work_dir / 'data').resolve()
    generate(data, train=IMAGES, test=4)
    write_coco(data)
    settings = dict(images=IMAGES, lr=LR)
    for package in ('torch', 'mmdet', 'mmengine'):
        settings[package] = import_module(package).__version__
    failed: list[str] = []
    done: dict[str, dict[str, Any]] = {}
    for number, (path, name) in enumerate(chosen.items(), start=1):
        print(f'[{number}/{len(chosen)}] {name} ...', end=' ', flush=True)
        folder = work_dir / name
        steps = args.steps * SLOW.get(path.stem.split('_')[0], 1)
        (key,) = _call(folder, _describe, (path, data, steps)) or ['']
        if key in done:
            found, said = done[key], 'same as before when shrunken'
        else:
            found = dict(ok=False)
            if key:
                found = dict(check(path, data, folder, steps), key=key, steps=steps)
                done[key] = found
            said = 'ok' if found['ok'] else f'FAILED, see {folder}/output.log'
            if 'end' in found:
                rise = f'{found["start"]:.2f} -> {found["end"]:.2f}'
                said = f'class AP {rise} ({found["seconds"]} s) {said}'
        print(said)
        results[name] = found
        if not found['ok']:
            failed.append(name)
        content = dict(settings=settings, results=dict(sorted(results.items())))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(args.out) as draft:
            draft.write_text(json.dumps(content, indent=1) + '\n')
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', default=[''], help='parts of the names')
    parser.add_argument('--steps', type=at_least(1), default=STEPS)
    parser.add_argument(
        '--out', type=writable_file, default=RESULTS, help='results file'
    )
    parser.add_argument(
        '--work-dir', type=writable_folder, help='kept; default: a temporary one'
    )
    parser.add_argument('--table-only', action='store_true')
    parser.add_argument('--update', type=readable_file, help='page that gets the table')
    args = parser.parse_args(argv)
    results: dict[str, Any] = {}
    if args.out.is_file():
        expected = 'results of check_detectors'
        with parser.refusing(), reading(args.out, expected):
            results = read_json(args.out, expected)['results']
    names = {path: f'{path.parent.name}/{path.stem}' for path in configs()}
    chosen = [p for p, name in names.items() if any(part in name for part in args.only)]
    if not chosen:
        parser.error(f'--only {" ".join(args.only)}: no shipped config has such a name')
    if args.update:  # not only after minutes of training
        with parser.refusing():
            split_page(args.update, *MARKS)
    failed = (
        [] if args.table_only else run(args, {p: names[p] for p in chosen}, results)
    )
    print(f'\n{table(results)}')
    if args.update:
        update_page(args.update, *MARKS, table(results))
    if failed:
        sys.exit(f'check_detectors: {len(failed)} failed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
