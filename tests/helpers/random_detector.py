"""A detector that nobody has trained."""

import copy

import torch

from tools.analysis_tools import classifier


def random_state(cfg):
    """The parameters of a detector that nobody has trained."""
    torch.manual_seed(0)
    model = classifier.MODELS.build(copy.deepcopy(cfg.model))
    model.init_weights()
    state = model.state_dict()
    for name in classifier.find_classifier(model).layers:
        weight = state[f'{name}.weight']
        weight *= 0.3 / weight.std()  # so that scores differ
    return state
