"""Measure what ``score_thr`` and the initial bias mean for ranking-trained scores.

    python tools/analysis_tools/measure_thresholds.py --out docs/results/thresholds.json
    python tools/analysis_tools/measure_thresholds.py --run NAME CONFIG PREDICTIONS

Trains a small RetinaNet on generated images with RaMBO, once for each prior (the
probability that the classifier's bias starts with), and tests it with each threshold.
Time is CPU time of this process, so that other programs do not count.

With ``--run`` nothing is trained: AP50 is that of the predictions of a run from each
threshold on, what the test would have found with it. PREDICTIONS is the file of
``tools/test.py --out``, or ``detections.npz`` of tools/experiments/compare.py, with a
lower one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools import ROOT
from tools.analysis_tools.matched_ap import class_ap, match, mean_ap
from tools.analysis_tools.plot_results import Run, load_run
from tools.common.atomic_file import atomic_file
from tools.common.markdown_table import markdown_table
from tools.dataset_tools.make_demo_voc import generate, write_coco

CONFIG = ROOT / 'configs' / 'pascal_voc' / 'retinanet_r50_fpn_rambo_1x_voc0712.py'
PRIORS = (0.01, 0.5)
THRESHOLDS = (0.0, 0.0001, 0.001, 0.01, 0.05, 0.1, 0.3, 0.5)
HIGH = (0.7, 0.9, 0.97)  # where sigmoids that started at 0.5 may end
QUANTILES = (0.01, 0.5, 0.99)


def _config(data: Path, steps: int, prior: float, work_dir: Path) -> Any:
    from mmengine.config import Config

    from tools.common.shrink_config import shrink

    cfg = shrink(Config.fromfile(CONFIG), data, steps, lr=2e-3)
    start = dict(type='Normal', name='retina_cls', std=0.01, bias_prob=prior)
    cfg.model.bbox_head.init_cfg = dict(
        type='Normal', layer='Conv2d', std=0.01, override=start
    )
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=-1, save_last=False
    )
    cfg.train_cfg.val_interval = steps
    cfg.work_dir = str(work_dir)
    return cfg


def _test(runner: Any, threshold: float) -> dict[str, float]:
    """Test with a threshold; return AP50, detections and milliseconds per image."""
    import torch

    model = runner.model.eval()
    model.bbox_head.test_cfg.score_thr = threshold
    evaluator = runner.build_evaluator(runner.cfg.test_evaluator)
    loader = runner.test_dataloader
    evaluator.dataset_meta = loader.dataset.metainfo
    seconds, images, detections = 0.0, 0, 0
    with torch.no_grad():
        for data in loader:
            data = model.data_preprocessor(data, False)
            begin = time.process_time()
            samples = model(**data, mode='predict')
            seconds += time.process_time() - begin
            images += len(samples)
            detections += sum(len(s.pred_instances) for s in samples)
            evaluator.process(data_samples=samples, data_batch=data)
    metrics = evaluator.evaluate(images)
    return dict(
        ap50=100 * metrics['pascal_voc/mAP'],
        detections=detections / images,
        milliseconds=1000 * seconds / images,
    )


def _scores(runner: Any) -> dict[str, float]:
    """Return quantiles of the sigmoids of all anchors on the test images."""
    import torch

    model = runner.model.eval()
    scores = []
    with torch.no_grad():
        for data in runner.test_dataloader:
            data = model.data_preprocessor(data, False)
            maps = model(data['inputs'], mode='tensor')[0]
            scores += [level.sigmoid().flatten() for level in maps]
    values = torch.cat(scores).double()
    picked = values[torch.randperm(len(values))[:1_000_000]].quantile(
        torch.tensor(QUANTILES, dtype=torch.float64)
    )
    return {str(q): float(v) for q, v in zip(QUANTILES, picked)}


def measure(steps: int, images: int, work_dir: Path) -> dict[str, Any]:
    """Train once for each prior and test with each threshold."""
    import torch
    from mmdet.utils import register_all_modules
    from mmengine.runner import Runner

    import rambo_det  # noqa: F401

    warnings.filterwarnings('ignore')
    register_all_modules()
    torch.set_num_threads(1)
    data = (work_dir / 'data').resolve()
    generate(data, train=images, test=max(images // 4, 1))
    write_coco(data)
    result: dict[str, Any] = {}
    for prior in PRIORS:
        print(f'prior {prior}: training {steps} steps', flush=True)
        folder = work_dir / str(prior)
        runner = Runner.from_cfg(_config(data, steps, prior, folder))
        runner.train()
        rows = {}
        _test(runner, 0.05)  # the first pass through the data takes longer
        for threshold in THRESHOLDS:
            rows[str(threshold)] = _test(runner, threshold)
            print(f'  score_thr {threshold}: {rows[str(threshold)]}', flush=True)
        result[str(prior)] = dict(scores=_scores(runner), thresholds=rows)
    return dict(
        settings=dict(
            config=CONFIG.name, steps=steps, images=images, torch=torch.__version__
        ),
        priors=result,
    )


def of_run(run: Run) -> dict[str, dict[str, float]]:
    """Return AP50 and detections per image of a run, for each threshold."""
    found = {}
    for threshold in (*THRESHOLDS[1:], *HIGH):  # the run has had the lowest
        detections = [
            [rows[rows[:, 4] >= threshold] for rows in image]
            for image in run.detections
        ]
        kept = replace(run, detections=detections)
        found[str(threshold)] = dict(
            ap50=100 * float(mean_ap(class_ap(match(kept))[0])),
            detections=sum(len(rows) for image in detections for rows in image)
            / len(detections),
        )
    return found


def _runs_table(runs: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a row for each threshold, and two columns for each run."""
    head = ['`score_thr`', *(f'{name}: AP50' for name in runs)]
    rows = [[*head, *(f'{name}: detections per image' for name in runs)]]
    for threshold in next(iter(runs.values())):
        found = [run[threshold] for run in runs.values()]
        aps = [f'{row["ap50"]:.1f}' for row in found]
        rows.append([threshold, *aps, *(f'{row["detections"]:.0f}' for row in found)])
    return markdown_table(rows, text_columns=())


