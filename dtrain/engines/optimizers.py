"""How optimizers are built, and which of their tensors a checkpoint holds."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit, Lion, Lion8bit, PagedAdamW8bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers.optimization import Adafactor

from dtrain.config.methods.patterns import match_parameter
from dtrain.config.schema import Stage
from dtrain.models.decoder_layers import layer_matrices
from dtrain.models.expert_layers import expert_biases, whole_shape

LEARNING_RATE_SCALE = "learning_rate_scale"  # a key of our parameter groups
BY_MUON = "by_muon"  # the same: Muon updates the group's matrices
DONE = "done"  # the same: updates of schedule-free so far, and the sum of their squared rates

BETA1 = 0.9  # of schedule-free: the weights that train are this much of the average, the rest is z

ADAM_STATE = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
FACTORED_STATE = {name: name for name in ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")}
EIGHT_BIT_STATE = {name: f"bnb_{name}" for name in ("state1", "state2", "absmax1", "absmax2")}
MUON_STATE = {"momentum_buffer": "exp_avg"}
SCHEDULE_FREE_STATE = {"z": "z", "exp_avg_sq": "exp_avg_sq"}


class StackedMuon(Muon):
    """torch's Muon for matrices, and for stacks [E, o, h] of them, each matrix by itself."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        # Updates as large as AdamW's, so that one learning rate serves both.
        empty = [group | {"params": []} for group in groups]  # torch's takes no stack
        super().__init__(empty, lr=lr, adjust_lr_fn="match_rms_adamw")
        for group, given in zip(self.param_groups, groups, strict=True):
            group["params"] = given["params"]

    def _init_group(self, group: Any, *lists: list[Tensor]) -> bool:
        stacked: list[list[Tensor]] = [[] for _ in lists]  # parameters, gradients, momenta
        super()._init_group(group, *stacked)
        for views, tensors in zip(lists, stacked, strict=True):
            for tensor in tensors:
                views += tensor.unbind() if tensor.dim() == 3 else [tensor]
        return False


class MuonWithAdamW(Optimizer):
    """Muon for the matrices of groups with `by_muon`, AdamW for the other groups."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "fused": True})
        muon = [group for group in groups if group[BY_MUON]]
        others = [group for group in groups if not group[BY_MUON]]
        self.parts: list[Optimizer] = []
        if muon:
            self.parts.append(StackedMuon(muon, lr))
        if others:
            self.parts.append(AdamW(others, lr=lr, fused=True))
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for part in self.parts:
            part.step()


def _schedule_free(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    """AdamW of schedulefree (arXiv:2405.15682), which only this extra's users have."""
    library = import_module("schedulefree")
    optimizer: Any = library.AdamWScheduleFree(groups, lr=lr, betas=(BETA1, 0.999))
    optimizer.train()
    optimizer.register_step_pre_hook(_set_counters)
    return optimizer


def _set_counters(optimizer: Optimizer, *_: Any) -> None:
    """Set schedule-free's counters at each call, as ZeRO-3 calls it several times an update."""
    for group in optimizer.param_groups:
        group["k"], group["weight_sum"] = group[DONE]
        group["lr_max"] = -1.0  # the weight of an update is the square of its own rate


# optimizer → its class, and its state's names → the kinds of tensors in a checkpoint
_FACTORIES: dict[str, tuple[Any, dict[str, str]]] = {
    "adamw": (AdamW, ADAM_STATE),
    "adamw_8bit": (AdamW8bit, EIGHT_BIT_STATE),
    "paged_adamw_8bit": (PagedAdamW8bit, EIGHT_BIT_STATE),
    "lion": (partial(Lion, betas=(0.9, 0.99)), {"state1": "exp_avg"}),
    "lion_8bit": (Lion8bit, EIGHT_BIT_STATE),
    "adafactor": (
        partial(Adafactor, scale_parameter=False, relative_step=False),
        FACTORED_STATE,
    ),
    "muon": (MuonWithAdamW, ADAM_STATE | MUON_STATE),
    "schedule_free": (_schedule_free, SCHEDULE_FREE_STATE),
}


