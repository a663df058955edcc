"""Print AP50, or a loss, per epoch of finished runs as a Markdown table.

    python tools/results_table.py docs/results/bccd/*.json
    python tools/results_table.py docs/results/bccd/*.json --loss loss_bbox

Each file is the ``scalars.json`` that mmengine writes during training, in
``WORK_DIR/TIMESTAMP/vis_data/``; the table's rows are named like the files.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Dict, List, Optional

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


def read_loss(path: Path, name: str) -> Dict[int, float]:
    """Return the mean of the logged values of a loss by epoch.

    Raises:
        ValueError: If the file has no such loss.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    values: Dict[int, List[float]] = {}
    for line in lines:
        if name in line:
            values.setdefault(line['epoch'], []).append(line[name])
    if not values:
        found = sorted({key for line in lines for key in line if 'loss' in key})
        raise ValueError(f'{path} has no {name!r}; it has {", ".join(found) or "none"}')
    return {epoch: mean(losses) for epoch, losses in values.items()}


def table(paths: List[Path], loss: Optional[str] = None) -> str:
    """Return the Markdown table, a row per file and a column per epoch."""
    runs = {p.stem: read_loss(p, loss) if loss else read_ap50(p) for p in paths}
    epochs = sorted({epoch for run in runs.values() for epoch in run})
    head = f'`{loss}` in epoch' if loss else 'AP50 after epoch'
    rows = [[head, *map(str, epochs)]]
    digits = 3 if loss else 1
    for name, run in runs.items():
        rows.append(
            [name, *(f'{run[e]:.{digits}f}' if e in run else '' for e in epochs)],
        )
    return markdown_table(rows)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('files', nargs='+', type=Path)
    parser.add_argument('--loss', help='print this loss, as the log names it')
    args = parser.parse_args()
    print(table(args.files, args.loss))
