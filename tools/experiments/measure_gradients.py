"""Compare the gradients that losses send into a detector, before training with any.

    python tools/experiments/measure_gradients.py CONFIG CHECKPOINT --batches 16 \\
        --set lambd3 'dict(type="RaMBOLoss", lambd=3.0, memory=0)' --out OUT.json

The detector of CHECKPOINT is run on batches of its training data. For each part of it
that several losses share (neck, the box head's shared layers, trained backbone) and
each loss, those of the config and those of ``--set`` in place of its classification
loss, it prints

- the mean norm of the gradient of a batch. Under an adaptive optimiser no loss has a
  scale of its own, but the scales of losses that share layers must fit each other;
- the mean cosine between the gradients of two batches: how much of a gradient is more
  than chance. It must be compared between losses at the same checkpoint;
- the cosine between the mean gradient and that of the config's classification loss.

The losses of ``--set`` need as many columns as the config's: for a cross-entropy
checkpoint that is ``scores="log_softmax", use_sigmoid=False``. State that a loss keeps
(a memory) fills batch by batch as in training.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any, Iterator

if not __package__:  # run as a script: its modules are those of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner, set_random_seed
from mmengine.runner.checkpoint import load_checkpoint
from torch import Tensor, nn
from tqdm import tqdm

import rambo_det  # noqa: F401
from rambo_det import RaMBOLoss
from tools.common.markdown_table import markdown_table

CLASSIFICATION = 'loss_cls'


def watch(own: nn.Module, losses: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Let several losses see what the head's own one is called with.

    Returns:
        dict[str, Tensor]: Their values, new ones after each call of the own one.
    """
    found: dict[str, Tensor] = {}
    forward = own.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        stock = {k: v for k, v in kwargs.items() if k not in ('images', 'objects')}
        for name, loss in losses.items():
            given = kwargs if isinstance(loss, RaMBOLoss) else stock
            found[name] = loss(*args, **given)
        return forward(*args, **kwargs)

    own.forward = record
    return found


def shared_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters of the parts that several losses share."""
    head = model.roi_head.bbox_head
    parts = dict(
        backbone=model.backbone,
        neck=getattr(model, 'neck', None),
        shared_fcs=getattr(head, 'shared_fcs', None),
    )
    found = {
        name: [p for p in part.parameters() if p.requires_grad]
        for name, part in parts.items()
        if part is not None
    }
    return {name: parameters for name, parameters in found.items() if parameters}


def batch_losses(model: nn.Module, data: Any) -> dict[str, Tensor]:
    """Run the detector on a batch; return each of its losses."""
    data = model.data_preprocessor(data, True)
    _, values = model.parse_losses(model(**data, mode='loss'))
    del values['loss']  # their sum
    return {name: value for name, value in values.items() if 'loss' in name}


def flat_gradients(
    loss: Tensor, parts: dict[str, list[nn.Parameter]]
) -> dict[str, Tensor]:
    """Return the gradient of a loss as one vector for each part."""
    parameters = [p for part in parts.values() for p in part]
    found: Any = [None] * len(parameters)
    if loss.requires_grad:
        found = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True
        )
    flat = iter(
        torch.zeros_like(p).flatten() if grad is None else grad.flatten()
        for p, grad in zip(parameters, found)
    )
    return {name: torch.cat([*islice(flat, len(part))]) for name, part in parts.items()}


def parse_loss(text: str) -> dict[str, Any]:
    """Read the loss of ``--set``.

    Raises:
        ValueError: If it is no dictionary with a type.
    """
    try:
        loss = eval(text, {'__builtins__': {}}, {'dict': dict})
    except Exception as error:
        raise ValueError(f'{text!r} cannot be read: {error}') from error
    if not isinstance(loss, dict) or 'type' not in loss:
        raise ValueError(f'expected dict(type="RaMBOLoss", …), got {text!r}')
    return loss


def statistics(gradients: Tensor, reference: Tensor) -> dict[str, float]:
    """Summarise the gradients of some batches, (B, D).

    Args:
        gradients: One row each.
        reference: (D,) the mean gradient to compare with.
    """
    norms = gradients.norm(dim=1)
    directions = gradients / norms.clamp(min=1e-30).unsqueeze(1)
    cosines, count = directions @ directions.T, len(gradients)
    between = (cosines.sum() - cosines.trace()) / max(count * (count - 1), 1)
    alike = torch.cosine_similarity(gradients.mean(0), reference, dim=0)
    return dict(norm=float(norms.mean()), between=float(between), alike=float(alike))


def measure(
    model: nn.Module, batches: Iterator[Any], count: int, settings: dict[str, Any]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the statistics by part of the detector and by loss."""
    losses = {name: MODELS.build(value) for name, value in settings.items()}
    found = watch(model.roi_head.bbox_head.loss_cls, losses)
    parts = shared_parameters(model)
    gradients: dict[str, dict[str, list[Tensor]]] = {part: {} for part in parts}
    for data in tqdm(islice(batches, count), total=count):
        values = batch_losses(model, data)
        for name, loss in {**values, **found}.items():
            for part, gradient in flat_gradients(loss, parts).items():
                gradients[part].setdefault(name, []).append(gradient)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for part, by_loss in gradients.items():
        reference = torch.stack(by_loss[CLASSIFICATION]).mean(0)
        result[part] = {
            name: statistics(torch.stack(rows), reference)
            for name, rows in by_loss.items()
        }
    return result


def table(result: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [['part, loss', 'norm', 'cosine of two batches', f'with {CLASSIFICATION}']]
    for part, by_loss in result.items():
        for name, row in by_loss.items():
            numbers = [f'{row["norm"]:.3g}', f'{row["between"]:.3f}']
            lines.append([f'{part}, {name}', *numbers, f'{row["alike"]:.2f}'])
    return markdown_table(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', type=Path)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('--batches', type=int, default=16)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--set', nargs=2, action='append', default=[], metavar=('NAME', 'DICT')
    )
    parser.add_argument('--out', type=Path, help='JSON')
    args = parser.parse_args(argv)
    if args.batches < 2:
        parser.error(f'--batches must be at least 2, got {args.batches}')
    try:
        losses = {name: parse_loss(text) for name, text in args.set}
    except ValueError as error:
        parser.error(f'--set: {error}')
    register_all_modules()
    set_random_seed(args.seed)
    cfg = Config.fromfile(args.config)
    model = MODELS.build(copy.deepcopy(cfg.model))
    load_checkpoint(model, str(args.checkpoint), map_location='cpu')
    model.train()
    batches = iter(Runner.build_dataloader(cfg.train_dataloader, seed=args.seed))
    result = measure(model, batches, args.batches, losses)
    print(table(result))
    report = dict(
        config=args.config.stem,
        batches=args.batches,
        seed=args.seed,
        settings=losses,
        result=result,
    )
    if args.out:
        text = json.dumps(report, indent=1) + '\n'
        args.out.write_text(text, encoding='utf-8')
    return report


if __name__ == '__main__':
    main()
