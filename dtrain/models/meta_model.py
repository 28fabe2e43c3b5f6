"""Models without weights: built on the meta device, and analyzed for what a text uses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from inspect import signature
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as meta_settings
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import hub_kernels
from transformers.pytorch_utils import Conv1D

from dtrain.core.errors import UserError, first_line
from dtrain.models.expert_layers import is_batched, is_experts

TOKENS = 8
INSTALL = re.compile(r"pip install [\w\-\[\]]+")  # in transformers' error of a missing package


def auto_class(config: PretrainedConfig) -> Any:
    """The auto class of transformers that builds the whole model of a config.

    Of a multimodal model it is the wrapper with all its towers, whose names the files, PEFT and
    servers use: AutoModelForCausalLM takes the text model out of some of them.
    """
    is_multimodal = type(config) in AutoModelForMultimodalLM._model_mapping
    return AutoModelForMultimodalLM if is_multimodal else AutoModelForCausalLM


_uses_packages: ContextVar[bool] = ContextVar("uses_packages", default=False)
_is_exporting: Callable[[], bool] = getattr(hub_kernels, "is_torchdynamo_exporting", lambda: False)


@contextmanager
def using_packages(*, on: bool) -> Iterator[None]:
    """Let layers with a state call flash-linear-attention, causal-conv1d and mamba-ssm, or torch.

    transformers calls these packages where they are installed, but they compute on a GPU only. So
    outside of this layers call torch's functions: on the meta device, and in the packing probe.
    """
    token = _uses_packages.set(on)
    try:
        yield
    finally:
        _uses_packages.reset(token)


def _calls_torch() -> bool:
    """Replaces what transformers asks before it calls another package instead of torch."""
    return not _uses_packages.get() or _is_exporting()


hub_kernels.is_torchdynamo_exporting = _calls_torch


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
    # the default one multiplies bfloat16 alone where there are no values
    implementation["experts_implementation"] = "batched_mm"
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(
                config, trust_remote_code=trust_remote_code, **implementation
            )
    except Exception as error:  # architectures check their configs in many ways
        fix = "correct its config, or choose a base that this version of transformers builds"
        if installs := INSTALL.findall(str(error)):
            fix = f"{' and '.join(installs)}, or choose a base that needs no such package"
        raise UserError(
            f"the model cannot be built: {first_line(error)}",
            where=f"config.json of {config._name_or_path or config.model_type}",
            fix=fix,
        ) from error
    return model


def build_without_parameters(
    config: PretrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    kept_elements: int = 0,
) -> PreTrainedModel:
    """Build the model of a config with real buffers, but parameters on the meta device.

    Args:
        config: becomes the model's own. Towers that no text reaches are removed.
        kept_elements: parameters of at most this many elements are built and initialized too.
    """
    with _parameters_on_meta(kept_elements):
        model: PreTrainedModel = auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    remove_modules(model, unused_towers(config))
    return model


class RemovedModule(nn.Module):
    """Stands in the place of a module that no text reaches, and has no parameters."""

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("a module is called that was not loaded, as no text reaches it")


def remove_modules(model: nn.Module, names: Iterable[str]) -> None:
    """Replace modules by such without parameters; the others keep their names."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = RemovedModule()


def without_modules(
    model_class: type[PreTrainedModel], names: Sequence[str]
) -> type[PreTrainedModel]:
    """A class of the same name whose models lack some modules, so that none is loaded."""

    def build(model: PreTrainedModel, *arguments: Any, **settings: Any) -> None:
        model_class.__init__(model, *arguments, **settings)
        remove_modules(model, names)

    content = {"__init__": build, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), content)


def unused_towers(config: PretrainedConfig) -> list[str]:
    """Names of the modules of a multimodal model that need not be loaded: no text reaches them.

    They are those outside its language model of which no tensor is touched when the model computes
    a text. An empty list if the model is not multimodal, or if its code needs values.
    """
    if auto_class(config) is not AutoModelForMultimodalLM:
        return []
    key = config.to_json_string(use_diff=False)
    if key not in _unused_towers:
        _unused_towers[key] = _find_unused_towers(build_meta_model(config))
    return _unused_towers[key]


_unused_towers: dict[str, list[str]] = {}  # by config: finding them takes a second


