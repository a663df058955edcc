"""Checkpoints that are written atomically."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Tuple, Union

from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook

_BACKEND = 'rambo_det_whole_files'


class _WholeFiles(LocalBackend):
    """Writes files atomically, and removes files only when it is told to."""

    def __init__(self) -> None:
        self.removed: List[Tuple[str, int]] = []

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + '.unfinished')
        try:
            with open(unfinished, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def remove(self, filepath: str) -> None:
        self.removed.append((filepath, os.stat(filepath).st_ino))

    def remove_now(self) -> None:
        for path, inode in self.removed:
            if os.stat(path).st_ino == inode:  # else it has been written anew
                os.remove(path)
        self.removed.clear()


register_backend(_BACKEND, _WholeFiles, force=True)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, which writes checkpoints atomically.

    mmengine writes files in place, and with ``max_keep_ckpts`` it deletes the oldest
    checkpoint before it writes the new one. If writing fails, there may be nothing left
    to resume from. This hook writes a checkpoint under another name, renames it when it
    is complete, and only then deletes older ones. If writing fails, ``last_checkpoint``
    names the previous one. It needs room for one more checkpoint.

    Arguments are those of ``CheckpointHook``, for local files only.

    Raises:
        ValueError: If ``backend_args`` or ``file_client_args`` are given.

    Example:
        In a config::

            default_hooks = dict(
                checkpoint=dict(type='SafeCheckpointHook', interval=1, max_keep_ckpts=1)
            )
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ('backend_args', 'file_client_args'):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f'{type(self).__name__}: {name} must be None, as checkpoints are '
                    f"written to local files, got {kwargs[name]!r}; use mmengine's "
                    'CheckpointHook for other storage'
                )
        kwargs['backend_args'] = dict(backend=_BACKEND)
        super().__init__(*args, **kwargs)

    @contextmanager
    def _nothing_lost(self, runner: Any) -> Iterator[None]:
        """Remove files when saving has succeeded; undo ``last_checkpoint`` else."""
        if not is_main_process():  # the others neither save nor remove
            yield
            return
        pointer = Path(runner.work_dir, 'last_checkpoint')
        spare = pointer.with_name(pointer.name + '.previous')
        if pointer.exists():
            shutil.copy(str(pointer), str(spare))
        try:
            yield
        except BaseException:
            if spare.exists():
                os.replace(spare, pointer)  # takes no room, unlike writing it again
            self.file_backend.removed.clear()
            raise
        spare.unlink(missing_ok=True)
        self.file_backend.remove_now()

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: Any) -> None:
        with self._nothing_lost(runner):
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Any, metrics: Any) -> None:
        with self._nothing_lost(runner):
            super()._save_best_checkpoint(runner, metrics)
