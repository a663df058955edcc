"""Checkpoints that are written atomically."""

import os
import os.path as osp
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple, Union

from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook

from ..checkpoint import UNFINISHED, write_whole
from .model import checkpoint_folder, choose_checkpoint

_KEY = 'replaced_checkpoints'
_BACKEND = 'rambo_det_whole_files'


class _WholeFiles(LocalBackend):
    """Writes files atomically, and removes files only when it is told to."""

    def __init__(self) -> None:
        self.removed: List[Tuple[str, int]] = []

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        write_whole(Path(filepath), obj)

    def remove(self, filepath: str) -> None:
        self.removed.append((filepath, os.stat(filepath).st_ino))

    def remove_now(self, folder: Path) -> None:
        for path, inode in self.removed:
            # A checkpoint says which file was the best one: that of another training,
            # or any file, where it comes from elsewhere.
            ours = osp.realpath(osp.dirname(path)) == osp.realpath(folder)
            if ours and os.stat(path).st_ino == inode:  # else it has been written anew
                os.remove(path)
        self.removed.clear()


register_backend(_BACKEND, _WholeFiles, force=True)


class _Elsewhere:
    """A runner that has another work folder."""

    def __init__(self, runner: Any, work_dir: Path) -> None:
        self._runner, self.work_dir = runner, str(work_dir)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


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

    def before_run(self, runner: Any) -> None:
        """Choose the file to resume from, and remove what killed savings left."""
        choose_checkpoint(runner)
        self._folder = checkpoint_folder(self, runner)
        if is_main_process():
            shutil.rmtree(Path(runner.work_dir, UNFINISHED), ignore_errors=True)
            for folder in {self._folder, Path(runner.work_dir)}:
                for path in folder.glob(f'*{UNFINISHED}'):
                    path.unlink()

    def before_train(self, runner: Any) -> None:
        """Go on with what a resumed training had saved last."""
        super().before_train(runner)
        if runner._resume:  # else saving the best one leaves that as it is
            self.last_ckpt = runner.message_hub.runtime_info.get('last_ckpt')

    def before_save_checkpoint(self, runner: Any, checkpoint: Dict[str, Any]) -> None:
        """Note which files this one replaces, should their removal be interrupted."""
        checkpoint[_KEY] = [Path(path).name for path, _ in self.file_backend.removed]

    def after_load_checkpoint(self, runner: Any, checkpoint: Dict[str, Any]) -> None:
        """Remove what the checkpoint has replaced, if it was saved here."""
        last = checkpoint.get('message_hub', {}).get('runtime_info', {})
        here = osp.dirname(str(last.get('last_ckpt'))) == str(self._folder)
        if runner._resume and here and is_main_process():
            for name in map(str, checkpoint.get(_KEY, [])):
                if name.endswith('.pth') and name == osp.basename(name):
                    (self._folder / name).unlink(missing_ok=True)

    def _then_remove(self, runner: Any, save: Callable[..., None], *args: Any) -> None:
        """Remove older files when saving has succeeded."""
        # The others neither save nor remove; saving the best one saves another.
        if not is_main_process() or isinstance(runner, _Elsewhere):
            save(runner, *args)
            return
        # mmengine writes ``last_checkpoint`` in place, so let it do so elsewhere.
        folder = Path(runner.work_dir, UNFINISHED)
        folder.mkdir(exist_ok=True)
        try:
            save(_Elsewhere(runner, folder), *args)
            pointer = folder / 'last_checkpoint'
            if pointer.exists():
                write_whole(Path(runner.work_dir, pointer.name), pointer.read_bytes())
        except BaseException:
            self.file_backend.removed.clear()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.file_backend.remove_now(self._folder)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: Any) -> None:
        save = super()._save_checkpoint_with_step
        self._then_remove(runner, save, step, meta)

    def _save_best_checkpoint(self, runner: Any, metrics: Any) -> None:
        self._then_remove(runner, super()._save_best_checkpoint, metrics)