def table(content: dict[str, Any]) -> str:
    """Return the Markdown table of a results file."""
    if 'runs' in content:
        return _runs_table(content['runs'])
    rows = [
        [
            'prior',
            'scores of all anchors: 1 %, median, 99 %',
            '`score_thr`',
            'AP50',
            'detections per image',
            'ms per image',
        ]
    ]
    for prior, found in content['priors'].items():
        spread = ', '.join(f'{found["scores"][str(q)]:.3f}' for q in QUANTILES)
        for place, (threshold, row) in enumerate(found['thresholds'].items()):
            rows.append(
                [
                    *((prior, spread) if place == 0 else ('', '')),
                    threshold,
                    f'{row["ap50"]:.1f}',
                    f'{row["detections"]:.0f}',
                    f'{row["milliseconds"]:.1f}',
                ]
            )
    return markdown_table(rows, text_columns=[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, required=True, help='results file')
    parser.add_argument('--steps', type=int, default=600)
    parser.add_argument('--images', type=int, default=160)
    parser.add_argument(
        '--run',
        nargs=3,
        action='append',
        metavar=('NAME', 'CONFIG', 'PREDICTIONS'),
        help='a finished run to measure instead',
    )
    parser.add_argument('--table-only', action='store_true')
    args = parser.parse_args(argv)
    if not args.table_only:
        if args.run:
            content: dict[str, Any] = dict(runs={})
            for name, *files in args.run:
                print(f'{name}: matching …', flush=True)
                content['runs'][name] = of_run(load_run(*files))
        else:
            with tempfile.TemporaryDirectory(prefix='thresholds') as folder:
                content = measure(args.steps, args.images, Path(folder))
        with atomic_file(args.out) as draft:
            draft.write_text(json.dumps(content, indent=1) + '\n')
    print(table(json.loads(args.out.read_text())))


if __name__ == '__main__':
    main()
