"""What binds a loss to a head of mmdet: one mechanism for all heads.

While the stock head computes its losses, a recorder stands in for its ``loss_cls`` and
keeps the calls. Then the loss is called once, with all rows and with their images.
"""

import warnings
from contextlib import contextmanager
from typing import (
    Any,
    ClassVar,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
)

import torch
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor

from ..losses import (
    INHERITED,
    WITH_BACKGROUND,
    RaMBOLoss,
    RankingLoss,
    hard_labels,
)


class Call(NamedTuple):
    """The arguments of one call of a classification loss, see ``RaMBOLoss.forward``."""

    pred: Tensor
    target: Any
    weight: Optional[Tensor] = None
    avg_factor: Optional[float] = None
    reduction_override: Optional[str] = None


class Recorder:
    """Stands in for the loss of a head: keeps the calls instead of ranking."""

    def __init__(self, loss: RankingLoss) -> None:
        self._loss = loss
        self.calls = Calls()
        self._zero: Optional[Tensor] = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Keep a call; return a zero that is connected to the graph."""
        self.calls.append(Call(*args, **kwargs))
        if self._zero is None:
            self._zero = self.calls[-1].pred[:0].sum()
        return self._zero

    def get_accuracy(self, *_: Any) -> Dict[str, Tensor]:
        """Report nothing: nothing was ranked."""
        return {}


class Calls(List[Call]):
    """The recorded calls of a classification loss, and the boxes of their rows.

    Attributes:
        boxes: Predicted boxes and targets of each call of the box loss, (M, 4) each:
            those of all rows, or of the foreground rows alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.boxes: List[Tuple[Tensor, Tensor]] = []