def build_optimizer(
    names: list[str], parameters: list[nn.Parameter], stage: Stage, model: nn.Module
) -> Optimizer:
    """The stage's optimizer over trainable parameters; weight decay on matrices only.

    Args:
        names: of the parameters in `model`; `learning_rate_scale` may differ between them.
        parameters: those that are updated, such as an engine's shards.
    """
    train = stage.train
    biases, matrices = expert_biases(model), set[str]()
    if train.optimizer == "muon":
        matrices = layer_matrices(model)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in zip(names, parameters, strict=True):
        is_matrix = len(whole_shape(parameter)) > 1 and name not in biases
        decays = is_matrix and stage.method.decays(name)
        weight_decay = train.weight_decay if decays else 0.0
        key = weight_decay, learning_rate_scale(name, stage), name in matrices
        groups.setdefault(key, []).append(parameter)
    # The fused kernel passes through memory once instead of ten times.
    can_fuse = train.optimizer == "adamw" and all(p.is_cpu or p.is_cuda for p in parameters)
    options = {"fused": True} if can_fuse else {}
    factory, _ = _FACTORIES[train.optimizer]
    optimizer: Optimizer = factory(
        [
            {
                "params": members,
                "weight_decay": weight_decay,
                LEARNING_RATE_SCALE: scale,
                BY_MUON: by_muon,
                DONE: (0, 0.0),
            }
            for (weight_decay, scale, by_muon), members in groups.items()
        ],
        lr=train.learning_rate,
        **options,
    )
    return optimizer


def learning_rate_scale(name: str, stage: Stage) -> float:
    """The factor of a parameter's learning rate: the method's times the recipe's."""
    scales = stage.train.learning_rate_scales
    pattern = match_parameter(scales, name)
    return stage.method.learning_rate_scale(name) * (scales[pattern] if pattern else 1.0)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group: this rate times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[LEARNING_RATE_SCALE]


def set_updates_done(optimizer: Optimizer, updates: int, rate_square_sum: float) -> None:
    """Set what schedule-free's average weighs the next update against.

    Args:
        rate_square_sum: of the learning rates of all updates, without a group's own factor.
    """
    for group in optimizer.param_groups:
        group[DONE] = updates, rate_square_sum * group[LEARNING_RATE_SCALE] ** 2


def average(training_weight: Tensor, z: Tensor) -> Tensor:
    """Schedule-free's average x of the weights, from y = β x + (1 - β) z (arXiv:2405.15682)."""
    return training_weight.lerp(z, 1 - 1 / BETA1)


def result_weight(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """The average of a parameter's weights; those that it has if it never had a gradient."""
    return average(parameter.detach(), _initialized_state(optimizer, parameter)["z"])


def with_average(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint in which the weight is the average, if the optimizer has one.

    The average alone would not do: computing the weights that train from it rounds.
    """
    if "z" not in tensors:
        return tensors
    training_weight = tensors["weight"]
    weight = average(training_weight, tensors["z"])
    return tensors | {"weight": weight, "training_weight": training_weight}


def state_tensors(optimizer: Optimizer, parameter: Tensor, stage: Stage) -> dict[str, Tensor]:
    """The optimizer's tensors of a parameter, by their kind in a checkpoint."""
    _, kinds = _FACTORIES[stage.train.optimizer]
    state = _initialized_state(optimizer, parameter)
    return {kind: state[name] for name, kind in kinds.items() if name in state}


def set_update_count(optimizer: Optimizer, parameter: Tensor, updates: int) -> None:
    """Set the number of updates that a parameter's state has seen."""
    state = _initialized_state(optimizer, parameter)
    if torch.is_tensor(state.get("step")):
        state["step"].fill_(updates)
    elif "step" in state:  # bitsandbytes and transformers count in an int
        state["step"] = updates


def _initialized_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The state of a parameter, initialized as in the first step if it is empty."""
    state: dict[str, Any] = optimizer.state[parameter]
    if state:
        return state
    if isinstance(optimizer, Lion):  # of float32; ZeRO-3 fills its groups only during a step
        state["step"], state["state1"] = 0, torch.zeros_like(parameter)
    elif isinstance(optimizer, Optimizer8bit):
        optimizer.init_state(_group_of(optimizer, parameter), parameter, 0, 0)
    elif isinstance(optimizer, Adafactor):
        shape, state["step"], state["RMS"] = parameter.shape, 0, 0
        if len(shape) > 1:
            state["exp_avg_sq_row"] = parameter.new_zeros(shape[:-1])
            state["exp_avg_sq_col"] = parameter.new_zeros(shape[:-2] + shape[-1:])
        else:
            state["exp_avg_sq"] = torch.zeros_like(parameter)
    elif isinstance(optimizer, MuonWithAdamW) and _group_of(optimizer, parameter)[BY_MUON]:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    elif "weight_lr_power" in optimizer.defaults:  # schedule-free
        state["z"], state["exp_avg_sq"] = parameter.detach().clone(), torch.zeros_like(parameter)
    else:
        # The fused kernel reads the counter on the parameter's device.
        device = parameter.device if optimizer.defaults.get("fused") else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for name in ADAM_STATE:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    groups: list[dict[str, Any]] = optimizer.param_groups
    return next(g for g in groups if any(p is parameter for p in g["params"]))
