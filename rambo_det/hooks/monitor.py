"""What a user needs to see when ranking does not train."""

from typing import Any, Dict, List, Optional, Set, Tuple

import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from torch import Tensor

from ..losses import RaMBOLoss
from .model import named_losses

_QUANTILES = (0.05, 0.5, 0.95)
# Quantiles are those of at most so many scores, evenly spaced, and quick therefore.
_AT_MOST = 1_000_000


class _Watch:
    """Looks at one loss during one step, in which it may be called several times."""

    def __init__(self, loss: RaMBOLoss) -> None:
        self.loss = loss
        self.precisions: Dict[str, List[float]] = {}
        self.positives: List[Tensor] = []
        self.negatives: List[Tensor] = []
        self.classes: Set[int] = set()
        self.num_classes = 0
        self.differentiated = 0
        self.without_gradient = 0
        self._handles = [
            loss.ranked.register_forward_hook(self.see),
            loss.register_forward_hook(self.after_call),
        ]

    def see(self, _: Any, __: Any, output: Tuple[Tensor, Tensor]) -> Any:
        """Take note of what is ranked; return it, to see the gradient of the scores.

        They are a new node of the graph: gradients of an auxiliary loss bypass it.
        """
        scores, labels = output
        self.num_classes = scores.size(1)
        classes = torch.arange(self.num_classes, device=scores.device)
        positive = labels.unsqueeze(1) == classes
        values = scores.detach()
        self.positives.append(values[positive])
        self.negatives.append(values[(labels >= 0).unsqueeze(1) & ~positive])
        self.classes.update(labels[positive.any(1)].unique().tolist())
        if not scores.requires_grad:
            return output
        scores = scores.view_as(scores)

        def count(gradient: Tensor) -> None:
            self.differentiated += int(positive.sum())
            self.without_gradient += int((gradient[positive] == 0).sum())

        scores.register_hook(count)
        return scores, labels

    def after_call(self, *_: Any) -> None:
        """Keep the AP of a call."""
        for name, value in self.loss.get_accuracy().items():
            self.precisions.setdefault(name, []).append(float(value))

    def stop(self) -> None:
        """Leave the loss as it was."""
        for handle in self._handles:
            handle.remove()

    def scalars(self) -> Dict[str, float]:
        """Return what is logged; without positives, what there is without them."""
        if not self.positives:  # the loss was not called
            return {}
        positives, negatives = torch.cat(self.positives), torch.cat(self.negatives)
        result: Dict[str, float] = dict(positives=len(positives))
        classes, remembered = set(self.classes), self.loss.remembered
        if remembered is not None:
            result['memory_fill'] = len(remembered) / remembered.length
            for labels in remembered.labels:
                classes.update(labels.unique().tolist())
        # In the memory are also background and ignored rows.
        result['classes_ranked'] = len(classes.intersection(range(self.num_classes)))
        for name, scores in (('positive', positives), ('negative', negatives)):
            if len(scores):
                sample = scores[:: -(-len(scores) // _AT_MOST)].float()
                levels = sample.new_tensor(_QUANTILES)
                for level, value in zip(_QUANTILES, sample.quantile(levels).tolist()):
                    result[f'{name}_p{round(100 * level)}'] = value
        if len(negatives):
            result['negative_max'] = float(negatives.max())
        for name, values in self.precisions.items():
            result[name] = sum(values) / len(values)
        # While a schedule holds the ranking back, nothing has a gradient.
        if self.differentiated and self.loss.factors['loss_weight']:
            result['zero_grad_share'] = self.without_gradient / self.differentiated
        return result


@HOOKS.register_module()
class RaMBOMonitorHook(Hook):
    """Log every some iterations what tells why a ranking does not train.

    The scalars are ``train/rambo/...``, or with several losses
    ``train/rambo/{head}/...``, and go where mmengine's visualizer sends
    them. ``docs/reliability.md`` tells what each means. Between the iterations that it
    looks at, the hook costs nothing.

    Args:
        interval (int): Every how many iterations it looks. Best that of the
            ``LoggerHook``, or a multiple. Defaults to 50.

    Raises:
        ValueError: If ``interval`` is no positive integer, or if the model has no
            ``RaMBOLoss``.

    Example:
        In a config, with TensorBoard::

            custom_hooks = [dict(type='RaMBOMonitorHook', interval=50)]
            visualizer = dict(
                vis_backends=[
                    dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')
                ]
            )
    """

    def __init__(self, interval: int = 50) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(
                f'{type(self).__name__}: interval must be a number of iterations >= 1, '
                f'got {interval!r}'
            )
        self.interval = interval
        self._watches: Dict[str, _Watch] = {}

    def before_train(self, runner: Any) -> None:
        """Look whether there is something to monitor."""
        if not named_losses(runner):
            raise ValueError(
                f'{type(self).__name__}: the model has no RaMBOLoss to monitor; remove '
                'the hook from custom_hooks or use the loss'
            )

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Optional[Any] = None
    ) -> None:
        """Begin to look, every ``interval`` iterations."""
        self._stop()  # an iteration that raised, where someone caught that
        if self.every_n_train_iters(runner, self.interval):
            losses = named_losses(runner)
            self._watches = {name: _Watch(loss) for name, loss in losses.items()}

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Optional[Any] = None,
        outputs: Optional[Any] = None,
    ) -> None:
        """Log what was seen."""
        watches = self._watches
        self._stop()
        hub = runner.message_hub
        for name, watch in watches.items():
            # Under the name of the head: what has 'loss' in it, mmengine averages.
            head = name.rpartition('.')[0]
            prefix = 'rambo/' if len(watches) == 1 else f'rambo/{head}/'
            scalars = watch.scalars()
            if not scalars:
                continue
            # Kept in the message hub, and therefore in checkpoints.
            seen = hub.runtime_info.get(f'{prefix}classes', [])
            seen = sorted(watch.classes.union(seen))
            hub.update_info(f'{prefix}classes', seen)
            scalars['classes_seen'] = len(seen)
            for key, value in scalars.items():
                hub.update_scalar(f'train/{prefix}{key}', value)

    def _stop(self) -> None:
        for watch in self._watches.values():
            watch.stop()
        self._watches = {}
