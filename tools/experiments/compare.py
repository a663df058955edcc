"""Train configs with several seeds and compare their average precision.

    python tools/experiments/compare.py CE.py RAMBO.py --name voc --seeds 0 1 2 --jobs 2
    python tools/experiments/compare.py --name voc --table-only --update docs/results.md

The first config is the baseline. Every run is trained and tested by mmdet's
own scripts; runs that are done are skipped and those that were interrupted go
on, so the same command, or one with more seeds, continues a comparison. For each
run a record and its matched detections are written to ``--out``, and
``comparison.json``: with them a comparison goes on on another machine. Checkpoints,
logs and detections stay in ``--work-dir``. Exit status 1: a run failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from tools import ROOT
from tools.analysis_tools.matched_ap import (
    Matches,
    best_f1,
    class_ap,
    coco_class_ap,
    match,
    mean_ap,
    mean_precision,
)
from tools.common.markdown_table import split_page, update_page
from tools.experiments import compare_report
from tools.experiments.compare_jobs import Job, Pool, Stopped

if TYPE_CHECKING:
    from tools.experiments.compare_configs import Candidate

TRAIN, TEST = ROOT / 'tools' / 'train.py', ROOT / 'tools' / 'test.py'
KEY = 'pascal_voc/mAP'  # one IoU threshold, 0.5: AP50, not rounded
PACKAGES = ('torch', 'mmdet', 'mmcv', 'mmengine', 'rambo_det')


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on.

    That of rambo_det has a hash of its source behind it, since a working copy
    changes without its version.
    """
    found = {name: import_module(name).__version__ for name in PACKAGES}
    package = Path(import_module('rambo_det').__file__).parent
    source = hashlib.sha256()
    for path in sorted(package.rglob('*.py')):
        source.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    found['rambo_det'] += f'+{source.hexdigest()[:8]}'
    return {'python': sys.version.split()[0], **found}


