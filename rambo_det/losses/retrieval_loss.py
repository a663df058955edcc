"""RaMBO for retrieval: recall or average precision of a batch's embeddings."""

import warnings
from functools import partial
from typing import Any, Tuple

import torch
from mmdet.registry import MODELS
from mmengine.dist import get_world_size
from torch import Tensor, nn

from ..functional import Past, Ranking, ap_loss, recall_loss
from ..functional.checks import at_least_float32, check_perturb
from ..functional.recall import WEIGHTINGS
from .arguments import number, refuse_unknown, steps
from .gather import Exchange, Step, gather_step
from .memory import Remembering, ScoreMemory
from .ranking_loss import PATIENCE
from .rows import check_matrix, check_row_values

METRICS = ('recall', 'ap')
SIMILARITIES = ('cosine', 'euclidean')


def unit_vectors(feats: Tensor) -> Tensor:
    """Return embeddings (N, D), with length 1 unless they are shorter than 1e-6.

    These have no direction, and a gradient would be longer than any number.
    """
    length = torch.linalg.vector_norm(feats, dim=1, keepdim=True)
    return feats / length.masked_fill(length < 1e-6, 1.0)


@MODELS.register_module()
class RaMBORetrievalLoss(Remembering, nn.Module):
    """Recall or average precision of retrieval as a loss.

    Rolínek et al., *Optimizing Rank-based Metrics with Blackbox Differentiation*, CVPR
    2020 (arXiv 1912.03500), section 4.1. Each image of the batch is a query that ranks
    all others by similarity; those with its label are positives. The loss is the mean
    over the queries that have a positive. It takes the place of ``loss_triplet`` in
    mmdet's ``LinearReIDHead``. Batches need several images of a class, as the
    ``triplet_sampler`` of mmdet's ``ReIDDataset`` draws them.

    Args:
        metric (str): 'recall' for the mean over the positives of ``w(number of
            negatives above)``, 'ap' for ``1 - AP``. Defaults to 'recall'.
        similarity (str): 'cosine', or 'euclidean' for the negative distance. mmdet's
            ``ReIDMetrics`` ranks by distance, which for embeddings of length 1, those
            of ``UnitReIDHead``, has the order of the cosine. Defaults to 'cosine'.
        lambd (float): λ of Algorithm 1, in units of the similarity, see
            :class:`RaMBOLoss`. Defaults to infinity, in a config 'infinite'.
        margin (float): α: positives are lowered and negatives raised by half of it
            before ranking, in units of the similarity. A temperature would change the
            same. Defaults to 0.2.
        margin_noise (bool): Whether each shift is multiplied by its own ``|N(0, 1)|``,
            drawn anew every step. Defaults to False.
        memory (int): τ, the number of past steps whose embeddings are in the gallery,
            too, without gradient. Defaults to 0.
        weighting (str): w of the recall, 'log' or 'loglog', see
            :func:`~rambo_det.functional.recall_loss`. Defaults to 'log'.
        perturb (str): Whether Algorithm 1 moves the positives of a query 'together', as
            in the paper, or 'singly'. Defaults to 'singly'.
        loss_weight (float): Factor on the loss. Defaults to 1.
        check_values (bool): Whether to look for NaN and infinity, and for positives, in
            each step, with one device synchronisation. Defaults to True.
        gather (bool): Whether in distributed training the images of all processes are
            queries and gallery. Then every process has to call the loss in every step,
            as mmdet's head does. Defaults to True.

    Raises:
        TypeError: If an argument is unknown or has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from mmdet.registry import MODELS
        >>> loss = MODELS.build(dict(type='RaMBORetrievalLoss', margin=0.0))
        >>> feats = torch.tensor([[3.0, 0.1], [1.0, 0.0], [0.0, 2.0], [0.1, 1.0]])
        >>> loss(feats, torch.tensor([0, 0, 1, 1]))
        tensor(0.)
        >>> loss(feats, torch.tensor([0, 1, 0, 1]))  # one or two negatives are above
        tensor(0.8959)
    """

    def __init__(
        self,
        metric: str = 'recall',
        similarity: str = 'cosine',
        lambd: float = float('inf'),
        margin: float = 0.2,
        margin_noise: bool = False,
        memory: int = 0,
        weighting: str = 'log',
        perturb: str = 'singly',
        loss_weight: float = 1.0,
        check_values: bool = True,
        gather: bool = True,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(self.name, unknown)
        together = check_perturb(self.name, perturb)
        for name, value, known in (
            ('metric', metric, METRICS),
            ('similarity', similarity, SIMILARITIES),
            ('weighting', weighting, WEIGHTINGS),
            ('gather', gather, (True, False)),
        ):
            if value not in known:
                raise ValueError(
                    f'{self.name}: {name} must be one of {known}, got {value!r}'
                )
        positive_number = partial(number, loss=self.name)
        where = " with perturb='together'" if together else ''
        self.lambd = positive_number('lambd', lambd, True, together, where)
        self.margin = positive_number('margin', margin)
        self.loss_weight = positive_number('loss_weight', loss_weight)
        self.metric, self.similarity, self.weighting = metric, similarity, weighting
        self.margin_noise, self.perturb = bool(margin_noise), perturb
        self.check_values, self.gather = bool(check_values), gather
        self.memory = steps('memory', memory, self.name)
        self._memory = ScoreMemory(memory, self.name)
        self._fills_memory = memory > 0
        self._exchange = Exchange(self.name)
        self._calls_without_positive = 0

    @property
    def name(self) -> str:
        """What messages call the loss."""
        return type(self).__name__

    def extra_repr(self) -> str:
        """Show the settings in the printed model."""
        names = (
            *('metric', 'similarity', 'lambd', 'margin', 'margin_noise', 'memory'),
            *('weighting', 'perturb', 'loss_weight', 'gather'),
        )
        return ', '.join(f'{name}={getattr(self, name)!r}' for name in names)

    @torch.compiler.disable  # its shapes may change with every batch
    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            feats (Tensor): Embeddings of shape (N, D); half precision, also that of
                autocast, is compared in float32.
            labels (Tensor): Integers of shape (N,), which class each is of.

        Returns:
            Tensor: The loss, a scalar; 0 with zero gradient where no image has another
            of its class, or all are of one class.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If shapes do not fit, or ``feats`` contains NaN or infinity, or
                has one column, whose cosine has no gradient.
            RuntimeError: If another process refused what it got.
        """
        together = self.training and self.gather and get_world_size() > 1
        with self._exchange.expected(together):
            feats, labels = self._checked(feats, labels)
            with torch.autocast(feats.device.type, enabled=False):
                return self._loss(at_least_float32(feats), labels, together)

    def _checked(self, feats: Any, labels: Any) -> Tuple[Tensor, Tensor]:
        """Return the arguments of a call, unless something is wrong with them."""
        check_matrix(self.name, 'feats', feats, 'embeddings', '(N, D)')
        check_row_values(self.name, 'labels', labels, feats, 'feats', 'labels')
        if feats.size(1) == 1 and self.similarity == 'cosine':
            raise ValueError(
                f'{self.name}: feats has one column, and the cosine of two numbers has '
                f"no gradient; use similarity='euclidean' or more out_channels"
            )
        if self.check_values and not bool(torch.isfinite(feats.detach().sum())):
            bad = (~torch.isfinite(feats)).any(1)
            if bool(bad.any()):
                raise ValueError(
                    f'{self.name}: feats contains NaN or infinity in {int(bad.sum())} '
                    f'of {len(bad)} rows: training has diverged. Lower the learning '
                    'rate or clip gradients'
                )
        return feats, labels.long()

    def _loss(self, feats: Tensor, labels: Tensor, together: bool) -> Tensor:
        """Return the loss of checked arguments, feats at least float32."""
        if self.similarity == 'cosine':
            feats = unit_vectors(feats)
        step = Step(feats, labels, None, False)
        ranking = Ranking(self.lambd, False)
        if together:
            noise = self.margin_noise and self.margin > 0
            step = gather_step(self._exchange, step, [ranking], noise)
        feats, labels = step.scores, step.labels
        gallery, classes = feats, labels
        if self.training and self._fills_memory:
            past = self._memory.recall(feats)
            gallery = torch.cat([feats, *(of.scores for of in past)])
            classes = torch.cat([labels, *(of.labels for of in past)])
            kept = Past(feats.detach(), labels)
            self._memory.append(kept, step.processes > 1)
        others = torch.ones_like(labels, dtype=torch.bool)
        others = others.new_ones(len(labels), len(classes)).fill_diagonal_(False)
        targets = labels.unsqueeze(1) == classes
        loss_of_rows: Any = ap_loss
        if self.metric == 'recall':
            loss_of_rows = partial(recall_loss, weighting=self.weighting)
        losses = loss_of_rows(
            self._similarity(feats, gallery),
            targets,
            lambd=self.lambd,
            margin=self.margin,
            margin_noise=self.margin_noise,
            mask=others,
            generator=step.generator,
            check_nan=False,
            perturb=self.perturb,
        )
        count = (targets & others).any(1).sum()
        if self.check_values and self.training:
            self._look_for_positives(bool(count > 0))
        (loss,) = step.over_all(
            [ranking], [losses], [losses.sum() / count.clamp(min=1)]
        )
        return self.loss_weight * loss

    def _similarity(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Return the similarity of each query (R, D) to the gallery (G, D), (R, G)."""
        product = queries @ gallery.t()
        if self.similarity == 'cosine':
            return product
        squares = gallery.square().sum(1)
        squared = squares[: len(queries), None] + squares - 2 * product
        return -squared.clamp(min=1e-12).sqrt()

    def _look_for_positives(self, found: bool) -> None:
        """Warn in a training that has had no positive in its first calls."""
        if self._calls_without_positive < 0 or found:
            self._calls_without_positive = -1
            return
        self._calls_without_positive += 1
        if self._calls_without_positive == PATIENCE:
            warnings.warn(
                f'{self.name}: in none of the first {PATIENCE} calls were two images '
                'of a class, so that nothing was learned. Give the training set a '
                'triplet_sampler=dict(num_ids=…, ins_per_id=…), which draws some',
                stacklevel=4,
            )
