"""RaMBO: average precision as the classification loss of a detector."""

import warnings
from contextlib import contextmanager
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Tuple,
    Union,
)

import torch
from mmdet.registry import MODELS
from mmengine.dist import get_world_size
from torch import Tensor, nn

from ..functional import (
    Ranking,
    apply_margin,
    detection_ap_loss,
    detection_average_precision,
)
from ..functional.checks import check_perturb
from .arguments import (
    DEFAULTS,
    SCORES,
    WITH_BACKGROUND,
    Term,
    build_auxiliary,
    number,
    parse_term,
)
from .calls import Call, OpenCalls, calling_head, hard_labels, merge_calls
from .checks import check_reduction, check_shapes, ranked_labels
from .gather import Exchange, Step, gather_step
from .memory import ScoreMemory

# What RaMBOScheduleHook can change during training.
SCHEDULED = ('lambd', 'margin', 'loss_weight', 'auxiliary')


def _not_compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep ``torch.compile`` out of a function: its shapes change with every batch."""
    compiler = getattr(torch, 'compiler', None)  # since PyTorch 2.1
    return function if compiler is None else compiler.disable(function)


@MODELS.register_module()
class RaMBOLoss(nn.Module):
    """Average precision of the classification scores as a loss.

    Rolínek et al., *Optimizing Rank-based Metrics with Blackbox Differentiation*, CVPR
    2020 (arXiv 1912.03500). The loss is ``loss_weight`` times the sum of two weighted
    terms, each the mean of ``1 - AP`` over the sequences that have a positive:

    - ``class_ap`` ranks, for each class, the rows (sampled anchors or proposals);
    - ``pooled_ap`` ranks all (row, class) entries together, so that the scores of
      different classes become comparable.

    A term's ``span`` says which rows meet in one sequence: those of each ``'image'``,
    of the ``'batch'``, or of the batch and the last ``memory`` steps (``'memory'``,
    class-wise term only). Which rows belong to which image the heads of this package
    tell; in a stock head 'image' means the batch. 'row' (pooled term only) ranks the
    classes of each row against each other.

    The defaults are the recipe of ``docs/results.md``, not the settings of the paper;
    those are in the ``*_rambo-paper_*`` configs.

    Args:
        lambd (float): λ of Algorithm 1 for terms without one of their own: how far
            scores are moved to look for the gradient. It does not scale the loss, but
            with ``perturb='together'``, where it has to be finite, the larger it is
            the shorter the gradient. Defaults to infinity.
        margin (float): α: positives are lowered and negatives raised by half of it
            before ranking, in units of the scores. Defaults to 1.
        margin_noise (bool): Whether each shift is multiplied by its own ``|N(0, 1)|``,
            drawn anew every step. Defaults to True.
        memory (int): τ, the number of past steps whose scores also count in spans
            'memory', without gradient; 0 for none. Defaults to 7, but by default no
            term has that span.
        scores (str): What is ranked: 'logits', 'sigmoid', 'softmax' or 'log_softmax'.
            With the last two the classifier has a background column, else one column
            per class; they order alike, and the logarithm keeps a gradient where a
            probability is nearly 0.
        class_ap (dict, optional): ``dict(weight, span, lambd)`` of the class-wise term,
            with span 'memory', 'batch' or 'image'. Missing keys take the default,
            weight 1, span 'batch' and the loss' ``lambd``. ``None`` or weight 0 switch
            the term off.
        pooled_ap (dict, optional): The same for the pooled term, with span 'batch',
            'image' or 'row'. Defaults to weight 1 and span 'batch'.
        use_sigmoid (bool): Read by mmdet's heads: True means one column per class.
            False only, and always, with softmax and log_softmax. Defaults to True.
        loss_weight (float): Factor on the ranking loss. Defaults to 0.25.
        auxiliary (dict, optional): Config of a classification loss that is computed
            from the same logits and added, such as ``dict(type='CrossEntropyLoss')``.
            It has its own ``loss_weight``, and ``use_sigmoid`` like this loss. Defaults
            to None.
        check_values (bool): Whether to look for NaN and for labels out of range in
            each step, at the cost of a device synchronisation. Defaults to True.
        perturb (str): How Algorithm 1 moves the positives of a sequence: 'together',
            each by λ times its incoming gradient, as in the paper; or 'singly', each
            on its own by λ, with the loss that this gains as its gradient. See
            :func:`~rambo_det.functional.ap_loss`. Defaults to 'singly'.
        gather (bool, optional): Whether in distributed training the sequences of spans
            'batch' and 'memory' hold the rows of all processes, and the means are taken
            over the sequences of all. Then every process has to call the loss in every
            step, else the others wait for it. Defaults to None: in the heads of this
            package, which do so.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from mmdet.registry import MODELS
        >>> loss_cls = MODELS.build(dict(type='RaMBOLoss'))
        >>> logits = torch.tensor([[9.0, -9.0], [-9.0, 9.0], [-9.0, -9.0]])
        >>> labels = torch.tensor([0, 1, 2])  # the last row is background
        >>> loss_cls(logits, labels)
        tensor(0.)
        >>> labels = torch.tensor([2, 1, 0])
        >>> bool(loss_cls(logits, labels) > 0)
        True
    """

    def __init__(
        self,
        lambd: float = float('inf'),
        margin: float = 1.0,
        margin_noise: bool = True,
        memory: int = 7,
        scores: str = 'logits',
        class_ap: Optional[Dict[str, Any]] = DEFAULTS['class_ap'],
        pooled_ap: Optional[Dict[str, Any]] = DEFAULTS['pooled_ap'],
        use_sigmoid: bool = True,
        loss_weight: float = 0.25,
        auxiliary: Optional[Dict[str, Any]] = None,
        check_values: bool = True,
        perturb: str = 'singly',
        gather: Optional[bool] = None,
    ) -> None:
        super().__init__()
        together = check_perturb('RaMBOLoss', perturb)
        if scores not in SCORES:
            raise ValueError(
                f'RaMBOLoss: scores must be one of {SCORES}, got {scores!r}'
            )
        has_background = scores in WITH_BACKGROUND
        if use_sigmoid == has_background:
            raise ValueError(
                f'RaMBOLoss: scores={scores!r} needs use_sigmoid='
                f'{not has_background}, got {use_sigmoid}: mmdet heads read '
                'use_sigmoid to decide whether the classifier has a background column'
            )
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 0:
            raise ValueError(
                f'RaMBOLoss: memory must be a number of steps >= 0, got {memory!r}'
            )
        if gather is not None and not isinstance(gather, bool):
            raise TypeError(
                'RaMBOLoss: gather must be True, False or None (where the head calls '
                f'the loss in every process), got {gather!r}'
            )
        self.perturb = perturb
        self.gather = gather
        self.lambd = number('lambd', lambd, positive=True, finite=False)
        self.margin = number('margin', margin)
        self.margin_noise = bool(margin_noise)
        self.memory = memory
        self.scores = scores
        self.has_background = has_background
        parsed = (
            parse_term('class_ap', class_ap, self.lambd, together),
            parse_term('pooled_ap', pooled_ap, self.lambd, together),
        )
        self.terms = tuple(term for term in parsed if term is not None)
        if not self.terms:
            raise ValueError(
                'RaMBOLoss: both terms are switched off; give class_ap or pooled_ap a '
                'weight > 0'
            )
        self.use_sigmoid = use_sigmoid
        self.loss_weight = number('loss_weight', loss_weight)
        self.auxiliary = build_auxiliary(auxiliary, scores, use_sigmoid)
        self.check_values = bool(check_values)
        # Set by RaMBOScheduleHook, from the iteration alone: no state to be saved.
        self.factors = dict.fromkeys(SCHEDULED, 1.0)
        self._fills_memory = memory > 0 and any(t.span == 'memory' for t in self.terms)
        self._memory = ScoreMemory(memory)
        # Set by RaMBOMonitorHook for a step: takes the ranked scores and the labels,
        # and returns the scores to go on with.
        self.watch: Optional[Callable[[Tensor, Tensor], Tensor]] = None
        self._exchange = Exchange(1 + len(self.terms))
        self._images: Optional[Tuple[Tensor, int]] = None
        self._last: Optional[Tuple[Tensor, Tensor, Optional[Tuple[Tensor, int]]]] = None
        self._warned_about_images = False
        self._deferred: Optional[List[Call]] = None
        self._open_calls = OpenCalls()
        # mmdet's RoI heads ask for these three to use the methods below.
        self.custom_cls_channels = True
        self.custom_activation = True
        self.custom_accuracy = True

    def extra_repr(self) -> str:
        """Show the settings in the printed model."""
        return (
            f'perturb={self.perturb!r}, gather={self.gather}, margin={self.margin}, '
            f'margin_noise={self.margin_noise}, memory={self.memory}, '
            f'scores={self.scores!r}, loss_weight={self.loss_weight}, '
            f'terms={[tuple(term) for term in self.terms]}'
        )

    # What mmdet's heads ask of a loss

    def get_cls_channels(self, num_classes: int) -> int:
        """Return the number of outputs of the classifier for C classes."""
        return num_classes + self.has_background

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Turn logits into test scores for a RoI head.

        Args:
            cls_score (Tensor): Logits of shape (N, C), or (N, C + 1) with softmax.

        Returns:
            Tensor: Scores of shape (N, C + 1); RoI heads drop the last column.
        """
        if self.has_background:
            return cls_score.softmax(dim=-1)
        return nn.functional.pad(cls_score.sigmoid(), (0, 1))

    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> Dict[str, Tensor]:
        """Report the exact AP per term that the preceding call of the loss kept.

        The scores are those of that call's batch, without margin and memory, in the
        sequences of each term. ``cls_score`` and ``labels`` are mmdet's interface and
        not used: they come without the weights and images that the call had.

        Returns:
            dict[str, Tensor]: AP in [0, 1] under 'class_ap' and 'pooled_ap'; 0 where
            the batch had no positive; empty before the first call and where calls
            are deferred.
        """
        if self._last is None or self._deferred is not None:
            return {}
        scores, labels, images = self._last
        result = {}
        for term in self.terms:
            ranking = self._ranking(term, labels, images)
            values = detection_average_precision(scores, labels, ranking)
            result[term.name] = torch.nan_to_num(values.nanmean())
        return result

    # The loss

    @contextmanager
    def images(self, index: Tensor, num_images: int) -> Iterator[None]:
        """Tell which image each row of the next calls belongs to.

        A head that does so calls the loss in every process, also without rows: with
        ``gather=None`` the processes then rank together.

        Args:
            index (Tensor): Image 0..num_images-1 of each row, int64, shape (N,).
            num_images (int): Number of images.

        Raises:
            ValueError: If ``index`` is not one-dimensional.
        """
        if index.dim() != 1:
            raise ValueError(
                'RaMBOLoss.images: index must have shape (N,), the image of each row, '
                f'got {tuple(index.shape)}'
            )
        outer = self._images
        self._images = (index.long(), num_images)
        try:
            yield
        finally:
            self._images = outer

    @contextmanager
    def deferred(self) -> Iterator[List[Call]]:
        """Record calls instead of ranking: a head calls once per pyramid level.

        Each call returns a zero that is connected to the graph. :meth:`joint` ranks
        the recorded calls afterwards.

        Yields:
            list[Call]: The calls so far, in their order.
        """
        outer = self._deferred
        calls: List[Call] = []
        self._deferred = calls
        try:
            yield calls
        finally:
            self._deferred = outer

    def joint(self, calls: List[Call], index: Tensor, num_images: int) -> Tensor:
        """Compute the loss of recorded calls as if they had been one.

        Args:
            calls (list[Call]): What :meth:`deferred` recorded.
            index (Tensor): The image of each row of all calls, see :meth:`images`.
            num_images (int): Number of images.

        Returns:
            Tensor: The loss, a scalar.
        """
        pred, target, weight, avg_factor = merge_calls(calls)
        with self.images(index, num_images):
            return self(pred, target, weight, avg_factor=avg_factor)

    @_not_compiled
    def forward(
        self,
        pred: Tensor,
        target: Union[Tensor, Tuple[Tensor, Tensor]],
        weight: Optional[Tensor] = None,
        avg_factor: Optional[float] = None,
        reduction_override: Optional[str] = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            pred (Tensor): Logits of shape (N, C), or (N, C + 1) with softmax.
            target (Tensor): Labels of shape (N,): 0..C-1 foreground, C background. Of
                a tuple ``(labels, quality)``, as GFL and RTMDet give it, the labels
                are ranked and the quality is not used.
            weight (Tensor, optional): Shape (N,). Rows of weight 0 are ignored
                everywhere; other values make no difference in a ranking.
            avg_factor (float, optional): What the auxiliary loss divides by; means over
                sequences have no use for it.
            reduction_override (str, optional): ``None``, 'mean' and 'sum' mean the
                same; 'none' raises, since a ranking has no loss per row.

        Returns:
            Tensor: The loss, a scalar; the ranking's part is 0 with zero gradient
            without positives.

        Raises:
            TypeError: If ``pred`` or ``target`` has the wrong type.
            ValueError: If shapes do not fit, a label is out of range, ``pred``
                contains NaN, or ``reduction_override`` is 'none' or unknown.
            RuntimeError: If a head without binding calls once per pyramid level, or if
                another process refused what it got.
        """
        images = self._images
        together = self._ranks_together()
        try:
            target = hard_labels(target)
            check_reduction(reduction_override)
            index = None if images is None else images[0]
            check_shapes(pred, target, weight, index, self.has_background)
            if self._deferred is not None:
                self._deferred.append(Call(pred, target, weight, avg_factor))
                return pred[:0].sum()
            labels, any_ignored = ranked_labels(
                pred, target, weight, self.has_background, self.check_values
            )
            scores = self._ranked_scores(pred)
        except Exception:
            if together:  # the others wait for this process
                self._exchange.refuse(pred.device)
            raise
        self._last = (scores.detach(), labels, images)
        if self.watch is not None:
            scores = self.watch(scores, labels)
        rankings = [self._ranking(term, labels, images) for term in self.terms]
        margin = fixed_margin = self.margin * self.factors['margin']
        noise = bool(margin) and self.margin_noise
        step = Step(scores, labels, any_ignored)
        if together:
            step = gather_step(
                self._exchange, scores, labels, rankings, any_ignored, noise
            )
        rankings = [step.place(ranking) for ranking in rankings]

        scores, labels, any_ignored = step[:3]
        if self.training and self._fills_memory:
            past = self._memory.recall(scores)
            self._memory.append(scores.detach(), labels.detach(), step.processes > 1)
            if past is not None:
                scores = torch.cat([scores, past[0]])
                labels = torch.cat([labels, past[1]])
                any_ignored = True
        if noise:
            classes = torch.arange(scores.size(1), device=labels.device)
            positive = labels.unsqueeze(1) == classes
            scores = apply_margin(scores, positive, margin, True, step.generator)
            fixed_margin = 0.0

        results = detection_ap_loss(
            scores,
            labels,
            rankings,
            margin=fixed_margin,
            any_ignored=any_ignored,
            perturb=self.perturb,
        )
        loss = scores.new_zeros(())
        for term, mean in zip(self.terms, step.means(rankings, results)):
            loss = loss + term.weight * mean
        loss = self.loss_weight * self.factors['loss_weight'] * loss
        share = self.factors['auxiliary']
        # Stock heads do not call their loss without rows, and not every loss bears it.
        if self.auxiliary is not None and share and len(pred):
            other = self.auxiliary(pred, target, weight, avg_factor=avg_factor)
            loss = loss + share * other
        if images is None:
            self._refuse_levels(self._open_calls.add(loss, len(pred)), len(pred))
        return loss

    def _ranks_together(self) -> bool:
        """Return whether this call is one of all processes."""
        if not self.training or self._deferred is not None:
            return False
        wanted = self._images is not None if self.gather is None else self.gather
        return wanted and get_world_size() > 1

    def _refuse_levels(self, before: Optional[int], rows: int) -> None:
        """Raise if the preceding call, still without backward, had other rows."""
        if before is None:
            return
        head = calling_head(self)
        bound = f'RaMBO{head}' if head else "'RaMBO' + the name of the stock head"
        if head and MODELS.get(bound) is None:
            bound += ', which does not exist: see docs/detectors.md for what does'
        raise RuntimeError(
            f'RaMBOLoss: {head or "the head"} called the loss with {before} rows and, '
            f'before backward, with {rows} rows: a call per pyramid level ranks each '
            f'level on its own. Use the head that binds the loss, type={bound}. Calls '
            'that belong to different images tell so with RaMBOLoss.images'
        )

    def _ranked_scores(self, pred: Tensor) -> Tensor:
        """Turn logits into what is ranked, float32 at least, (N, C)."""
        pred = pred.float() if pred.dtype in (torch.float16, torch.bfloat16) else pred
        if self.scores == 'sigmoid':
            return pred.sigmoid()
        if self.scores == 'softmax':
            return pred.softmax(dim=1)[:, :-1]
        if self.scores == 'log_softmax':
            return pred.log_softmax(dim=1)[:, :-1]
        return pred

    def _ranking(
        self, term: Term, labels: Tensor, images: Optional[Tuple[Tensor, int]]
    ) -> Ranking:
        """Return what one term ranks; ``labels`` are those of this step's rows."""
        lambd = term.lambd * self.factors['lambd']
        rows = None if term.span == 'memory' else len(labels)
        if term.span == 'row':
            index = torch.arange(len(labels), device=labels.device)
            return Ranking(lambd, term.per_class, index, max(len(labels), 1), rows)
        if term.span == 'image':
            if images is not None:
                return Ranking(lambd, term.per_class, *images, rows)
            if not self._warned_about_images:
                self._warned_about_images = True
                warnings.warn(
                    f"RaMBOLoss: {term.name} has span 'image', but the head does not "
                    'say which rows belong to which image, so the whole batch is '
                    "ranked instead. Use the head of this package (type='RaMBO' + the "
                    'name of the stock head, e.g. RaMBOShared2FCBBoxHead), or span '
                    "'batch'",
                    stacklevel=3,
                )
        return Ranking(lambd, term.per_class, num_rows=rows)

    # The score memory

    def get_extra_state(self) -> Dict[str, Any]:
        """Return the memory for the ``state_dict``, oldest step first."""
        return self._memory.state()

    def set_extra_state(self, state: Dict[str, Any]) -> None:
        """Restore the memory; only the last ``memory`` steps are kept.

        Raises:
            ValueError: If the state is none that :meth:`get_extra_state` returns.
        """
        self._memory.load(state if self._fills_memory else dict(scores=[], labels=[]))

    @property
    def remembered(self) -> Optional[ScoreMemory]:
        """The memory; ``None`` where no term has span 'memory'."""
        return self._memory if self._fills_memory else None

    def _save_to_state_dict(
        self, destination: Dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Leave out an empty memory: mmengine broadcasts all that a new model has.

        It expects tensors there, and stops a distributed training at anything else.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._memory.saved:
            destination.pop(prefix + '_extra_state')

    def _load_from_state_dict(
        self, state_dict: Dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Empty the memory where the saved one was."""
        state_dict.setdefault(prefix + '_extra_state', dict(scores=[], labels=[]))
        super()._load_from_state_dict(state_dict, prefix, *args)