class RaMBOHeadMixin:
    """Lets a head hand over all rows of a ranking at once, with their images.

    Put it before a head of mmdet, and wrap the method that calls ``loss_cls``, as
    ``docs/detectors.md`` shows. With another loss the head works as the stock head
    does. What the config of the loss leaves open is filled in.
    """

    # Whether the stock head can have a background column.
    background: ClassVar[bool] = True
    # Whether it can have a memory, and which one if the config does not say.
    takes_memory: ClassVar[bool] = True
    default_memory: ClassVar[Optional[int]] = None
    # The loss that the stock head gives the boxes of the foreground rows, in their
    # order, or of all rows; None if it does not.
    box_loss: ClassVar[Optional[str]] = 'loss_bbox'
    # Whether it tells the loss what a mean over the rows divides by.
    auxiliary: ClassVar[bool] = True

    loss_cls: Any
    num_classes: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if 'loss_cls' in kwargs:
            kwargs['loss_cls'] = self._complete(kwargs['loss_cls'])
        super().__init__(*args, **kwargs)
        if not self.ranks and getattr(self, 'box_avg', 'rows') == 'rows':
            warnings.warn(
                f'{type(self).__name__}: loss_cls is {type(self.loss_cls).__name__}, '
                'so that nothing is ranked and the stock head would do. To rank, set '
                "loss_cls=dict(_delete_=True, type='RaMBOLoss')",
                stacklevel=2,
            )

    @property
    def ranks(self) -> bool:
        """Whether the loss is one that ranks, and no recorder stands in for it."""
        return isinstance(self.loss_cls, RankingLoss)

    def _complete(self, config: Any) -> Any:
        """Fill in what the config of the loss leaves open; refuse what cannot be."""
        kind = config.get('type') if isinstance(config, Mapping) else None
        kind = MODELS.get(kind) if isinstance(kind, str) else kind
        if not (isinstance(kind, type) and issubclass(kind, RankingLoss)):
            return config
        name = type(self).__name__
        if self.box_loss is None and (kind.needs_overlaps or config.get('overlaps')):
            raise ValueError(
                f'{name}: loss_cls={kind.__name__} ranks by the overlaps of boxes, but '
                'the rows with which this head trains boxes are not those with which '
                'it trains classes, so that a foreground row may have no box; use '
                'RaMBOLoss without overlaps, or APLoss'
            )
        if not issubclass(kind, RaMBOLoss):
            return {'use_sigmoid': True, **config}  # stock heads read it
        given = {key: value for key, value in config.items() if key != '_scope_'}
        if given == dict(type=config['type'], use_sigmoid=True, loss_weight=1.0):
            raise ValueError(
                f'{name}: loss_cls has use_sigmoid=True and loss_weight=1.0 and no '
                'other arguments, which are those of cross-entropy. '
                f'{INHERITED}. If loss_weight=1.0 is meant, leave out use_sigmoid'
            )
        result: Dict[str, Any] = {'scores': 'logits', **config}
        if self.default_memory is not None:
            result.setdefault('memory', self.default_memory)
        softmax = result['scores'] in WITH_BACKGROUND
        # Stock heads read it from the config.
        result.setdefault('use_sigmoid', not softmax)
        if softmax and not self.background:
            raise ValueError(
                f'{name}: loss_cls has scores={result["scores"]!r}, which needs a '
                "background column, and this head has none; use 'logits' or 'sigmoid'"
            )
        if result.get('memory') and not self.takes_memory:
            raise ValueError(
                f'{name}: loss_cls has memory={result["memory"]!r}, but decoder '
                'layers, encoder and denoising queries share this loss and their '
                'scores must not mix; set memory=0'
            )
        if result.get('auxiliary') and not self.auxiliary:
            raise ValueError(
                f'{name}: loss_cls has auxiliary={result["auxiliary"]!r}, but the '
                'stock head divides its classification loss by the number of positives '
                'after the call, so that the sum over all anchors would be added; '
                'leave auxiliary out'
            )
        return result

    @contextmanager
    def recorded_calls(self, objects: Optional[Tensor] = None) -> Iterator[Calls]:
        """Let a recorder stand in for the loss while the stock head computes.

        Afterwards, also after an exception, the head is as it was. If the stock head
        fails at a label of the ground truth beyond the classes, the error says so.

        Args:
            objects (Tensor, optional): The labels of the ground truth (G,).

        Yields:
            Calls: The calls so far, in their order.
        """
        recorder = Recorder(self.loss_cls)
        box_loss = getattr(self, str(self.box_loss), None)
        hook = None
        if box_loss is not None and self.loss_cls.needs_overlaps:
            hook = box_loss.register_forward_pre_hook(
                lambda _, args: recorder.calls.boxes.append(args[:2])
            )
        # What is in here is found before the modules of the head.
        self.__dict__['loss_cls'] = recorder
        try:
            yield recorder.calls
        except (IndexError, RuntimeError) as error:
            if objects is not None and (objects >= self.num_classes).any():
                raise ValueError(
                    f'{type(self).__name__}: the ground truth has label '
                    f'{int(objects.max())}, but num_classes={self.num_classes}; set '
                    "it to the number of classes in the data (metainfo['classes'])"
                ) from error
            raise
        finally:
            del self.__dict__['loss_cls']
            if hook is not None:
                hook.remove()

    def rank_calls(
        self,
        calls: Calls,
        logits: Tensor,
        images: Tensor,
        num_images: Optional[int] = None,
        objects: Optional[Tensor] = None,
    ) -> Dict[str, Tensor]:
        """Call the loss with the rows of all recorded calls, in their order.

        Without calls it ranks nothing: where processes rank together the others wait
        for this one, and ``DistributedDataParallel`` for the classifier's gradient.

        Args:
            calls (Calls): What :meth:`recorded_calls` recorded.
            logits (Tensor): Some output of the classifier, its columns in the last
                dimension; stands in for rows where there are none.
            images (Tensor): The image of each row of all calls, (N,).
            num_images (int, optional): Their number, which saves asking the device.
            objects (Tensor, optional): The labels of the ground truth (G,).

        Returns:
            dict[str, Tensor]: The loss under 'loss_cls', and the AP that it reports.
        """
        if not calls:
            nothing = logits.reshape(-1, logits.size(-1))[:0]
            calls.append(Call(nothing, images.new_zeros(0)))
            images = images[:0]
        with self.loss_cls.expected():
            overlaps = self._overlaps(calls)
            pred, target, weight, avg_factor, reduction = merge_calls(calls)
            given = images if num_images is None else (images, num_images)
            loss = self.loss_cls(
                pred,
                target,
                weight,
                avg_factor,
                reduction,
                images=given,
                objects=objects,
                overlaps=overlaps,
            )
        return dict(loss_cls=loss, **self.loss_cls.get_accuracy())

    @torch.no_grad()
    def _overlaps(self, calls: Calls) -> Optional[Tensor]:
        """Return the IoU of each row's predicted box with its object, (N,).

        If the loss asks for it. Values in background rows mean nothing.
        """
        if not self.loss_cls.needs_overlaps:
            return None
        targets = [call.target for call in calls]
        if not isinstance(targets[0], Tensor):  # GFL and RTMDet: the quality is the IoU
            return torch.cat([quality for _, quality in targets])
        labels = torch.cat(targets)
        foreground = (labels >= 0) & (labels < self.num_classes)
        if not calls.boxes:
            if foreground.any():
                raise RuntimeError(
                    f'{type(self).__name__}: {self.loss_cls.name} needs the predicted '
                    f'boxes, and {self.box_loss} was not called with any. A head of '
                    'your own sets box_loss to the name of the loss that it gives '
                    'boxes and their targets'
                )
            return labels.new_zeros(labels.shape, dtype=torch.float32)
        predicted, boxes = (torch.cat(each).float() for each in zip(*calls.boxes))
        if not getattr(self, 'reg_decoded_bbox', True):
            predicted, boxes = self._decode(predicted), self._decode(boxes)
        overlaps = bbox_overlaps(predicted, boxes, is_aligned=True)
        if len(overlaps) == len(labels):
            return overlaps
        return overlaps.new_zeros(labels.shape).masked_scatter_(foreground, overlaps)

    def _decode(self, deltas: Tensor) -> Tensor:
        """Return the boxes of deltas, as if the prior was the unit square, (M, 4).

        The IoU of two boxes is the same for every prior.
        """
        coder: Any = self.bbox_coder  # type: ignore[attr-defined]
        if type(coder) is not DeltaXYWHBBoxCoder or coder.add_ctr_clamp:
            raise ValueError(
                f'{type(self).__name__}: {self.loss_cls.name} ranks by the overlaps of '
                'boxes, which needs bbox_coder=DeltaXYWHBBoxCoder without '
                f'add_ctr_clamp, or reg_decoded_bbox=True, got {type(coder).__name__}'
            )
        prior = deltas.new_zeros(deltas.shape)
        prior[:, 2:] = 1
        return get_box_tensor(coder.decode(prior, deltas))