def _find_unused_towers(model: PreTrainedModel) -> list[str]:
    kept = {model.get_input_embeddings(), model.get_output_embeddings()}
    language_model = set(model.get_decoder().modules())
    touched = TouchedTensors()
    for training in (False, True):
        try:
            with touched, MetaValueDefaults(), torch.no_grad():
                forward_meta(model.train(training))
        except Exception:  # as in `_used`
            return []
    names: list[str] = []
    for name, module in model.named_modules():
        tensors = [*module.parameters(), *module.buffers()]
        inside = set(module.modules())
        if module in language_model or inside & (kept | language_model) or not tensors:
            continue
        is_inside_another = any(name.startswith(f"{other}.") for other in names)
        if not is_inside_another and not any(id(t) in touched.ids for t in tensors):
            names.append(name)
    return names


class TouchedTensors(TorchFunctionMode):
    """Records the tensors that any function of torch takes.

    Attributes:
        ids: of those tensors, which must outlive this.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.ids |= {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


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


def experts_per_token(model: PreTrainedModel) -> int:
    """How many experts a token uses, as the router of the first layer says, or the config.

    Args:
        model: from `build_meta_model`, with experts.

    Raises:
        UserError: its forward pass needs values before a router chooses.
    """
    chosen: list[int] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        if isinstance(index, Tensor):
            chosen.append(index.shape[-1])

    modules = [module for module in model.modules() if is_experts(module)]
    if all(map(is_batched, modules)):  # they get every token, most of them as zeros
        config: Any = model.config.get_text_config()
        return int(config.num_experts_per_tok)
    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in modules]
    _used(model)  # a forward pass, as far as it needs no values
    for hook in hooks:
        hook.remove()
    if not chosen:
        raise UserError("its router does not say how many experts a token uses")
    return chosen[0]


def unused_linear_layers(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers that a forward pass of a text does not call as a linear map.

    An adapter there would get no gradient, and an NF4 weight would be read as numbers: Gemma 3n
    reads the weight of one of its layers without calling it. A layer of DeepSeek V4 multiplies
    each group of its input by another part of the weight, which no adapter could.

    Args and return value: as for `unused_parameters`.
    """
    layers, called = linear_layers(model), set[nn.Module]()

    def record(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        features = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        is_comparable = bool(args) and isinstance(output, Tensor)  # Llama 4's router gives two
        if not is_comparable or output.shape == (*args[0].shape[:-1], features):
            called.add(layer)

    hooks = [layer.register_forward_hook(record) for layer in layers.values()]
    used = _used(model)
    for hook in hooks:
        hook.remove()
    if used is None:
        return set()
    return {n for n, layer in layers.items() if layer not in called or layer.weight not in used}


def _used(model: PreTrainedModel) -> set[Tensor] | None:
    """The parameters that the logits depend on; None if the forward pass needs values."""
    try:
        with MetaValueDefaults(), torch.enable_grad():
            logits = forward_meta(model.requires_grad_(True))
    except Exception:  # a model's code may raise anything on tensors without values
        return None
    return _leaves(logits)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of a model by name, including quantized and GPT-2's transposed ones."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def forward_meta(model: PreTrainedModel, targets: int = TOKENS) -> Tensor:
    """The logits of a text; a model's code may raise anything on tensors without values.

    Args:
        targets: how many of the tokens the head computes, where the model lets it choose.
    """
    input_ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    more = {}
    if targets < TOKENS and "logits_to_keep" in signature(model.forward).parameters:
        more["logits_to_keep"] = torch.zeros(targets, dtype=torch.long, device="meta")
    logits: Tensor = model(input_ids=input_ids, use_cache=False, **more).logits
    return logits


class MetaValueDefaults(TorchFunctionMode):
    """Returns a default where a model reads a value from a meta tensor; all of a mask is true."""

    DEFAULTS: ClassVar[dict[Any, Any]] = {
        torch.Tensor.__bool__: True,
        torch.Tensor.__int__: 1,
        torch.Tensor.__index__: 1,
        torch.Tensor.__float__: 1.0,
        torch.Tensor.item: 1,
    }

    def __enter__(self) -> Any:
        settings: Any = meta_settings  # torch adds `patch` when it is imported
        self._masks = settings.patch(meta_nonzero_assume_all_nonzero=True)
        self._masks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._masks.__exit__(*error)

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
