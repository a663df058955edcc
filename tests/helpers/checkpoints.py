"""Load what mmengine has saved, as safely as its own loader does."""

import torch

from rambo_det.checkpoint import allow_mmengine_checkpoints


def load_checkpoint(path):
    # Once more: where the fork of mmengine loads a checkpoint, it afterwards forbids
    # for the whole process the classes that it allowed itself.
    allow_mmengine_checkpoints()
    return torch.load(path, weights_only=True)
