"""The mathematics of RaMBO, in PyTorch alone.

Sources: Rolínek, Musil, Paulus, Vlastelica, Michaelis, Martius, *Optimizing Rank-based
Metrics with Blackbox Differentiation*, CVPR 2020 (arXiv 1912.03500); Vlastelica,
Paulus, Musil, Martius, Rolínek, *Differentiation of Blackbox Combinatorial Solvers*,
ICLR 2020 (arXiv 1912.02175).
"""

from . import peers
from .average_precision import (
    ap_loss,
    apply_margin,
    average_precision,
    detection_ap_loss,
    detection_average_precision,
    with_margin,
)
from .past import Past
from .ranking import blackbox_rank, rank
from .recall import recall_at_k, recall_loss
from .sequences import Ranking

__all__ = [
    'Past',
    'Ranking',
    'ap_loss',
    'apply_margin',
    'average_precision',
    'blackbox_rank',
    'detection_ap_loss',
    'detection_average_precision',
    'peers',
    'rank',
    'recall_at_k',
    'recall_loss',
    'with_margin',
]
