"""The memory of a loss, and when a saved one may be used."""

import warnings
from collections import deque
from copy import deepcopy
from typing import Any, Deque, Dict, List, Optional, Tuple

from mmengine.dist import get_dist_info
from torch import Tensor, nn

from ..functional import Past


class ScoreMemory:
    """Scores, with their margin, and labels of the last steps, without gradient.

    A deep copy holds the same, but has nothing to save before it is filled itself:
    mmengine's averaged model (EMA) is a copy that never trains, whose state must have
    tensors of fixed shapes only.

    Args:
        length: How many steps are remembered at most.
        loss: What messages call the loss. Losses of embeddings keep these as scores.
    """

    def __init__(self, length: int, loss: str = 'RaMBOLoss') -> None:
        self.length, self.loss = length, loss
        self._steps: Deque[Past] = deque(maxlen=length)
        self._idle_copy = False
        self._shared = False

    def __len__(self) -> int:
        return len(self._steps)

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'ScoreMemory':
        copied = ScoreMemory(self.length, self.loss)
        copied._steps = deepcopy(self._steps, memo)
        copied._idle_copy, copied._shared = True, self._shared
        return copied

    @property
    def saved(self) -> bool:
        """Whether a ``state_dict`` holds the memory."""
        return bool(self._steps) and not self._idle_copy

    @property
    def labels(self) -> List[Tensor]:
        """The labels of each step, oldest first."""
        return [step.labels for step in self._steps]

    def append(self, step: Past, shared: bool = False) -> None:
        """Remember a step; ``shared`` tells that its rows are those of all processes.

        A full memory forgets the oldest step.
        """
        self._steps.append(step)
        self._idle_copy, self._shared = False, shared

    def recall(self, like: Tensor) -> List[Past]:
        """Return all steps, oldest first, moved to the device of present scores.

        A memory with another number of columns is emptied, with a warning.
        """
        if not self._steps:
            return []
        columns = self._steps[0].scores.size(1)
        if columns != like.size(1):
            warnings.warn(
                f'{self.loss}: the rows of the memory have {columns} columns, one for '
                f'each class or output, and those of this step {like.size(1)}; the '
                'memory, probably loaded from another model, was emptied',
                stacklevel=4,
            )
            self._steps.clear()
            return []
        self._steps = deque((step.to(like) for step in self._steps), self.length)
        return list(self._steps)

    def state(self) -> Dict[str, Any]:
        """Return tensors and plain values, the oldest step first."""
        scores = [step.scores for step in self._steps]
        state: Dict[str, Any] = dict(scores=scores, labels=self.labels)
        levels = [step.levels for step in self._steps]
        if any(of is not None for of in levels):
            state['levels'] = levels
        rank, processes = get_dist_info()
        if processes > 1 and not self._shared:  # each remembers its own images
            state.update(rank=rank, processes=processes)
        return state

    def load(self, state: Dict[str, Any]) -> None:
        """Replace the memory by the last steps of a saved one.

        The memory of another process is not used: this one is empty then, with a
        warning.

        Raises:
            ValueError: If :meth:`state` does not return such a state.
        """
        steps = _steps_of(state, self.loss)
        self._steps.clear()
        # A memory that names no process is right for any: it had the images of all.
        self._shared = 'processes' not in state
        rank, world = get_dist_info()
        saved_rank, before = state.get('rank', rank), state.get('processes', world)
        if before != world:
            reason = f'was saved by one of {before} processes and there are {world} now'
        elif saved_rank != rank:
            reason = f'is that of process {saved_rank}; ExactResumeHook saves all'
        else:
            self._steps.extend(Past(*step) for step in steps)
            return
        if steps and self.length:
            warnings.warn(
                f'{self.loss}: the memory in the checkpoint {reason}. It starts empty '
                f'in process {rank} and is full after {self.length} steps',
                stacklevel=4,
            )


class Remembering(nn.Module):
    """A loss with a memory, which its ``state_dict`` holds."""

    _memory: ScoreMemory
    _fills_memory: bool

    def get_extra_state(self) -> Dict[str, Any]:
        """Return the memory for the ``state_dict``, oldest step first."""
        return self._memory.state()

    def set_extra_state(self, state: Dict[str, Any]) -> None:
        """Restore the memory; only the last ``memory`` steps are kept."""
        self._memory.load(state if self._fills_memory else dict(scores=[], labels=[]))

    @property
    def remembered(self) -> Optional[ScoreMemory]:
        """The memory; ``None`` where the loss fills none."""
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


def _steps_of(
    state: Dict[str, Any], loss: str
) -> List[Tuple[Tensor, Tensor, Optional[Tensor]]]:
    """Return the steps of a saved memory, whose shapes are checked."""
    try:
        scores, labels = list(state['scores']), list(state['labels'])
        levels = list(state.get('levels', [None] * len(labels)))
        fits = len(scores) == len(labels) == len(levels) and all(
            s.dim() == 2
            and s.is_floating_point()
            and y.shape == s.shape[:1]
            and (at is None or at.shape == y.shape)
            for s, y, at in zip(scores, labels, levels)
        )
    except (AttributeError, KeyError, TypeError):
        fits = False
    if not fits:
        raise ValueError(
            f'{loss}: the memory in the checkpoint must be dict(scores=[(N, C) '
            'tensor per step], labels=[(N,) tensor per step]), got '
            f'{_describe(state)}; remove the keys that end in _extra_state from its '
            'state_dict to start with an empty memory'
        )
    return list(zip(scores, labels, levels))


def _describe(state: Any) -> str:
    """Describe what a state holds, without the numbers."""
    if isinstance(state, dict):
        inside = (f'{key}={_describe(value)}' for key, value in state.items())
        return f'dict({", ".join(inside)})'
    if isinstance(state, (list, tuple)):
        return f'[{", ".join(_describe(value) for value in state)}]'
    return f'tensor {tuple(state.shape)}' if isinstance(state, Tensor) else repr(state)
