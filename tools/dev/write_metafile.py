"""Write ``configs/metafile.yml``, in which mim and mmengine look configs up.

    python tools/dev/write_metafile.py

It lists every config, and under Results the means of the runs on the test split in
``docs/results/converged.json`` that were made with it as it stands, without options.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import yaml

from tools import ROOT
from tools.common.atomic_file import atomic_file
from tools.common.wrong_calls import Parser
from tools.experiments import converged

METAFILE = ROOT / 'configs' / 'metafile.yml'
HEADER = '# Written by tools/dev/write_metafile.py.\n'
COLLECTIONS = [
    {'Name': 'RaMBO', 'Paper': 'https://arxiv.org/abs/1912.03500'},
    {'Name': 'Baselines'},
]


def measured() -> dict[str, list[tuple[float, float]]]:
    """Return AP50 and AP of each run, in percent, by the name of its config."""
    found = defaultdict(list)
    for run in converged.read_rows(converged.OUT):
        if run['split'] == 'test' and not run['options']:
            found[Path(run['config']).stem].append((run['AP50'], run['AP']))
    return found


def model(path: Path, runs: list[tuple[float, float]]) -> dict[str, Any]:
    """Return the entry of a config, given AP50 and AP of each of its runs."""
    data = path.stem.rpartition('_')[2]
    entry = {
        'Name': path.stem,
        'In Collection': 'RaMBO' if 'rambo' in path.stem else 'Baselines',
        'Config': path.relative_to(ROOT).as_posix(),
        'Metadata': {'Training Data': data},
    }
    if runs:
        ap50, ap = (round(sum(values) / len(runs), 1) for values in zip(*runs))
        entry['Metadata']['Seeds'] = len(runs)
        metrics = {'box AP50': ap50, 'box AP': ap}
        task = {'Task': 'Object Detection', 'Dataset': data, 'Metrics': metrics}
        entry['Results'] = [task]
    return entry


def metafile() -> str:
    """Return the text of the file."""
    runs = measured()
    paths = sorted((ROOT / 'configs').glob('[!_]*/*.py'))
    models = [model(path, runs.get(path.stem, [])) for path in paths]
    content = {'Collections': COLLECTIONS, 'Models': models}
    return HEADER + yaml.safe_dump(content, sort_keys=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, which has no arguments."""
    Parser(description=__doc__.splitlines()[0]).parse_args(argv)
    with atomic_file(METAFILE) as draft:
        draft.write_text(metafile(), encoding='utf-8')


if __name__ == '__main__':
    main()
