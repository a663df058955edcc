"""The score memory of RaMBOLoss, and when a saved one may be used."""

import warnings
from collections import deque
from typing import Any, Deque, Dict, List, Optional, Tuple

import torch
from mmengine.dist import get_dist_info
from torch import Tensor


class ScoreMemory:
    """Scores and labels of the last steps, without gradient.

    A deep copy keeps what it holds, but has nothing to save until it is filled
    itself: mmengine averages models (EMA) by walking through the state of a copy that
    never trains, and expects only tensors of fixed shape there.

    Args:
        length: How many steps are remembered; 0 for none.
    """

    def __init__(self, length: int) -> None:
        self._steps: Deque[Tuple[Tensor, Tensor]] = deque(maxlen=length)
        self._idle_copy = False
        self._shared = False

    def __len__(self) -> int:
        return len(self._steps)

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'ScoreMemory':
        copied = ScoreMemory(self.length)
        copied._steps.extend((s.clone(), labels.clone()) for s, labels in self._steps)
        copied._idle_copy, copied._shared = True, self._shared
        return copied

    @property
    def length(self) -> int:
        """How many steps are remembered at most."""
        return self._steps.maxlen or 0

    @property
    def saved(self) -> bool:
        """Whether a ``state_dict`` holds the memory."""
        return bool(self._steps) and not self._idle_copy

    @property
    def labels(self) -> List[Tensor]:
        """The labels of each step, oldest first."""
        return [labels for _, labels in self._steps]

    def append(self, scores: Tensor, labels: Tensor, shared: bool = False) -> None:
        """Remember a step; the oldest one is forgotten where the memory is full.

        Args:
            scores: (N, C) scores.
            labels: (N,) labels.
            shared: Whether they are those of all processes, the same in each.
        """
        self._steps.append((scores, labels))
        self._idle_copy, self._shared = False, shared

    def recall(self, like: Tensor) -> Optional[Tuple[Tensor, Tensor]]:
        """Return the remembered scores and labels, or ``None`` if there are none.

        A memory with another number of classes is emptied, with a warning.

        Args:
            like: The scores of the present step (N, C). A memory that was loaded may
                be on another device.
        """
        if self._steps and self._steps[0][0].size(1) != like.size(1):
            warnings.warn(
                'RaMBOLoss: the memory holds scores of '
                f'{self._steps[0][0].size(1)} classes and pred has {like.size(1)}; '
                'the memory, probably loaded from another model, was emptied',
                stacklevel=4,
            )
            self._steps.clear()
        if not self._steps:
            return None
        scores = torch.cat([scores.to(like) for scores, _ in self._steps])
        labels = torch.cat([labels.to(like.device) for _, labels in self._steps])
        return scores, labels

    def state(self) -> Dict[str, Any]:
        """Return tensors and plain values, the oldest step first."""
        state: Dict[str, Any] = dict(
            scores=[scores for scores, _ in self._steps],
            labels=[labels for _, labels in self._steps],
        )
        rank, processes = get_dist_info()
        if processes > 1 and not self._shared:  # each remembers its own images
            state.update(rank=rank, processes=processes)
        return state

    def load(self, state: Dict[str, Any]) -> None:
        """Replace the memory by a saved one; only the last steps are kept.

        What another process remembers is of no use here: the memory is left empty,
        with a warning, and fills again.

        Raises:
            ValueError: If the state is none that :meth:`state` returns.
        """
        steps = _steps_of(state)
        self._steps.clear()
        rank, processes = get_dist_info()
        # Where it does not say, it is right for any process: one had all the images.
        self._shared = 'processes' not in state
        before = state.get('processes', processes)
        if not (steps and self.length):
            return
        if before != processes or state.get('rank', rank) != rank:
            reason = (
                f'was saved by one of {before} processes and there are {processes} now'
                if before != processes
                else f'is that of process {state["rank"]}; ExactResumeHook '
                'saves those of all processes'
            )
            warnings.warn(
                f'RaMBOLoss: the memory in the checkpoint {reason}. It starts empty '
                f'in process {rank} and is full after {self.length} steps',
                stacklevel=4,
            )
            return
        self._steps.extend(steps)


def _steps_of(state: Dict[str, Any]) -> List[Tuple[Tensor, Tensor]]:
    """Return the steps of a saved memory after checking their shapes."""
    try:
        scores, labels = list(state['scores']), list(state['labels'])
        fits = len(scores) == len(labels) and all(
            s.dim() == 2 and s.is_floating_point() and y.shape == s.shape[:1]
            for s, y in zip(scores, labels)
        )
    except (AttributeError, KeyError, TypeError):
        fits = False
    if not fits:
        raise ValueError(
            'RaMBOLoss: the memory in the checkpoint must be dict(scores=[(N, C) '
            'tensor per step], labels=[(N,) tensor per step]), got '
            f'{_describe(state)}; remove the keys that end in _extra_state from its '
            'state_dict to start with an empty memory'
        )
    return list(zip(scores, labels))


def _describe(state: Any) -> str:
    """Write what a state holds, without the numbers."""
    if isinstance(state, dict):
        inside = (f'{key}={_describe(value)}' for key, value in state.items())
        return f'dict({", ".join(inside)})'
    if isinstance(state, (list, tuple)):
        return f'[{", ".join(_describe(value) for value in state)}]'
    return f'tensor {tuple(state.shape)}' if isinstance(state, Tensor) else repr(state)
