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
)

import torch
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
        self.calls: List[Call] = []
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

    def add_quality(
        self,
        head: Any,
        priors: Tensor,
        deltas: Tensor,
        labels: Tensor,
        targets: Tensor,
    ) -> None:
        """Give the last call the overlap of each positive's box, if the loss needs it.

        Args:
            head: The head, for its coder and its number of classes.
            priors: (N, 4) the boxes from which those of the head are decoded.
            deltas: (N, 4), or (N, C * 4) with boxes for each class.
            labels: (N,) labels of the rows of the call.
            targets: (N, 4) what the head regresses to.
        """
        if not (self.calls and self._loss.needs_quality):
            return
        if not isinstance(self.calls[-1].target, Tensor):
            return  # the stock head gave it
        rows = ((labels >= 0) & (labels < head.num_classes)).nonzero().squeeze(1)
        boxes = deltas.detach().float().reshape(len(labels), -1, targets.size(-1))
        boxes = boxes[rows, labels[rows] if boxes.size(1) > 1 else 0]
        found, wanted, priors = boxes, targets[rows].float(), priors[rows].float()
        found = get_box_tensor(head.bbox_coder.decode(priors, found))
        if not head.reg_decoded_bbox:
            wanted = get_box_tensor(head.bbox_coder.decode(priors, wanted))
        quality = wanted.new_zeros(len(labels))
        quality[rows] = bbox_overlaps(found, wanted, is_aligned=True)
        target = (self.calls[-1].target, quality)
        self.calls[-1] = self.calls[-1]._replace(target=target)


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
    # Whether it tells the loss what a mean over the rows divides by.
    auxiliary: ClassVar[bool] = True

    loss_cls: Any
    num_classes: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if 'loss_cls' in kwargs:
            kwargs['loss_cls'] = self._complete(kwargs['loss_cls'])
        super().__init__(*args, **kwargs)
        if not self.ranks:
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
        if not issubclass(kind, RaMBOLoss):
            return {'use_sigmoid': True, **config}  # stock heads read it
        name = type(self).__name__
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
    def recorded_calls(self, objects: Optional[Tensor] = None) -> Iterator[List[Call]]:
        """Let a recorder stand in for the loss while the stock head computes.

        Afterwards, also after an exception, the head is as it was. If the stock head
        fails at a label of the ground truth beyond the classes, the error says so.

        Args:
            objects (Tensor, optional): The labels of the ground truth (G,).

        Yields:
            list[Call]: The calls so far, in their order.
        """
        recorder = Recorder(self.loss_cls)
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

    def rank_calls(
        self,
        calls: List[Call],
        logits: Tensor,
        images: Tensor,
        num_images: Optional[int] = None,
        objects: Optional[Tensor] = None,
    ) -> Dict[str, Tensor]:
        """Call the loss with the rows of all recorded calls, in their order.

        Without calls it ranks nothing: where processes rank together the others wait
        for this one, and ``DistributedDataParallel`` for the classifier's gradient.

        Args:
            calls (list[Call]): What :meth:`recorded_calls` recorded.
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
            calls, images = [Call(nothing, images.new_zeros(0))], images[:0]
        pred, target, weight, avg_factor, reduction = merge_calls(
            calls, self.loss_cls.needs_quality
        )
        given = images if num_images is None else (images, num_images)
        loss = self.loss_cls(
            pred, target, weight, avg_factor, reduction, images=given, objects=objects
        )
        return dict(loss_cls=loss, **self.loss_cls.get_accuracy())


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


def merge_calls(calls: List[Call], with_quality: bool = False) -> Call:
    """Return one call with the rows of all, in their order.

    Its target is the labels; with ``with_quality`` and the quality where all calls
    have it.
    """
    pred, target, weight, avg_factor, reduction = zip(*calls)
    labels: Any = torch.cat([hard_labels(t) for t in target])
    if with_quality and not any(isinstance(t, Tensor) for t in target):
        labels = labels, torch.cat([quality for _, quality in target])
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
