"""What a user needs to see when ranking does not train."""

from typing import Any, Dict, List, Set, Tuple

import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from torch import Tensor

from ..losses import RaMBOLoss
from .model import check_interval, named_losses, require_losses

_QUANTILES = (0.05, 0.5, 0.95)
# Quantiles are those of at most so many scores, evenly spaced, which makes them quick.
_AT_MOST = 1_000_000


class _Watch:
    """Watches one loss during one step, in which it may be called several times."""

    def __init__(self, loss: RaMBOLoss) -> None:
        self.loss = loss
        self.precisions: Dict[str, List[float]] = {}
        self.positives: List[Tensor] = []
        self.negatives: List[Tensor] = []
        self.classes: Set[int] = set()
        self.num_classes = 0
        self.gradients: List[Tensor] = []  # of the positives
        self._handles = [
            loss.ranked.register_forward_hook(self.see),
            loss.register_forward_hook(self.after_call),
        ]

    def see(self, _: Any, __: Any, output: Tuple[Tensor, Tensor]) -> Any:
        """Keep what is ranked; return it, with a hook on the gradient of the scores.

        The scores are a new node, which gradients of an auxiliary loss bypass.
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
        scores.register_hook(lambda grad: self.gradients.append(grad[positive]))
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
        """Return what is logged; parts are missing where nothing gives them."""
        if not self.positives:  # the loss was not called
            return {}
        positives, negatives = torch.cat(self.positives), torch.cat(self.negatives)
        result: Dict[str, float] = dict(positives=len(positives))
        classes, remembered = set(self.classes), self.loss.remembered
        if remembered is not None:
            result['memory_fill'] = len(remembered) / remembered.length
            for labels in remembered.labels:  # also of background and ignored rows
                classes.update(labels.unique().tolist())
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
        gradients = torch.cat([positives[:0], *self.gradients])
        # Nothing has a gradient while a schedule sets the ranking's weight to 0.
        if len(gradients) and self.loss.factors['loss_weight']:
            result['zero_grad_share'] = float((gradients == 0).double().mean())
        return result


@HOOKS.register_module()
class RaMBOMonitorHook(Hook):
    """Log what tells why a ranking does not train.

    The scalars are ``train/rambo/...``, or with several losses
    ``train/rambo/{head}/...``, and go where mmengine's visualizer sends them.
    ``docs/reliability.md`` says what each means. The hook costs nothing in iterations
    that it does not watch.

    Args:
        interval (int): Every how many iterations it watches. The best is that of the
            ``LoggerHook``, or a multiple. Defaults to 50.

    Raises:
        ValueError: If ``interval`` is not a positive integer, or if the model has no
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
        self.interval = check_interval(self, interval)
        self._watches: Dict[str, _Watch] = {}

    def before_train(self, runner: Any) -> None:
        """Check that there is something to monitor."""
        require_losses(self, runner, 'to monitor')

    def before_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Watch the losses, every ``interval`` iterations."""
        self._stop()  # in case that the preceding iteration raised
        if self.every_n_train_iters(runner, self.interval):
            losses = named_losses(runner)
            self._watches = {name: _Watch(loss) for name, loss in losses.items()}

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Log what was seen."""
        watches = self._watches
        self._stop()
        hub = runner.message_hub
        for name, watch in watches.items():
            scalars = watch.scalars()
            if not scalars:
                continue
            # Named after the head, since mmengine averages what has 'loss' in its name.
            head = name.rpartition('.')[0]
            prefix = 'rambo/' if len(watches) == 1 else f'rambo/{head}/'
            # Classes are kept in the message hub, and so in checkpoints.
            seen = watch.classes.union(hub.runtime_info.get(f'{prefix}classes', []))
            hub.update_info(f'{prefix}classes', sorted(seen))
            scalars['classes_seen'] = len(seen)
            for key, value in scalars.items():
                hub.update_scalar(f'train/{prefix}{key}', value)

    def _stop(self) -> None:
        for watch in self._watches.values():
            watch.stop()
        self._watches = {}
