"""Try every head of mmdet that takes a ``loss_cls`` with RaMBOLoss, and look.

    python tools/dev/check_stock_heads.py --update docs/detectors.md
    python tools/dev/check_stock_heads.py --only FCOSHead --loss use_sigmoid=True

Each head is a stock one in a detector that mmdet ships, with random weights, and
nothing is changed but ``loss_cls=dict(type='RaMBOLoss')``. It takes one step on
generated images. The table in the docs is what this tool prints.
"""

from __future__ import annotations

import ast
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Sequence

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from mmdet.models.dense_heads import DETRHead
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger

import rambo_det  # noqa: F401
from tools.common.markdown_table import markdown_table, split_page, update_page
from tools.common.wrong_calls import Parser, readable_file
from tools.dev.stock_heads import HEADS, NOT_APPLICABLE, stock_config

CLASSES = 6
MARKS = ('<!-- stock heads -->', '<!-- end stock heads -->')
WORKS, BUILD, STEP, NEVER = (
    'works',
    'refused at build',
    'refused in the first step',
    'not applicable',
)


class Outcome(NamedTuple):
    """What came of a head: where it ended, how, and what the error says, if any."""

    where: str
    says: str
    cure: str = ''
    error: Exception | None = None


def wrong(columns: int, labels: Any, classes: int, objects: set[int]) -> str:
    """Return what is wrong with what a loss ranks; nothing if all is right.

    Args:
        columns: How many columns the loss ranks.
        labels: The labels of the rows that are not ignored.
        classes: The number of classes of the head.
        objects: The labels of the ground truth.
    """
    labels = set(labels.tolist())
    if columns != classes:
        return f'ranks {columns} columns, but there are {classes} classes'
    if not labels & objects or not labels <= objects | {classes}:
        return f'takes {sorted(labels)} for objects {sorted(objects)}'
    if classes not in labels:
        return 'has no background to rank against'
    return ''


def _step(model: Any, cfg: Any, name: str, kind: str) -> Outcome:
    """Take a step; the outcome says what is wrong with what was ranked, if anything."""
    heads = [module for module in model.modules() if type(module).__name__ == kind]
    calls: list[list[Any]] = [[] for _ in heads]
    for head, own in zip(heads, calls):
        head.loss_cls.ranked.register_forward_hook(
            lambda *args, own=own: own.append(args[2])
        )
    size, annotations = HEADS[name].size, str(cfg.get('train_pipeline'))
    data = demo_mm_inputs(
        2,
        [[3, size, size]] * 2,
        [4, 4],
        num_classes=CLASSES,
        with_mask="'with_mask': True" in annotations,
        with_semantic="'with_seg': True" in annotations,
    )
    data = model.data_preprocessor(data, True)
    samples = data['data_samples']
    total, _ = model.parse_losses(model.loss(data['inputs'], samples))
    total.backward()
    objects = {int(label) for sample in samples for label in sample.gt_instances.labels}
    faults = [] if total.isfinite() else [f'the loss is {float(total)}']
    for head, own in zip(heads, calls):
        # Decoder layers are ranked each on its own; levels, or nothing, are not.
        if not own or (len(own) > 1 and not isinstance(head, DETRHead)):
            faults.append(f'calls its loss {len(own)} times in a step')
        classes = head.num_classes
        for scores, labels in own:
            wanted = objects if classes > 1 else {0}
            fault = wrong(scores.size(1), labels[labels >= 0], classes, wanted)
            faults += [fault] if fault else []
    if faults:
        return Outcome('WRONG', faults[0])
    bound = MODELS.get(f'RaMBO{name}') is not None
    cure = f'type=RaMBO{name} ranks images' if bound else ''
    return Outcome(WORKS, 'ranks the batch', cure)


def _tell(name: str, error: Exception) -> tuple[str, str]:
    """Shorten an error to what it says and the cure, in its first two sentences."""
    # This will stand in the docs.
    text = str(error).replace(' (docs/detectors.md)', '')
    text = text.replace('docs/detectors.md says how to', 'see below')
    first, *others = re.split(r'[.] (?=[A-Z])', text)
    if 'RaMBOLoss' not in text:
        return f'an error of mmdet: {type(error).__name__}: {first}', 'another loss'
    first = first.replace('RaMBOLoss: ', '', 1)
    for prefix in (
        f'{name}: ',
        f'{name} ',
        'loss_cls=RaMBOLoss cannot train this head: ',
    ):
        first = first[len(prefix) :] if first.startswith(prefix) else first
    cure = others[0].replace('Use ', '', 1) if others else ''
    named = re.match(r'\w+[A-Z]', cure)  # the name of a class
    return first, cure if named else cure[:1].lower() + cure[1:]


def outcome(name: str, kind: str | None = None, **loss: Any) -> Outcome:
    """Build a detector with a stock head, take a step, and return what came of it.

    The arguments are those of ``stock_config``.
    """
    if name in NOT_APPLICABLE:
        return Outcome(NEVER, NOT_APPLICABLE[name])
    register_all_modules()
    logger = MMLogger.get_current_instance()
    logger.setLevel('ERROR')  # a line for each initialised weight
    cfg = stock_config(name, kind, **loss)
    where = BUILD
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            model = MODELS.build(cfg.model)
            model.init_weights()
            model.train()  # a distilled one does not return itself
            where = STEP
            return _step(model, cfg, name, kind or name)
        except Exception as error:
            return Outcome(where, *_tell(name, error), error)


def row(name: str, found: Outcome) -> list[str]:
    """Return what the table says of a head, in words that fit others too."""
    texts = [text.replace(f'=RaMBO{name}', '=RaMBO…') for text in found[1:3]]
    texts = [text.replace(name, 'the head') for text in texts]
    texts = [re.sub(r"(\w+=[\w'…]+|\bRaMBO\w+)", r'`\1`', text) for text in texts]
    return [found.where, *texts]


def table(rows: dict[str, list[str]]) -> str:
    """Return the table, with a row for all heads of which the same is said."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, said in rows.items():
        groups.setdefault(tuple(said), []).append(f'`{name}`')
    order = ('WRONG', WORKS, STEP, BUILD, NEVER)
    lines = sorted(groups, key=lambda said: (order.index(said[0]), -len(groups[said])))
    body = [(', '.join(groups[said]), *said) for said in lines]
    head = ('heads', 'outcome', 'what it says, or why', 'cure')
    return markdown_table([head, *body], text_columns=range(4))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', help='names of heads')
    parser.add_argument(
        '--loss', nargs='+', default=[], help='more arguments, as in use_sigmoid=True'
    )
    parser.add_argument('--update', type=readable_file, help='page that gets the table')
    args = parser.parse_args(argv)
    if args.update:
        with parser.refusing():
            split_page(args.update, *MARKS)
    loss = {}
    for pair in args.loss:
        key, _, value = pair.partition('=')
        loss[key] = ast.literal_eval(value)
    rows = {}
    for name in args.only or sorted({*HEADS, *NOT_APPLICABLE}):
        rows[name] = row(name, outcome(name, **loss))
        print(' | '.join([name, *rows[name]]), file=sys.stderr)
    text = table(rows)
    print(text)
    if args.update:
        update_page(args.update, *MARKS, text)


if __name__ == '__main__':
    main()
