"""Print AP50 per epoch of finished runs as a Markdown table.

    python tools/results_table.py docs/results/bccd/*.json

Each file is the ``scalars.json`` that mmengine writes during training, in
``WORK_DIR/TIMESTAMP/vis_data/``; the table's rows are named like the files.
"""

import argparse
import json
from pathlib import Path
from typing import Dict, List

from markdown_table import markdown_table

KEY = 'pascal_voc/mAP'  # one IoU threshold, 0.5: AP50, not rounded


def read_ap50(path: Path) -> Dict[int, float]:
    """Return AP50 in percent by epoch.

    Raises:
        ValueError: If the file holds no evaluation.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    result = {line['step']: 100 * line[KEY] for line in lines if KEY in line}
    if not result:
        raise ValueError(
            f'{path} holds no {KEY!r}; expected the scalars.json of a run that was '
            'evaluated with VOCMetric'
        )
    return result


def table(paths: List[Path]) -> str:
    """Return the Markdown table, a row per file and a column per epoch."""
    runs = {path.stem: read_ap50(path) for path in paths}
    epochs = sorted({epoch for run in runs.values() for epoch in run})
    rows = [['AP50 after epoch', *map(str, epochs)]]
    for name, run in runs.items():
        rows.append(
            [name, *(f'{run[e]:.1f}' if e in run else '' for e in epochs)],
        )
    return markdown_table(rows)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('files', nargs='+', type=Path)
    print(table(parser.parse_args().files))