@dataclass(frozen=True)
class Plan:
    """A run to be made: a config and a seed, and where its files go.

    Attributes:
        candidate: The config.
        seed: The seed.
        folder: Its work dir.
        out: Folder of the results' files.
        options: The ``--cfg-options``, as they came.
        versions: The versions of the packages.
        threads: How many threads it gets.
    """

    candidate: Candidate
    seed: int
    folder: Path
    out: Path
    options: Sequence[str]
    versions: dict[str, str]
    threads: int

    @property
    def label(self) -> str:
        return f'{self.candidate.stem} seed {self.seed}'

    @property
    def record_path(self) -> Path:
        return self.out / compare_report.run_name(self.candidate.stem, self.seed)

    @property
    def matches_path(self) -> Path:
        return compare_report.matches_path(self.record_path)

    @cached_property
    def state(self) -> dict[str, Any]:
        """What is known of the run; written to run.json in its folder."""
        path = self.folder / 'run.json'
        return compare_report.read_json(path) if path.is_file() else {}

    def save_state(self) -> None:
        compare_report.write_json(self.folder / 'run.json', self.state)

    @property
    def only_test_changed(self) -> bool:
        """Whether what is there was trained as now, but tested in another way."""
        return bool(
            self.state
            and self.state['config_sha'] != self.candidate.sha
            and import_module('tools.experiments.compare_configs').trained_alike(
                self.state['resolved'], self.candidate.resolved
            )
        )

    def refusal(self) -> str | None:
        """Say why what is there must not be used, if so."""
        if self.only_test_changed:
            return None
        advice = (
            f'move or delete {self.folder} and {self.record_path} to train it anew, '
            'or choose another --work-dir and --name'
        )
        same = self.state.get('config_sha') == self.candidate.sha
        if self.state and not same and self.checkpoint():
            what = import_module('tools.experiments.compare_configs').changes(
                self.state['resolved'], self.candidate.resolved
            )
            return (
                f'{self.label} was trained with another config than it is now '
                f'({what}); restore the config, or {advice}'
            )
        if self.record_path.is_file():
            record = compare_report.read_json(self.record_path)
            if record['config_sha'] != self.candidate.sha:
                return (
                    f'{self.record_path} is of another config than '
                    f'{self.candidate.path} is now (SHA-256 '
                    f'{record["config_sha"][:8]}, now {self.candidate.sha[:8]}); '
                    f'restore the config, or {advice}'
                )
            if not same and not self.matches_path.is_file():
                return (
                    f'{self.record_path} is there, but not {self.matches_path.name} '
                    'beside it, which intervals are computed from; restore that file, '
                    f'or {advice}'
                )
        elif not self.state and self.checkpoint():
            return (
                f'{self.folder} holds a checkpoint, but no run.json that says of what '
                f'config; {advice}'
            )
        return None

    @property
    def is_done(self) -> bool:
        files = self.record_path, self.matches_path
        return all(map(Path.is_file, files)) and not self.only_test_changed

    def checkpoint(self) -> Path | None:
        """Find the last checkpoint, even if the folder was moved."""
        pointer = self.folder / 'last_checkpoint'
        if not pointer.is_file():
            return None
        path = self.folder / Path(pointer.read_text().strip()).name
        return path if path.is_file() else None

    def done(self) -> float:
        """Return the share of the training that the last checkpoint holds."""
        path = self.checkpoint()
        number = path.stem.rpartition('_')[2] if path else ''
        return int(number) / self.candidate.epochs if number.isdecimal() else 0.0

    def train_command(self) -> list[str]:
        checkpoint = self.checkpoint()
        if checkpoint is None:
            # What an attempt without a checkpoint has left is of no use.
            self.state.update(
                config_sha=self.candidate.sha,
                resolved=self.candidate.resolved,
                since=time.strftime('%Y%m%d_%H%M%S'),
                sessions=0,
                train_seconds=0.0,
                trained=False,
            )
        self.state['sessions'] += 1
        self.state.update(versions=self.versions, threads=self.threads)
        self.save_state()
        command = [sys.executable, '-W', 'ignore', TRAIN, self.candidate.path]
        command += ['--work-dir', self.folder]
        if checkpoint:
            command += ['--resume', checkpoint]
        options = [*self.options, f'randomness.seed={self.seed}']
        hook = (self.candidate.cfg.get('default_hooks') or {}).get('checkpoint') or {}
        if hook.get('max_keep_ckpts') == 1:
            # It deletes the old one first: stopped in between, nothing would be left.
            options.append('default_hooks.checkpoint.max_keep_ckpts=2')
        return [*map(str, command), '--cfg-options', *options]

    def test_command(self) -> list[str]:
        checkpoint = self.checkpoint()
        if checkpoint is None:
            raise FileNotFoundError(f'the training left no checkpoint in {self.folder}')
        if self.only_test_changed:
            for path in (self.record_path, self.matches_path):
                path.unlink(missing_ok=True)
            self.state.update(
                config_sha=self.candidate.sha, resolved=self.candidate.resolved
            )
            self.save_state()
        command = [sys.executable, '-W', 'ignore', TEST, self.candidate.path]
        command += [checkpoint, '--work-dir', self.folder / 'test']
        command += ['--out', self.folder / 'detections.pkl']
        options = [*self.options, f'randomness.seed={self.seed}']
        return [*map(str, command), '--cfg-options', *options]

    def ended(self, step: str, status: int, seconds: float) -> None:
        """Note that a step has ended."""
        if step == 'train':
            self.state['train_seconds'] += seconds
            self.state['trained'] = status == 0
            self.save_state()

    def job(self) -> Job:
        """Return what is left to do."""
        steps = [('test', self.test_command)]
        trained = self.state.get('trained') and self.checkpoint() is not None
        if not trained:
            steps.insert(0, ('train', self.train_command))
        return Job(
            label=self.label,
            folder=self.folder,
            steps=steps,
            ended=self.ended,
            finish=lambda: evaluate(self),
            done=1.0 if trained else self.done(),
        )


def _round(value: float) -> float:
    return float(f'{value:.5g}')


def _by_class(run: Any, values: np.ndarray) -> dict[str, float | None]:
    """Name the classes of their values; None where a class has no object."""
    return {
        name: None if np.isnan(value) else _round(value)
        for name, value in zip(run.classes, values)
    }


def training_curve(folder: Path, since: str = '') -> list[dict[str, float]]:
    """Read what was logged, a mean for each epoch, and AP50 where it was evaluated.

    What a run that was interrupted had logged is replaced by what it logged of the
    same iterations when it went on.

    Args:
        folder: The work dir.
        since: The time at which the training began, like the name of a log's folder.
    """
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    # The folders' names are the times at which they were made.
    for path in sorted(folder.glob('2*/vis_data/scalars.json')):
        if path.parts[-3] < since:
            continue
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut off when it was stopped
                continue
            kind = 'train' if 'loss' in line else 'val'
            lines[kind, line['step']] = line
    epochs: dict[int, dict[str, list[float]]] = {}
    for (kind, step), line in lines.items():
        if kind == 'val':
            if KEY in line:
                epochs.setdefault(step, {})['val_ap50'] = [line[KEY]]
            continue
        for key, value in line.items():
            if key.startswith('loss') or key.endswith('_ap'):
                values = epochs.setdefault(line['epoch'], {})
                values.setdefault(key, []).append(value)
    return [
        dict(epoch=epoch, **{key: _round(np.mean(v)) for key, v in values.items()})
        for epoch, values in sorted(epochs.items())
    ]


