"""Turn a cross-entropy checkpoint's classifier into a start for RaMBO.

    python tools/model_converters/drop_background.py faster-rcnn.pth start.pth

A softmax classifier has C + 1 columns, the last for background; RaMBOLoss with
scores='logits' or 'sigmoid' has C. Every class keeps its difference to the background,
which is what the softmax knew of it: its sigmoid is the probability of the class
against the background alone. Name the result in ``load_from``. Classifiers with C
columns, such as RetinaNet's, need no change: load their checkpoint as it is.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

# RoI heads, also those of a cascade, and DETR.
CLASSIFIER = re.compile(r'(^|\.)(bbox_head(\.\d+)?)\.fc_cls\.(weight|bias)$')


def drop_background(state: dict[str, Any], num_classes: int) -> list[str]:
    """Change the classifiers of a state dict in place.

    Args:
        state: The parameters by name.
        num_classes: C, the number of classes without background.

    Returns:
        The names of the changed parameters.

    Raises:
        ValueError: If none has C + 1 rows.
    """
    names = [name for name in state if CLASSIFIER.search(name)]
    changed = [name for name in names if len(state[name]) == num_classes + 1]
    if not changed:
        rows = {name: len(state[name]) for name in names}
        raise ValueError(
            f'expected a classifier bbox_head.fc_cls with {num_classes + 1} rows, '
            f'{num_classes} classes and background, got rows {rows}; name the number '
            'of classes with --num-classes if it is another'
        )
    for name in changed:
        state[name] = state[name][:-1] - state[name][-1:]
    return changed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--num-classes', type=int, help='default: what the file says')
    args = parser.parse_args(argv)
    from rambo_det.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(args.checkpoint, 'cpu')
    meta = checkpoint.get('meta', {}).get('dataset_meta') or {}
    classes = args.num_classes or len(meta.get('classes', meta.get('CLASSES', ())))
    if not classes:
        parser.error(f'{args.checkpoint} does not say its classes; use --num-classes')
    try:
        changed = drop_background(checkpoint['state_dict'], classes)
    except ValueError as error:
        sys.exit(f'drop_background: {args.checkpoint}: {error}')
    # The optimiser's state would not fit any more.
    torch.save({key: checkpoint[key] for key in ('meta', 'state_dict')}, args.out)
    print(f'{args.out}: changed {", ".join(changed)}')


if __name__ == '__main__':
    main()
