"""Models without weights: built on the meta device, and analyzed for what a text uses."""

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


def build_meta_model(
    config: PretrainedConfig, trust_remote_code: bool = False, attention: str | None = "eager"
) -> PreTrainedModel:
    """Build the model of a config with parameters and buffers on the meta device.

    Args:
        attention: attention implementation; None for transformers' default.

    Raises:
        UserError: it cannot be built, or needs code that is not allowed.
    """
    config = deepcopy(config)  # building writes dtype and attention into the config
    config.__dict__.pop("quantization_config", None)
    implementation = {"attn_implementation": attention} if attention else {}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, **implementation
            )
    except Exception as error:  # architectures check their configs in many ways
        raise UserError(
            f"the model cannot be built: {first_line(error)}",
            where=f"config.json of {config._name_or_path or config.model_type}",
            fix="correct its config, or choose a base that this version of transformers builds",
        ) from error


def build_without_parameters(
    config: PretrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    kept_elements: int = 0,
) -> PreTrainedModel:
    """Build the model of a config with real buffers, but parameters on the meta device.

    Args:
        config: becomes the model's own.
        kept_elements: parameters of at most this many elements are built and initialized too.
    """
    with _parameters_on_meta(kept_elements):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model


@contextmanager
def _parameters_on_meta(kept_elements: int) -> Iterator[None]:
    """Move each parameter to the meta device when a module registers it, so that few exist at once.

    A tied parameter, which another module registers again, is moved only once.
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
    """The first line of an error's message; its class name if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def unused_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that the logits of a text do not depend on, such as image towers.

    Found in the autograd graph of a forward pass, independently of names.

    Args:
        model: from `build_meta_model`.

    Returns:
        An empty set if the forward pass needs values.
    """
    used = _used(model)
    if used is None:
        return set()
    return {name for name, parameter in model.named_parameters() if parameter not in used}


def unused_linear_layers(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers that a forward pass of a text does not call.

    An adapter there would get no gradient, and an NF4 weight would be read as numbers: Gemma 3n
    reads the weight of one of its layers without calling it.

    Args and return value: as for `unused_parameters`.
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


def layers_read_outside_forward(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers whose weight other code of the model reads or changes.

    That code would take the bits of a packed weight for numbers: Gemma 3n clamps one, RWKV divides
    some in evaluation mode.

    Args:
        model: from `build_meta_model`.

    Returns:
        Those found until the forward pass needed values, in training and in evaluation mode.
    """
    layers = linear_layers(model)
    reads = WeightReadRecorder({layer.get_parameter("weight"): layer for layer in layers.values()})
    hooks = [
        hook
        for layer in layers.values()
        for hook in (
            layer.register_forward_pre_hook(lambda module, _: reads.running.add(module)),
            layer.register_forward_hook(lambda module, *_: reads.running.discard(module)),
        )
    ]
    for training in (False, True):
        model.train(training)
        reads.running.clear()
        with suppress(Exception), reads, MetaValueDefaults(), torch.no_grad():  # as in `_used`
            _forward(model)
    for hook in hooks:
        hook.remove()
    return {name for name, layer in layers.items() if layer in reads.read}


class WeightReadRecorder(TorchFunctionMode):
    """Records the weights that are used outside their own layer's forward.

    Attributes:
        running: layers whose forward is running.
        read: layers whose weight was used while their forward was not running.
    """

    METADATA: ClassVar[set[Any]] = {  # correct for a packed weight too
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
        self.running: set[nn.Module] = set()
        self.read: set[nn.Module] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in self.METADATA:
            for value in (*args, *(kwargs or {}).values()):
                owner = self._owners.get(value) if isinstance(value, nn.Parameter) else None
                if owner is not None and owner not in self.running:
                    self.read.add(owner)
        return func(*args, **(kwargs or {}))


def _used(model: PreTrainedModel) -> set[Tensor] | None:
    """The parameters that the logits depend on; None if the forward pass needs values."""
    try:
        with MetaValueDefaults(), torch.enable_grad():
            logits = _forward(model.requires_grad_(True))
    except Exception:  # a model's code may raise anything on tensors without values
        return None
    return _leaves(logits)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of a model by name, including quantized and GPT-2's transposed ones."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def _forward(model: PreTrainedModel) -> Tensor:
    input_ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


class MetaValueDefaults(TorchFunctionMode):
    """Returns a default where a model reads a value from a meta tensor."""

    DEFAULTS: ClassVar[dict[Any, Any]] = {
        torch.Tensor.__bool__: True,
        torch.Tensor.__int__: 1,
        torch.Tensor.__index__: 1,
        torch.Tensor.__float__: 1.0,
        torch.Tensor.item: 1,
    }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self.DEFAULTS and args[0].is_meta:
            return self.DEFAULTS[func]
        return func(*args, **(kwargs or {}))


def _leaves(output: Tensor) -> set[Tensor]:
    """The leaf tensors that the gradient of an output reaches."""
    leaves, seen, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        todo.extend(following for following, _ in node.next_functions)
    return leaves