def bind(mixin: type, stock: type, **attributes: Any) -> Any:
    """Make the head of mmdet that ranks, and register it as RaMBO + its name.

    Args:
        mixin: How the head calls its loss.
        stock: The head of mmdet.
        **attributes: In what it differs, see :class:`RaMBOHeadMixin`.
    """
    name = f'RaMBO{stock.__name__}'
    attributes['__module__'] = mixin.__module__
    attributes['__doc__'] = (
        f"mmdet's ``{stock.__name__}`` for :class:`~rambo_det.losses.RaMBOLoss`."
    )
    return MODELS.register_module(module=type(name, (mixin, stock), attributes))


def merge_calls(calls: List[Call]) -> Call:
    """Return one call with the rows of all, in their order, and with hard labels."""
    pred, target, weight, avg_factor, reduction = zip(*calls)
    labels = torch.cat([hard_labels(t) for t in target])
    if len(calls) == 1:
        return calls[0]._replace(target=labels)
    weights = None
    if any(w is not None for w in weight):
        weights = torch.cat(
            [
                p.new_ones(len(p)) if w is None else w.to(p.dtype)
                for p, w in zip(pred, weight)
            ]
        )
    return Call(torch.cat(pred), labels, weights, avg_factor[0], reduction[0])


def object_labels(args: Iterable[Any]) -> Optional[Tensor]:
    """Return the labels of all objects among the arguments of a stock head, (G,)."""
    for arg in args:
        if (
            isinstance(arg, (list, tuple))
            and arg
            and all(isinstance(i, InstanceData) and 'labels' in i for i in arg)
        ):
            return torch.cat([instances.labels for instances in arg])
    return None


def image_major(num_images: int, rows_per_image: int, device: torch.device) -> Tensor:
    """Return the image of each row where the rows of an image follow each other."""
    rows = torch.arange(num_images * rows_per_image, device=device)
    return rows.div_(rows_per_image, rounding_mode='floor')
