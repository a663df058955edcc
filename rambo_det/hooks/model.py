"""What hooks look for in a runner's model."""

from typing import Any, Dict

from mmengine.model import is_model_wrapper

from ..losses import RaMBOLoss


def named_losses(runner: Any) -> Dict[str, RaMBOLoss]:
    """Return every ``RaMBOLoss`` of the model under its name in there."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RaMBOLoss)
    }