def _check_printed(plan: Plan, ap50: float) -> None:
    """Make sure that our AP50 is the one that mmdet has printed."""
    evaluator = plan.candidate.cfg.get('test_evaluator')
    if not isinstance(evaluator, dict) or evaluator.get('eval_mode') != 'area':
        return
    if evaluator.get('iou_thrs', 0.5) not in (0.5, [0.5]):
        return
    reports = sorted((plan.folder / 'test').glob('2*/2*.json'))
    printed = json.loads(reports[-1].read_text())[KEY]
    if abs(printed - ap50) > 1e-5:
        raise ValueError(
            f'AP50 of {plan.label} is {ap50:.6f}, but mmdet printed {printed:.6f}; '
            f'expected the same of the same detections, see {reports[-1]}'
        )


def _keep_detections(run: Any, path: Path) -> None:
    """Write the detections as arrays, a row each, with their image and label."""
    images = [
        np.full(len(rows), image)
        for image, found in enumerate(run.detections)
        for rows in found
    ]
    labels = [
        np.full(len(rows), label)
        for found in run.detections
        for label, rows in enumerate(found)
    ]
    rows = np.concatenate([rows for found in run.detections for rows in found])
    np.savez_compressed(
        path,
        boxes=rows[:, :4],
        scores=rows[:, 4],
        labels=np.concatenate(labels).astype(np.uint16),
        images=np.concatenate(images).astype(np.uint32),
        image_ids=np.array([str(key) for key in run.images]),
    )


def evaluate(plan: Plan) -> str:
    """Write a run's files from what the test script has dumped."""
    from tools.analysis_tools.plot_results import load_run

    dump = plan.folder / 'detections.pkl'
    # The script has left the config there with the options in it.
    run = load_run(plan.folder / 'test' / plan.candidate.path.name, dump)
    matches = match(run)
    per_class = class_ap(matches)[0]
    coco = coco_class_ap(run)
    by_iou = mean_ap(coco)  # 0.5, 0.55, … 0.95
    ap50, ap = float(mean_ap(per_class)), float(by_iou.mean())
    f1, threshold, f1_at_half = best_f1(matches)
    _check_printed(plan, ap50)
    _keep_detections(run, plan.folder / 'detections.npz')
    matches.save(plan.matches_path)
    ids = '\n'.join(map(str, run.images)).encode()
    state = plan.state
    record = dict(
        config=plan.candidate.stem,
        config_sha=plan.candidate.sha,
        seed=plan.seed,
        date=compare_report.now(),
        options=list(plan.options),
        versions=state['versions'],
        images=len(run.images),
        image_ids_sha=hashlib.sha256(ids).hexdigest(),
        train_seconds=round(state['train_seconds'], 1),
        threads=state['threads'],
        sessions=state['sessions'],
        ap50=ap50,
        ap=ap,
        ap75=float(by_iou[5]),
        best_f1=f1,
        best_threshold=threshold,
        f1_at_half=f1_at_half,
        class_ap50=_by_class(run, per_class),
        class_ap=_by_class(run, coco.mean(axis=0)),
        curve=training_curve(plan.folder, state['since']),
        pr_curve=[round(float(value), 4) for value in mean_precision(matches)],
    )
    compare_report.write_json(plan.record_path, record)
    dump.unlink()
    return f'AP50 {100 * ap50:.1f}, AP {100 * ap:.1f} on {len(run.images)} images'


