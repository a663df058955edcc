"""Train and evaluate a small detector with the RaMBO loss, from nothing.

    python tools/dev/demo.py

Generates a data set, trains on it from random weights with mmdet's own
training script, evaluates the saved checkpoint on the test split, and draws
detections and precision-recall curves. Needs no GPU, network or pretrained
weights; about three minutes on a CPU.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools import ROOT
from tools.common.wrong_calls import Parser, readable_file, writable_folder
from tools.dataset_tools.make_demo_voc import generate

CONFIG = ROOT / 'configs' / 'demo' / 'faster-rcnn_tiny_fpn_rambo_demo.py'
DATA_VARIABLE = 'RAMBO_DEMO_DATA'
REQUIRED_AP50 = 0.80
# More threads gain nothing on images this small, and where other programs want the
# cores too, a thread that waits for another makes training several times slower.
THREADS = dict(OMP_NUM_THREADS='1')


def _command(script: str, *args: object) -> list[str]:
    """Builds the command line of a script in ``tools``."""
    return [sys.executable, str(ROOT / 'tools' / script), *map(str, args)]


def _run(step: str, command: list[str]) -> None:
    """Runs a step, its output going to the terminal, or exits."""
    print(f'\n=== {step}\n$ {shlex.join(command)}', flush=True)
    environment = {**THREADS, **os.environ}
    code = subprocess.run(command, env=environment).returncode
    if code:
        sys.exit(
            f'demo: this step failed with exit status {code}, see its output '
            f'above: {step}\nTo repeat it: {shlex.join(command)}'
        )


def _checkpoint(work_dir: Path) -> Path:
    """Finds the checkpoint that the training just wrote."""
    pointer = work_dir / 'last_checkpoint'
    if not pointer.is_file():
        sys.exit(f'demo: the training left no checkpoint: {pointer} does not exist')
    return Path(pointer.read_text().strip())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', type=readable_file, default=CONFIG)
    parser.add_argument(
        '--data',
        type=writable_folder,
        default=Path('data/demo_voc'),
        help='folder of the generated data set (default: %(default)s)',
    )
    parser.add_argument(
        '--work-dir',
        type=writable_folder,
        default=Path('work_dirs/demo'),
        help='folder of all results (default: %(default)s)',
    )
    args = parser.parse_args(argv)

    start = time.monotonic()
    print(f'=== 1/4 data: generating shapes in {args.data} (seconds)', flush=True)
    with parser.refusing():
        written = generate(args.data)
    print('written' if written else 'already there')

    # The configs read the data root from the environment.
    os.environ[DATA_VARIABLE] = str(args.data.resolve())
    work_dir = args.work_dir
    predictions = work_dir / 'predictions.pkl'
    (work_dir / 'last_checkpoint').unlink(missing_ok=True)
    train = _command('train.py', args.config, '--work-dir', work_dir)
    _run('2/4 training from random weights (about two and a half minutes)', train)
    checkpoint = _checkpoint(work_dir)
    log = max(work_dir.glob('*/*.log'), key=lambda path: path.stat().st_mtime)
    test = _command(
        *('test.py', args.config, checkpoint),
        *('--work-dir', work_dir, '--out', predictions),
    )
    _run('3/4 evaluating the checkpoint on the test split (seconds)', test)

    print('\n=== 4/4 pictures (seconds)', flush=True)
    # Imported late: it needs mmdet, and the data above do not.
    from tools.analysis_tools.plot_results import load_run, plot_all, table

    run = load_run(args.config, predictions)
    pictures = plot_all([run], work_dir)
    plot = _command(
        *('analysis_tools/plot_results.py', args.config, predictions),
        *('--out', work_dir),
    )

    variable = shlex.quote(f'{DATA_VARIABLE}={args.data}')
    print(f'\n{table([run])}\n')
    for name, path in (
        *(('checkpoint', checkpoint), ('log', log), ('predictions', predictions)),
        *(('picture', path) for path in pictures),
    ):
        print(f'{name:12} {path}')
    print(f'to repeat a part (with {variable} in the environment):')
    for command in (train, test, plot):
        print(f'  {shlex.join(command)}')
    seconds = time.monotonic() - start
    print(f'took {seconds / 60:.1f} minutes')
    ap50 = run.mean_ap
    print(f'AP50 on the test split: {ap50:.3f} (required: {REQUIRED_AP50:.2f})')
    if not ap50 >= REQUIRED_AP50:
        sys.exit(
            f'demo: AP50 is {ap50:.3f}, below the required {REQUIRED_AP50:.2f}: '
            f'the loss does not train as it should; see {log}'
        )


if __name__ == '__main__':
    main()
