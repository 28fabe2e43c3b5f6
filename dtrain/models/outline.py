"""Models without storage: built here, and asked what they use and whether they have experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dtrain.core.errors import UserError

TOKENS = 8


def outline(
    config: PretrainedConfig, trust_remote_code: bool = False, attention: str | None = "eager"
) -> PreTrainedModel:
    """The model that a config describes, parameters and buffers on the meta device.

    Args:
        attention: None for the one that transformers chooses.

    Raises:
        UserError: it cannot be built, or needs code that is not allowed.
    """
    own = deepcopy(config)  # building it writes dtype and attention into its config
    own.__dict__.pop("quantization_config", None)
    chosen = {"attn_implementation": attention} if attention else {}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                own, trust_remote_code=trust_remote_code, **chosen
            )
    except Exception as error:  # each architecture checks its config in its own way
        raise UserError(
            f"the model cannot be built: {first_line(error)}",
            where=f"config.json of {config._name_or_path or config.model_type}",
            fix="correct its config, or choose a base that this version of transformers builds",
        ) from error


def without_weights(
    config: PretrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    kept_elements: int = 0,
) -> PreTrainedModel:
    """The model that a config describes: its buffers with their values, its parameters without.

    Args:
        config: the model keeps it.
        kept_elements: parameters of at most so many are built as the model's code does; the others
            are on the meta device.
    """
    with _parameters_on_meta(kept_elements):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model


@contextmanager
def _parameters_on_meta(kept_elements: int) -> Iterator[None]:
    """Move each parameter to the meta device as a module registers it, so that few exist at once.

    A module may register the parameter of another one, which ties the two: that one is moved once.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.numel() > kept_elements and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def first_line(error: Exception) -> str:
    """What an error says, in one line; its class if it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def check_dense(model: PreTrainedModel, where: str) -> None:
    """Refuse a mixture of experts.

    Its experts are one tensor of three dimensions, no linear layers: bitsandbytes leaves them as
    they are, a merge has no place for their adapters, and nothing balances their load.

    Args:
        model: from `outline`; its config may name experts that no layer of it has.

    Raises:
        UserError: one of its layers counts experts.
    """
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) and _counts_experts(module):
            raise UserError(
                f"{model.config.model_type!r} is a mixture of experts ({name}); dtrain trains "
                "dense models",
                where=where,
                fix="choose a dense model: llama, mistral, qwen3, ...",
            )


def _counts_experts(module: nn.Module) -> bool:
    return any("expert" in key and type(value) is int for key, value in vars(module).items())


def unused_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that no text passes through: image towers, cross attention.

    Read from the autograd graph of a forward pass, so that nothing depends on names.

    Args:
        model: from `outline`.

    Returns:
        An empty set where the forward pass does not run without values.
    """
    used = _used(model)
    if used is None:
        return set()
    return {name for name, parameter in model.named_parameters() if parameter not in used}


def unused_layers(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers that compute nothing of a text.

    An adapter there would get no gradient, and NF4 be read as numbers: Gemma 3n takes the weight of
    one of its layers without calling it.

    Args and return: as for `unused_parameters`.
    """
    layers, called = linear_layers(model), set[nn.Module]()
    hooks = [
        layer.register_forward_pre_hook(lambda module, _: called.add(module))
        for layer in layers.values()
    ]
    used = _used(model)
    for hook in hooks:
        hook.remove()
    if used is None:
        return set()
    return {n for n, layer in layers.items() if layer not in called or layer.weight not in used}


def layers_read_by_others(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers whose weight the model's code reads or changes by itself.

    It then takes the bits of a packed weight for numbers: Gemma 3n clamps one, RWKV divides some
    when it is evaluated.

    Args:
        model: from `outline`.

    Returns:
        What was seen until the forward pass asked for values, in training and in evaluation.
    """
    layers = linear_layers(model)
    reads = Reads({layer.get_parameter("weight"): layer for layer in layers.values()})
    hooks = [
        hook
        for layer in layers.values()
        for hook in (
            layer.register_forward_pre_hook(lambda module, _: reads.open.add(module)),
            layer.register_forward_hook(lambda module, *_: reads.open.discard(module)),
        )
    ]
    for training in (False, True):
        model.train(training)
        reads.open.clear()
        with suppress(Exception), reads, Undecided(), torch.no_grad():  # as in `_used`
            _forward(model)
    for hook in hooks:
        hook.remove()
    return {name for name, layer in layers.items() if layer in reads.found}


class Reads(TorchFunctionMode):
    """Notes whose weight is used while its own layer is not computing.

    Attributes:
        open: layers that are computing.
        found: layers whose weight something else used.
    """

    ABOUT: ClassVar[set[Any]] = {  # as true of a packed weight
        torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
        torch.Tensor.device.__get__,
        torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
        torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        torch.Tensor.is_meta.__get__,  # type: ignore[attr-defined]
        torch.Tensor.size,
        torch.Tensor.dim,
    }

    def __init__(self, owners: dict[Tensor, nn.Module]) -> None:
        super().__init__()
        self._owners = owners
        self.open: set[nn.Module] = set()
        self.found: set[nn.Module] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in self.ABOUT:
            for value in (*args, *(kwargs or {}).values()):
                owner = self._owners.get(value) if isinstance(value, nn.Parameter) else None
                if owner is not None and owner not in self.open:
                    self.found.add(owner)
        return func(*args, **(kwargs or {}))


def _used(model: PreTrainedModel) -> set[Tensor] | None:
    """The parameters that the logits depend on; None where the forward pass needs values."""
    try:
        with Undecided(), torch.enable_grad():
            logits = _forward(model.requires_grad_(True))
    except Exception:  # code of any model, on tensors without values
        return None
    return _leaves(logits)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of a model by name, quantised ones and GPT-2's transposed ones too."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def _forward(model: PreTrainedModel) -> Tensor:
    input_ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


class Undecided(TorchFunctionMode):
    """Answers what a model asks of values that a meta tensor does not have."""

    ANSWERS: ClassVar[dict[Any, Any]] = {
        torch.Tensor.__bool__: True,
        torch.Tensor.__int__: 1,
        torch.Tensor.__index__: 1,
        torch.Tensor.__float__: 1.0,
        torch.Tensor.item: 1,
    }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self.ANSWERS and args[0].is_meta:
            return self.ANSWERS[func]
        return func(*args, **(kwargs or {}))


def _leaves(output: Tensor) -> set[Tensor]:
    """The leaf tensors that an output's gradient reaches."""
    found, seen, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        todo.extend(following for following, _ in node.next_functions)
    return found
