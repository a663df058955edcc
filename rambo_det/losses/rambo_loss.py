"""RaMBO: average precision as the classification loss of a detector."""

import warnings
from typing import Any, ContextManager, Dict, List, Optional, Sequence

import torch
from mmdet.registry import MODELS
from mmengine.dist import get_world_size
from torch import Tensor

from ..functional import Past, Ranking, detection_ap_loss, with_margin
from ..functional.checks import at_least_float32, check_perturb
from .arguments import (
    DEFAULTS,
    INHERITED,
    SCORES,
    WITH_BACKGROUND,
    Term,
    build_auxiliary,
    number,
    parse_overlaps,
    parse_term,
    refuse_unknown,
    steps,
)
from .gather import Exchange, Mean, Step, gather_step
from .memory import Remembering, ScoreMemory
from .ranking_loss import PATIENCE, RankingLoss
from .rows import Images, Ranked, Rows, check_overlaps, check_reduction, check_rows

# What RaMBOScheduleHook can change during training.
SCHEDULED = ('lambd', 'margin', 'loss_weight', 'auxiliary')


@MODELS.register_module()
class RaMBOLoss(Remembering, RankingLoss):
    """Average precision of the classification scores as a loss.

    Rolínek et al., *Optimizing Rank-based Metrics with Blackbox Differentiation*, CVPR
    2020 (arXiv 1912.03500). The loss is ``loss_weight`` times the sum of two weighted
    terms, each the mean of ``1 - AP`` over the sequences that have a positive:

    - ``class_ap`` ranks, for each class, the rows (sampled anchors or proposals);
    - ``pooled_ap`` ranks all (row, class) entries together, so that the scores of
      different classes become comparable.

    A term's ``span`` says which rows meet in one sequence: those of each ``'image'``,
    of the ``'batch'``, or of the batch and the last ``memory`` steps (``'memory'``,
    class-wise term only); 'row' (pooled term only) ranks the classes of each row. The
    heads of this package tell the images; where nobody does, 'image' means the batch.

    The defaults are the recipe of ``docs/results.md``; the settings of the paper are in
    the ``*_rambo-paper_*`` configs.

    Args:
        lambd (float): λ of Algorithm 1 for terms without one of their own: how far
            scores are moved to look for the gradient. With ``perturb='together'`` it
            has to be finite, and a larger one gives a smaller gradient norm. Defaults
            to infinity, which a config spells ``'infinite'``: mmengine cannot load the
            dump of a float infinity.
        margin (float): α: positives are lowered and negatives raised by half of it
            before ranking, in units of the scores. Defaults to 1.
        margin_noise (bool): Whether each shift is multiplied by its own ``|N(0, 1)|``,
            drawn anew every step. Defaults to True. On a CPU, matrices of more than
            2^18 entries share so many draws, taken at random places.
        memory (int): τ, the number of past steps whose scores also count where a span
            is 'memory', without gradient and with the margin they were ranked with. By
            default no span is. Defaults to 7.
        scores (str): What is ranked: 'logits' (the default), 'sigmoid', 'softmax' or
            'log_softmax'. The last two need a background column in the classifier.
        class_ap (dict, optional): ``dict(weight, span, lambd)`` of the class-wise term,
            with span 'memory', 'batch' or 'image'. Missing keys default to weight 1,
            span 'batch' and the loss' ``lambd``. ``None`` switches the term off.
        pooled_ap (dict, optional): The same for the pooled term, with span 'batch',
            'image' or 'row'.
        use_sigmoid (bool): Read by mmdet's heads: True means one column per class.
            False only, and always, with softmax and log_softmax. Defaults to True.
        loss_weight (float): Factor on the ranking loss. Defaults to 0.25.
        auxiliary (dict, optional): Config of a classification loss that is computed
            from the same logits and added, such as ``dict(type='CrossEntropyLoss')``.
            It has its own ``loss_weight``, and ``use_sigmoid`` like this loss.
        check_values (bool): Whether to look for NaN, labels out of range and positives
            in each step, with one device synchronisation. Defaults to True.
        perturb (str): How Algorithm 1 moves the positives of a sequence: 'together',
            each by λ times its incoming gradient, as in the paper; or 'singly', each
            on its own by λ, with the loss that this gains as its gradient. See
            :func:`~rambo_det.functional.ap_loss`. Defaults to 'singly'.
        gather (bool, optional): Whether in distributed training the sequences of spans
            'batch' and 'memory' hold the rows of all processes. Then every process has
            to call the loss in every step, else the others wait for it. Defaults to
            None: in the heads of this package, which do so.
        overlaps (sequence[float], optional): Ascending IoU thresholds in [0, 1], such
            as ``(0.5, 0.6, 0.7, 0.8)``. AP is then the mean over them, as in COCO: a
            foreground row is a positive only at thresholds up to the IoU of its
            predicted box with its object, and a negative at the others. At a threshold
            of 0 all foreground rows are positives. Defaults to None: at all.
        overlap_weights (str): The weights of these thresholds: 'equal', as in COCO, or
            'positives', in proportion to the number of rows that reach it, so that
            thresholds that few boxes reach have little. Defaults to 'equal'.

    Raises:
        TypeError: If an argument is unknown or has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from mmdet.registry import MODELS
        >>> loss_cls = MODELS.build(dict(type='RaMBOLoss'))
        >>> logits = torch.tensor([[9.0, -9.0], [-9.0, 9.0], [-9.0, -9.0]])
        >>> loss_cls(logits, torch.tensor([0, 1, 2]))  # the last row is background
        tensor(0.)
        >>> bool(loss_cls(logits, torch.tensor([2, 1, 0])) > 0)
        True
    """

    takes_background = True

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
        overlaps: Optional[Sequence[float]] = None,
        overlap_weights: str = 'equal',
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown('RaMBOLoss', unknown)
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
                'use_sigmoid to decide whether the classifier has a background column. '
                + INHERITED
            )
        if gather is not None and not isinstance(gather, bool):
            raise TypeError(
                'RaMBOLoss: gather must be True, False or None (where the head calls '
                f'the loss in every process), got {gather!r}'
            )
        self.perturb = perturb
        self.gather = gather
        self.overlaps = parse_overlaps(overlaps)
        self.needs_overlaps = self.overlaps is not None
        if overlap_weights not in ('equal', 'positives'):
            raise ValueError(
                "RaMBOLoss: overlap_weights must be 'equal' or 'positives', got "
                f'{overlap_weights!r}'
            )
        self.overlap_weights = overlap_weights
        # Moves with the model, and is no state.
        self._thresholds: Tensor
        thresholds = torch.tensor(self.overlaps or ())
        self.register_buffer('_thresholds', thresholds, persistent=False)
        self.lambd = number('lambd', lambd, positive=True, finite=False)
        self.margin = number('margin', margin)
        self.margin_noise = bool(margin_noise)
        self.memory = steps('memory', memory)
        self.scores = scores
        self.has_background = has_background
        specs = dict(class_ap=class_ap, pooled_ap=pooled_ap)
        terms = [parse_term(*spec, self.lambd, together) for spec in specs.items()]
        self.terms = tuple(term for term in terms if term is not None)
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
        self.ranked = Ranked()
        self._exchange = Exchange(self.name)
        self._reported: Dict[str, Tensor] = {}
        self._calls_without_positive: Optional[int] = 0
        self._warned_about_images = False

    def extra_repr(self) -> str:
        """Show the settings in the printed model."""
        names = (
            'perturb',
            'gather',
            'margin',
            'margin_noise',
            'memory',
            'scores',
            'overlaps',
        )
        shown = ', '.join(f'{name}={getattr(self, name)!r}' for name in names)
        terms = [tuple(term) for term in self.terms]
        return f'{shown}, loss_weight={self.loss_weight}, terms={terms}'

    def get_accuracy(
        self, cls_score: Optional[Tensor] = None, labels: Optional[Tensor] = None
    ) -> Dict[str, Tensor]:
        """Report the AP of each term in the ranking that the preceding call made.

        The ranking has margin and memory in it. The arguments are mmdet's interface and
        not used.

        Returns:
            dict[str, Tensor]: AP in [0, 1] under 'class_ap' and 'pooled_ap'. Empty if
            the call had no positive, so that it does not count in a mean over steps;
            with ``check_values=False`` nobody knows, and the value before is repeated.
        """
        return dict(self._reported)

    # The loss

    @torch.compiler.disable  # its shapes change with every batch
    def forward(
        self,
        pred: Tensor,
        target: Any,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[float] = None,
        reduction_override: Optional[str] = None,
        *,
        images: Optional[Images] = None,
        objects: Optional[Tensor] = None,
        overlaps: Optional[Tensor] = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            pred (Tensor): Logits of shape (N, C), or (N, C + 1) with softmax.
            target (Tensor): Labels of shape (N,): 0..C-1 foreground, C background. Of
                a tuple ``(labels, quality)``, as GFL and RTMDet give it, the labels
                are ranked.
            weight (Tensor, optional): Shape (N,). Rows of weight 0 are ignored
                everywhere; other values make no difference in a ranking.
            avg_factor (float, optional): What the auxiliary loss divides by; means over
                sequences have no use for it.
            reduction_override (str, optional): ``None``, 'mean' and 'sum' mean the
                same; 'none' raises, since a ranking has no loss per row.
            images (Tensor | tuple[Tensor, int], optional): The image of each row,
                integers of shape (N,), or these and the number of images, which saves
                asking the device for it. A head that gives them calls the loss in every
                process, also without rows, as ``gather=None`` relies on.
            objects (Tensor, optional): The labels of the ground truth, (G,). They are
                checked, since matching may turn one beyond the classes into background.
            overlaps (Tensor, optional): The IoU of the predicted box of each foreground
                row with its object, (N,); values in other rows are not used. Needed
                where the loss has ``overlaps``, else not used. By default the quality
                in the target.

        Returns:
            Tensor: The loss, a scalar; the ranking's part is 0 with zero gradient
            without positives.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If shapes do not fit, a label is out of range, ``pred``
                contains NaN, or ``reduction_override`` is 'none' or unknown.
            RuntimeError: If the head that calls has to tell the images and does not, or
                if another process refused what it got.
        """
        together = self._ranks_together(images is not None)
        with self._exchange.expected(together):
            check_reduction(self.name, reduction_override)
            by_image = any(term.span == 'image' for term in self.terms)
            rows = check_rows(self, pred, target, weight, images, objects, by_image)
            if self.scores != 'logits' or self.auxiliary is not None:
                rows = rows.harmless()
            levels = self._levels(target, overlaps)
            scores, labels = self.ranked(self._scores(rows.pred), rows.labels)
            rankings = [self._ranking(term, rows) for term in self.terms]
            margin = self.margin * self.factors['margin']
            noise = self.margin_noise and margin > 0
            step = Step(scores, labels, levels, rows.any_ignored)
            if together:
                step = gather_step(self._exchange, step, rankings, noise)
        rankings = [step.place(ranking) for ranking in rankings]
        scores, labels, past = step.scores, step.labels, []
        if self.training and self._fills_memory:
            scores = with_margin(scores, labels, margin, noise, step.generator)
            past = self._memory.recall(scores)
            kept = Past(scores.detach(), labels, step.levels)
            self._memory.append(kept, step.processes > 1)
            margin = 0.0
        results = detection_ap_loss(
            scores,
            labels,
            rankings,
            margin=margin,
            margin_noise=noise,
            generator=step.generator,
            any_ignored=step.any_ignored,
            perturb=self.perturb,
            past=past,
            levels=step.levels,
            num_levels=len(self.overlaps or ()),
            over_all=self.overlap_weights == 'positives',
        )
        # Sequences without a positive have loss 0 and do not count.
        losses = [own for own, _ in results]
        counts = [present.sum() for _, present in results]
        means = [own.sum() / n.clamp(min=1) for own, n in zip(losses, counts)]
        self._report(means, counts, rows.any_positive)
        means = step.over_all(rankings, losses, means)
        factor = self.loss_weight * self.factors['loss_weight']
        weights = [factor * term.weight for term in self.terms]
        loss = weights[0] * means[0]
        for weight_of_term, mean in zip(weights[1:], means[1:]):
            loss = torch.add(loss, mean, alpha=weight_of_term)
        share = self.factors['auxiliary']
        # Stock heads do not call their loss without rows, and not every loss bears it.
        if self.auxiliary is not None and share and len(pred):
            # Ignored rows become harmless background.
            background = pred.size(1) - self.has_background
            labels = rows.labels.masked_fill(rows.labels < 0, background)
            given = labels if isinstance(target, Tensor) else (labels, target[1])
            other = self.auxiliary(rows.pred, given, weight, avg_factor=avg_factor)
            loss = loss + share * other
        return loss

    @property
    def gathers(self) -> bool:
        """Whether calls of a bound head are calls of all processes."""
        return self._ranks_together(tells_images=True)

    def expected(self) -> ContextManager[Optional[Mean]]:
        """Return what a head enters before it computes what the loss then ranks."""
        return self._exchange.expected(self.gathers)

    def _ranks_together(self, tells_images: bool) -> bool:
        """Return whether a call is one of all processes."""
        wanted = tells_images if self.gather is None else self.gather
        return self.training and wanted and get_world_size() > 1

    def _levels(self, target: Any, overlaps: Optional[Tensor]) -> Optional[Tensor]:
        """Return the last threshold that each row reaches, -1 for none, (N,)."""
        if self.overlaps is None:
            return None
        overlaps = check_overlaps(self, target, overlaps)
        return torch.bucketize(overlaps, self._thresholds, right=True) - 1

    def _scores(self, pred: Tensor) -> Tensor:
        """Turn logits into what is ranked, float32 at least, (N, C)."""
        pred = at_least_float32(pred)
        if self.scores == 'logits':
            return pred
        if self.scores == 'sigmoid':
            return pred.sigmoid()
        activation = pred.softmax if self.scores == 'softmax' else pred.log_softmax
        return activation(dim=1)[:, :-1]

    def _ranking(self, term: Term, rows: Rows) -> Ranking:
        """Return what one term ranks; rows of the memory come after these."""
        lambd = term.lambd * self.factors['lambd']
        count = len(rows.labels)
        if term.span == 'row':
            index = torch.arange(count, device=rows.labels.device)
            return Ranking(lambd, term.per_class, index, max(count, 1), count)
        if term.span == 'image':
            if rows.images is not None:
                return Ranking(lambd, term.per_class, *rows.images, count)
            if not self._warned_about_images:
                self._warned_about_images = True
                warnings.warn(
                    f"RaMBOLoss: {term.name} has span 'image', but the head does not "
                    'say which rows belong to which image, so the whole batch is '
                    "ranked. Use the head of this package (type='RaMBO' + its name, "
                    "e.g. RaMBOShared2FCBBoxHead), or span 'batch'",
                    stacklevel=3,
                )
        return Ranking(
            lambd, term.per_class, num_rows=None if term.span == 'memory' else count
        )

    def _report(
        self, means: List[Tensor], counts: List[Tensor], any_positive: Optional[bool]
    ) -> None:
        """Keep the AP of a ranking for the log; warn if there never is a positive."""
        before, self._reported = self._reported, {}
        if any_positive is False:
            self._miss_positives()
            return
        if any_positive:
            self._calls_without_positive = None
        for term, mean, count in zip(self.terms, means, counts):
            with torch.no_grad():
                value = 1 - mean
            if any_positive is None:
                last = before.get(term.name, value.new_full((), float('nan')))
                value = torch.where(count > 0, value, last)
            self._reported[term.name] = value

    def _miss_positives(self) -> None:
        """Count calls without a positive in a training that has had none so far."""
        if not self.training or self._calls_without_positive is None:
            return
        self._calls_without_positive += 1
        if self._calls_without_positive == PATIENCE:
            warnings.warn(
                f'RaMBOLoss: none of the first {PATIENCE} calls had a positive, so '
                'that nothing was learned. Do metainfo.classes match the names in the '
                "annotations, does num_classes match them, and do the assigner's "
                'thresholds leave positives?',
                stacklevel=4,
            )
