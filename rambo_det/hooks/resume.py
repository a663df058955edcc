"""Exact resuming: the states that mmengine leaves out of a checkpoint."""

import random
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop
from torch import Tensor

from ..losses import Remembering
from .model import bare_model, checkpoint_is_due, choose_checkpoint, named_modules
from .progress import Validations, waiting_gradients

KEY = 'exact_resume'
# What a runner calls the parts of a checkpoint.
_ATTRIBUTES = dict(optimizer='optim_wrapper', param_schedulers='param_schedulers')


def random_state() -> Dict[str, Any]:
    """Return the state of the global random generators, in tensors and plain values.

    They are those of Python, NumPy, PyTorch and the current GPU.
    """
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = numpy
    state: Dict[str, Any] = dict(
        python=dict(version=version, words=torch.tensor(words), gauss=gauss),
        numpy=dict(position=position, has_gauss=has_gauss, cached=cached),
        torch=torch.get_rng_state(),
    )
    state['numpy']['keys'] = torch.from_numpy(keys.astype(np.int64))
    if torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned, wherever its tensors now are."""
    python, numpy = state['python'], state['numpy']
    words = tuple(python['words'].tolist())
    random.setstate((python['version'], words, python['gauss']))
    keys = numpy['keys'].cpu().numpy().astype(np.uint32)
    if keys.shape != (624,) or not 0 <= numpy['position'] <= 624:
        # NumPy would read beyond them.
        raise ValueError(
            'the checkpoint has a state of NumPy with 624 keys and a position among '
            f'them, got {keys.shape} and {numpy["position"]!r}; it is damaged'
        )
    np.random.set_state(
        ('MT19937', keys, numpy['position'], numpy['has_gauss'], numpy['cached'])
    )
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state['cuda'].cpu())


class _AfterSkipping:
    """Calls a function between the batches that are skipped and those trained on.

    mmengine asks for each batch that it skips, its fork calls ``skip_iter``.
    """

    def __init__(self, batches: Any, iteration: int, then: Callable[[], None]) -> None:
        self._batches, self._then = batches, then
        self._skipped = 0 if hasattr(batches, 'skip_iter') else iteration

    def skip_iter(self, number: int) -> None:
        self._batches.skip_iter(number)

    def __next__(self) -> Any:
        if self._skipped == 0:
            self._then()
        self._skipped -= 1
        return next(self._batches)


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Let a resumed training go on as if it had never been interrupted.

    A checkpoint of mmengine has the weights, the optimizer, the schedules and the score
    memory of the first process' :class:`~rambo_det.losses.RaMBOLoss`. This hook adds
    the random states of Python, NumPy, PyTorch and the GPU, the seed that shuffles the
    data, the memories of the other processes, the gradients that wait for an update
    (``accumulative_counts``), and the state of ``EarlyStoppingHook``. It also keeps the
    validation from changing the random states. If the training stopped between a
    checkpoint and its validation, and anything depends on that (the best checkpoint,
    early stopping, a schedule such as ``ReduceOnPlateauLR``), the resumed training
    validates first.

    A training with deterministic operations then ends with the same weights, bit for
    bit, if it is resumed from a checkpoint between epochs (or, with
    ``IterBasedTrainLoop``, between any iterations). Data have to be loaded in the
    process itself (``num_workers=0``) or by workers that start anew in each epoch
    (``persistent_workers=False``).

    ``load_from`` without ``resume`` starts another training: nothing is restored, and
    the score memory is left empty.

    Raises:
        ValueError: If the file does not fit the model.

    Example:
        In a config::

            custom_hooks = [dict(type='ExactResumeHook')]
    """

    # Before other hooks draw numbers for the coming epoch.
    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._restored: Optional[Dict[str, Any]] = None
        self._before_validation: Dict[str, Any] = {}
        self._gathered: Tuple[int, List[Any]] = (-1, [])
        self._gradients: Dict[str, Tensor] = {}
        self._validations = Validations()
        self._reached: Optional[Dict[str, Any]] = None

    # Saving

    def _own_state(self, runner: Any) -> Dict[str, Any]:
        """Return what only this process has."""
        memories = {}
        for name, loss in named_modules(runner, Remembering).items():
            memory = loss.get_extra_state()
            if 'rank' in memory:  # else all have the one in the state_dict
                for key in ('scores', 'labels'):
                    memory[key] = [tensor.cpu() for tensor in memory[key]]
                memories[name] = memory
        gradients = waiting_gradients(runner)
        return dict(random=random_state(), memory=memories, gradients=gradients)

    def _gather(self, runner: Any) -> None:
        """Collect the states of all processes, since only the first one saves."""
        if get_world_size() > 1:
            self._gathered = runner.iter, all_gather_object(self._own_state(runner))

    def after_train_epoch(self, runner: Any) -> None:
        """Collect what a checkpoint after this epoch holds."""
        self._gather(runner)

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Collect what a checkpoint after this iteration holds, if one follows."""
        if checkpoint_is_due(runner):
            self._gather(runner)

    def before_val_epoch(self, runner: Any) -> None:
        """Keep the random states, and collect for a checkpoint of the best model."""
        self._before_validation = random_state()
        self._gather(runner)

    def after_val_epoch(self, runner: Any, metrics: Optional[Any] = None) -> None:
        """Restore the random states that the validation has changed."""
        set_random_state(self._before_validation)
        self._validations.begin(runner, metrics or {})

    def after_val(self, *_: Any) -> None:
        """Note that all hooks have seen the metrics."""
        self._validations.end()

    def before_save_checkpoint(self, runner: Any, checkpoint: Dict[str, Any]) -> None:
        """Add the states."""
        gathered_at, states = self._gathered
        if get_world_size() == 1 or gathered_at != runner.iter:
            states = [self._own_state(runner)]
        seed = getattr(_seeded_sampler(runner), 'seed', None)
        checkpoint[KEY] = dict(
            processes=get_world_size(),
            states=states,
            sampler_seed=seed,
            validation=self._validations.state(runner),
        )

    # Resuming

    def before_run(self, runner: Any) -> None:
        """Choose the file to resume from."""
        choose_checkpoint(runner)
        if not any(isinstance(hook, _CatchUp) for hook in runner.hooks):
            runner.register_hook(_CatchUp(self))

    def after_load_checkpoint(self, runner: Any, checkpoint: Dict[str, Any]) -> None:
        """Check the weights, and take the states out for the first epoch."""
        memories = [
            f'{name}._extra_state' for name in named_modules(runner, Remembering)
        ]
        if not runner._resume:
            for key in memories:
                checkpoint.get('state_dict', checkpoint).pop(key, None)
            return
        _check_weights(runner, checkpoint['state_dict'], memories)
        saved: Dict[str, Any] = checkpoint.get(KEY, {})
        self._reached = saved.get('validation')
        for part in ('optimizer', 'param_schedulers'):
            if part not in checkpoint and getattr(runner, _ATTRIBUTES[part]):
                runner.logger.warning(
                    f'{type(self).__name__}: the checkpoint has no {part}, whose '
                    'states begin anew'
                )
        processes = get_world_size()
        problem = None
        if not saved:
            problem = 'it was saved without this hook'
        elif saved['processes'] != processes:
            problem = f'it has {saved["processes"]} processes and this is {processes}'
        elif len(saved['states']) != processes:
            problem = (
                f'it has the state of only {len(saved["states"])} of {processes} '
                'processes, as no CheckpointHook saved it'
            )
        if problem is not None:
            runner.logger.warning(
                f'{type(self).__name__}: this training will not go on exactly as the '
                f'one in the checkpoint: {problem}. Random numbers start anew'
            )
            return
        own = saved['states'][get_rank()]
        for name, memory in own['memory'].items():
            checkpoint['state_dict'][f'{name}._extra_state'] = memory
        self._restored = own['random']
        self._gradients = own.get('gradients', {})
        sampler = _seeded_sampler(runner)
        if sampler is not None and saved['sampler_seed'] is not None:
            sampler.seed = saved['sampler_seed']

    def before_train(self, runner: Any) -> None:
        """Restore gradients; warn of what keeps this from being resumed exactly."""
        parameters = dict(bare_model(runner).named_parameters())
        for name, gradient in self._gradients.items():
            parameters[name].grad = gradient.to(parameters[name]).clone()
        self._gradients = {}
        loader = runner.train_loop.dataloader
        if loader.num_workers and loader.persistent_workers:
            runner.logger.warning(
                f'{type(self).__name__}: the workers that load the data keep random '
                'states of their own, which no checkpoint holds, from epoch to epoch. '
                'For exact resuming set persistent_workers=False or num_workers=0 in '
                'train_dataloader'
            )
        by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        if self._restored is not None and by_epoch and runner.iter % len(loader):
            runner.logger.warning(
                f'{type(self).__name__}: the checkpoint was saved at iteration '
                f'{runner.iter}, within an epoch of {len(loader)}, which mmengine '
                'starts from its beginning. For exact resuming save by epoch'
            )

    def catch_up(self, runner: Any) -> None:
        """Do what was left of the validation after the checkpoint."""
        reached, self._reached = self._reached, None
        if reached is not None:
            if self._restored is not None:
                # The validation may save them, with the best checkpoint.
                set_random_state(self._restored)
            problem = self._validations.catch_up(runner, reached)
            if problem is not None:
                name = type(self).__name__
                runner.logger.warning(f'{name}: not restored: {problem}')

    def before_train_epoch(self, runner: Any) -> None:
        """Restore the random states, once."""
        if self._restored is None:
            return
        restore = partial(set_random_state, self._restored)
        self._restored = None
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            # It now loads, and skips, what was already trained on.
            loop.dataloader_iterator = _AfterSkipping(
                loop.dataloader_iterator, loop.iter, restore
            )
        else:
            restore()


class _CatchUp(Hook):
    """Calls the hook again when all others are ready for the training."""

    priority = 'LOWEST'

    def __init__(self, hook: ExactResumeHook) -> None:
        self._hook = hook

    def before_train(self, runner: Any) -> None:
        self._hook.catch_up(runner)


def _seeded_sampler(runner: Any) -> Optional[Any]:
    """Return the sampler of the training data that has a seed, if one has."""
    loader = runner.train_loop.dataloader
    for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
        if isinstance(getattr(sampler, 'seed', None), int):
            return sampler
    return None


def _check_weights(runner: Any, saved: Dict[str, Any], memories: List[str]) -> None:
    """Raise unless a checkpoint has all weights of the model in the same shapes."""
    wrong = []
    for key, value in bare_model(runner).state_dict().items():
        if key in memories or not isinstance(value, Tensor):
            continue
        found = saved.get(key, saved.get(f'module.{key}'))
        if not isinstance(found, Tensor):
            wrong.append(f'{key} is missing')
        elif found.shape != value.shape:
            wrong.append(
                f'{key} has shape {tuple(found.shape)} and the model needs '
                f'{tuple(value.shape)}'
            )
    if wrong:
        more = f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''
        raise ValueError(
            'ExactResumeHook: the checkpoint does not fit the model, and mmengine '
            f'would go on with initial weights there: {"; ".join(wrong[:5])}{more}. '
            'Check num_classes. To start another training from it, use load_from '
            'without resume'
        )
