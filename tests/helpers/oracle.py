"""The definitions, spelled out: slow, obvious, and independent of the package.

Everything here works on Python lists of floats, one sequence at a time.
"""

from math import log1p
from typing import List, Optional, Sequence, Tuple


def precedes(i: int, j: int, scores: Sequence[float], targets: Sequence[int]) -> bool:
    """Whether i ranks above j: score, then negatives first, then index."""
    if scores[i] != scores[j]:
        return scores[i] > scores[j]
    if targets[i] != targets[j]:
        return targets[i] < targets[j]
    return i < j


def ranks(scores: Sequence[float], targets: Sequence[int]) -> List[int]:
    n = len(scores)
    return [
        1 + sum(precedes(j, i, scores, targets) for j in range(n) if j != i)
        for i in range(n)
    ]


def positive_ranks(scores: Sequence[float], targets: Sequence[int]) -> List[int]:
    """Rank among the positives, for positives; 0 for negatives."""
    n = len(scores)
    return [
        1
        + sum(
            precedes(j, i, scores, targets) for j in range(n) if j != i and targets[j]
        )
        if targets[i]
        else 0
        for i in range(n)
    ]


def average_precision(scores: Sequence[float], targets: Sequence[int]) -> float:
    """Mean precision at the positives; NaN without positives."""
    rk, rkp = ranks(scores, targets), positive_ranks(scores, targets)
    precision = [rkp[i] / rk[i] for i in range(len(scores)) if targets[i]]
    return sum(precision) / len(precision) if precision else float('nan')


def perturbed(
    scores: Sequence[float],
    targets: Sequence[int],
    lambd: float,
    count: Optional[int] = None,
    weighting: Optional[str] = None,
) -> List[float]:
    """``y + λ g`` with g = n rk+ / (P rk²) for positives and 0 for negatives.

    Here and below, a count replaces P, the number of positives. With a weighting the
    loss is that of recall, and g = n w'(rk - rk+) / P.
    """
    n, num_pos = len(scores), count or sum(targets)
    rk, rkp = ranks(scores, targets), positive_ranks(scores, targets)

    def slope(i: int) -> float:
        if weighting is None:
            return rkp[i] / rk[i] ** 2
        above = rk[i] - rkp[i]
        return 1 / (1 + above) / (1 + log1p(above) if weighting == 'loglog' else 1)

    return [
        scores[i] + lambd * n * slope(i) / num_pos if targets[i] else scores[i]
        for i in range(n)
    ]


def weight(above: int, weighting: str) -> float:
    """``w`` of the number of negatives above a positive."""
    return log1p(above) if weighting == 'log' else log1p(log1p(above))


def loss(
    scores: Sequence[float],
    targets: Sequence[int],
    count: Optional[int],
    weighting: Optional[str] = None,
) -> float:
    """``1 - AP``, or the mean of ``w`` over the positives."""
    if weighting is None:
        found = 1 - average_precision(scores, targets)
    else:
        rk, rkp = ranks(scores, targets), positive_ranks(scores, targets)
        weights = [weight(a - b, weighting) for a, b, t in zip(rk, rkp, targets) if t]
        found = sum(weights) / len(weights)
    return found if count is None else found * sum(targets) / count


def ap_loss(
    scores: Sequence[float],
    targets: Sequence[int],
    lambd: float,
    count: Optional[int] = None,
    weighting: Optional[str] = None,
) -> Tuple[float, List[float]]:
    """The loss and its gradient by Algorithm 1, incoming gradient 1."""
    n = len(scores)
    if not any(targets):
        return 0.0, [0.0] * n
    before = ranks(scores, targets)
    after = ranks(perturbed(scores, targets, lambd, count, weighting), targets)
    gradient = [-(before[i] - after[i]) / (n * lambd) for i in range(n)]
    return loss(scores, targets, count, weighting), gradient


def rounding_decides(
    scores: Sequence[float],
    targets: Sequence[int],
    lambd: float,
    tol: float,
    together: bool = True,
    count: Optional[int] = None,
    weighting: Optional[str] = None,
) -> bool:
    """Whether two scores nearly tie after the perturbation, a positive among them.

    Of positives that move singly, each meets the others where they were.
    """
    if not any(targets):
        return False
    n = len(scores)
    after = (
        perturbed(scores, targets, lambd, count, weighting)
        if together
        else [s + lambd for s in scores]
    )
    others = after if together else scores
    for i in range(n):
        for j in range(n):
            gap = abs(after[i] - others[j])
            if i != j and targets[i] and gap <= tol * (1 + abs(after[i])):
                return True
    return False


def ap_loss_singly(
    scores: Sequence[float],
    targets: Sequence[int],
    lambd: float,
    count: Optional[int] = None,
    weighting: Optional[str] = None,
) -> Tuple[float, List[float]]:
    """The loss and the gradient where each positive is moved alone, by λ."""
    n, num_pos = len(scores), count or sum(targets)
    gradient = [0.0] * n
    if not any(targets):
        return 0.0, gradient
    rk, rkp = ranks(scores, targets), positive_ranks(scores, targets)
    negatives = [j for j in range(n) if not targets[j]]
    for i in range(n):
        if not targets[i]:
            continue
        moved = list(scores)
        moved[i] = scores[i] + lambd
        passed = [
            j
            for j in negatives
            if precedes(j, i, scores, targets)
            and (lambd == float('inf') or not precedes(j, i, moved, targets))
        ]
        if weighting is None:
            gain = rkp[i] / (rk[i] - len(passed)) - rkp[i] / rk[i]
        else:
            above = rk[i] - rkp[i]
            gain = weight(above, weighting) - weight(above - len(passed), weighting)
        gradient[i] -= gain / num_pos
        for j in passed:
            gradient[j] += gain / num_pos / len(passed)
    return loss(scores, targets, count, weighting), gradient