def make_plans(args: argparse.Namespace) -> list[Plan]:
    """Check everything that can be checked before training.

    Raises:
        ValueError: If something is wrong with the arguments or in the way.
    """
    from tools.experiments import compare_configs

    options = compare_configs.parse_options(args.cfg_options)
    candidates = [compare_configs.load(path, options) for path in args.configs]
    compare_configs.check(candidates)
    known = versions()
    # Seed by seed, so that there is something to compare early.
    plans = [
        Plan(
            candidate=candidate,
            seed=seed,
            folder=(args.work_dir / candidate.stem / f'seed_{seed}').resolve(),
            out=args.out,
            options=args.cfg_options,
            versions=known,
            threads=max(1, cores() // args.jobs),
        )
        for seed in args.seeds
        for candidate in candidates
    ]
    refusals = [text for text in (plan.refusal() for plan in plans) if text]
    if refusals:
        raise ValueError('\n'.join(refusals))
    return plans


def cores() -> int:
    """Return how many processor cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def train(plans: Sequence[Plan], jobs: int) -> int:
    """Make all runs that are not done; return how many failed."""
    todo = [plan for plan in plans if not plan.is_done]
    for plan in plans:
        if plan.is_done:
            print(f'{plan.label}: done before, {plan.record_path}')
    failures = Pool(jobs, plans[0].threads).run([plan.job() for plan in todo])
    for failure in failures:
        print(failure, file=sys.stderr)
    return len(failures)


def summarise(
    plans: Sequence[Plan], name: str, resamples: int
) -> tuple[dict[str, Any], compare_report.Groups]:
    """Compare the runs of the plans' configs and write ``comparison.json``.

    Runs of other seeds in the same folder, made by earlier calls, count too.

    Raises:
        ValueError: If a config has no run to compare.
    """
    out, found = plans[0].out, compare_report.read_groups(plans[0].out)
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    matches: dict[str, dict[int, Matches]] = {}
    for plan in plans:
        stem = plan.candidate.stem
        if stem in groups:
            continue
        groups[stem], matches[stem] = {}, {}
        for seed, record in found.get(stem, {}).items():
            path = plan.out / compare_report.run_name(stem, seed)
            path = compare_report.matches_path(path)
            if record['config_sha'] == plan.candidate.sha and path.is_file():
                groups[stem][seed] = record
                matches[stem][seed] = Matches.load(path)
            else:
                print(
                    f'{stem} seed {seed}: left out, of another config or without '
                    f'{path.name}'
                )
    groups = {stem: records for stem, records in groups.items() if records}
    baseline = plans[0].candidate.stem
    if baseline not in groups:
        raise ValueError(
            f'{baseline} has no finished run, but all others are compared with it; '
            'see above why, and repeat the command'
        )
    used = {
        json.dumps(r['versions'])
        for records in groups.values()
        for r in records.values()
    }
    if len(used) > 1:
        print('the runs were made with different versions:', *sorted(used), sep='\n  ')
    comparison = compare_report.compare(name, groups, matches, resamples)
    compare_report.write_json(out / compare_report.COMPARISON, comparison)
    return comparison, groups


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'configs',
        nargs='*',
        type=Path,
        metavar='CONFIG',
        help='configs to compare; the first is the baseline',
    )
    parser.add_argument('--name', required=True, help='what to call the comparison')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument(
        '--jobs', type=int, default=1, help='runs at a time; they share the cores'
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/compare'))
    parser.add_argument(
        '--out',
        type=Path,
        help='folder of the files of results (default: docs/results/NAME)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='changes to all configs, as for tools/train.py',
    )
    parser.add_argument(
        '--resamples', type=int, default=2000, help='of the bootstrap (default: 2000)'
    )
    parser.add_argument(
        '--table-only', action='store_true', help='train nothing, read --out'
    )
    parser.add_argument(
        '--update',
        type=Path,
        metavar='PAGE.md',
        help='put the table between <!-- compare NAME --> and <!-- end NAME -->',
    )
    parser.add_argument('--plot', type=Path, metavar='PATH.png')
    args = parser.parse_args(argv)
    if not re.fullmatch(r'[\w.-]+', args.name):
        parser.error(
            f'--name must be of letters, digits, dots and dashes, got {args.name!r}'
        )
    args.out = args.out or Path('docs/results') / args.name
    if args.table_only == bool(args.configs):
        parser.error(
            'expected either CONFIG to train or --table-only, got '
            + ('both' if args.configs else 'neither')
        )
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error(f'--seeds must be distinct and not negative, got {args.seeds}')
    for name, least in (('jobs', 1), ('resamples', 100)):
        if getattr(args, name) < least:
            parser.error(
                f'--{name} must be at least {least}, got {getattr(args, name)}'
            )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = parse(argv)
    failed = 0
    try:
        if args.table_only:
            comparison, groups = compare_report.read_comparison(args.out)
        else:
            plans = make_plans(args)
            if args.update:  # not only after days of training
                split_page(args.update, *compare_report.marks(args.name))
            args.out.mkdir(parents=True, exist_ok=True)
            failed = train(plans, args.jobs)
            comparison, groups = summarise(plans, args.name, args.resamples)
        text = compare_report.table(comparison, groups)
        print(f'\n{text}')
        if args.update:
            update_page(args.update, *compare_report.marks(args.name), text)
        if args.plot:
            compare_report.plot(groups, args.plot)
            print(args.plot)
    except ValueError as error:
        sys.exit(f'compare: {error}')
    except Stopped as stopped:
        number = stopped.args[0]
        print(
            f'compare: stopped by {number.name}; the same command goes on from the '
            'last checkpoints',
            file=sys.stderr,
        )
        sys.exit(128 + number)
    if failed:
        sys.exit(f'compare: {failed} of {len(plans)} runs failed, see above')


if __name__ == '__main__':
    main()
