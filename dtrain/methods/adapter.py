"""What all adapters of linear layers share: PEFT attaches them, and reads them back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_config, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from dtrain.config.methods import AdapterSettings
from dtrain.core.errors import UserError
from dtrain.core.log import say
from dtrain.methods.added import AddedMethod
from dtrain.methods.base import summarize_names
from dtrain.methods.saved_modules import (
    check_modules_to_save,
    fill_copies,
    prepare_copies,
    saved_parameters,
)
from dtrain.models.dropout import key_dropouts
from dtrain.models.meta_model import build_meta_model, linear_layers, unused_linear_layers

ADAPTER = "default"  # PEFT's name of the adapter that trains, inside a parameter's name

Settings = TypeVar("Settings", bound=AdapterSettings)


class AdapterMethod(AddedMethod[Settings]):
    """A PEFT model: a frozen base, a float32 adapter, and dropout keyed by the sample."""

    def attach(
        self, model: PreTrainedModel, *, seed: int, device: torch.device | None = None
    ) -> nn.Module:
        described = build_meta_model(model.config, trust_remote_code=model.is_custom_code())
        unused = unused_linear_layers(described)
        saved = check_modules_to_save(model, self.settings.whole_modules, described)
        targets = resolve_targets(model, self.settings.target_modules, unused, saved)
        # transformers and PEFT each hook the embeddings so that their output requires a gradient,
        # for reentrant checkpointing. Ours needs none: backward may end at the first adapter.
        model.disable_input_require_grads()
        adapted = self.adapt(model, targets)
        model.disable_input_require_grads()
        prepare_copies(adapted)
        self.initialize_all(adapted, seed, device, saved_parameters(adapted))
        key_dropouts(adapted)
        adapted.train()
        return adapted

    def adapt(self, model: PreTrainedModel, targets: str | list[str]) -> nn.Module:
        """The model with adapters, whose parameters alone train; here PEFT's model.

        Args:
            targets: names of layers, matched as PEFT does.
        """
        return self._with_adapter(model, targets)

    def _with_adapter(
        self, model: PreTrainedModel, targets: str | list[str], **more: Any
    ) -> PeftModel:
        """PEFT's model; a layer that PEFT cannot adapt, such as Mamba's, is an error.

        Args:
            more: settings of PEFT that replace those of `peft_config`.
        """
        settings = {
            "target_modules": targets,
            "modules_to_save": list(self.settings.whole_modules) or None,
            "task_type": "CAUSAL_LM",
        }
        config = get_peft_config(self.settings.peft_config() | settings | more)
        try:
            # PEFT's first values are replaced; of a base without values it need not compute them.
            is_empty = any(parameter.is_meta for parameter in model.parameters())
            adapted = get_peft_model(model, config, low_cpu_mem_usage=is_empty)
        except ValueError as error:
            reason = str(error).removeprefix(f"[PEFT:{config.peft_type}] ")
            fix = "name layers that PEFT adapts: method.target_modules: [in_proj, ...]"
            raise UserError(reason, where="method.target_modules", fix=fix) from error
        assert isinstance(adapted, PeftModel)
        modules = adapted.get_base_model().named_modules()
        self.settings.check_layers([n for n, m in modules if isinstance(m, BaseTunerLayer)])
        return adapted

    def on_weights_loaded(self, block: nn.Module) -> None:
        fill_copies(block)

    def changed_tensors(self, model: nn.Module) -> set[str]:
        """Weights under an adapter, whole modules, and all that NF4 rounded: a merge writes it."""
        assert isinstance(model, PeftModel)
        base = model.get_base_model()
        modules = base.named_modules()
        changed = {n for n, m in modules if isinstance(m, BaseTunerLayer | Linear4bit)}
        weights = {f"{name.removesuffix('.base_layer')}.weight" for name in changed}
        return weights | set(saved_parameters(base).values())

    def saved_config(self, model: nn.Module) -> dict[str, Any]:
        """The content of adapter_config.json, without the base."""
        assert isinstance(model, PeftModel)
        content = model.peft_config[ADAPTER].to_dict()
        # PEFT writes its sets in an order that changes
        return {k: sorted(v) if isinstance(v, set) else v for k, v in content.items()}


def resolve_targets(
    model: PreTrainedModel, target_modules: str | list[str], unused: set[str], saved: set[str]
) -> str | list[str]:
    """The modules for PEFT to adapt; it ignores a target without a match if another one has one.

    Args:
        unused: layers that no text reaches; an adapter there would never get a gradient.
        saved: modules that train whole.

    Raises:
        UserError: a target that names no linear layer, only unused ones, or one that trains whole.
    """
    output = model.get_output_embeddings()
    layers = linear_layers(model)
    if isinstance(target_modules, str):
        named = {n for n, m in layers.items() if m is not output}
        matched = named - saved
    else:
        _check_targets(model, target_modules, layers)
        names = (name for name, _ in model.named_modules())  # as PEFT: of any kind
        named = matched = set(match_names(names, target_modules))
        if both := sorted(matched & saved):
            message = f"{both[0]} cannot have an adapter and train whole"
            where = "method.target_modules and method.modules_to_save"
            raise UserError(message, where=where, fix="name it in one of them")
    used = (matched & layers.keys()) - unused
    if not used:
        raise UserError("no text reaches any of these layers", where="method.target_modules")
    if used == named:
        return target_modules if isinstance(target_modules, str) else list(target_modules)
    if without := matched - used:
        summary = summarize_names(without)
        say(f"{len(without)} layers get no adapter, as no text reaches them: {summary}")
    return sorted(used)


def match_names(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Match as PEFT does: names that are equal to a target, or ending with it after a dot."""
    endings = tuple(f".{target}" for target in targets)
    return [name for name in names if f".{name}".endswith(endings)]


def _check_targets(
    model: PreTrainedModel, target_modules: list[str], layers: dict[str, nn.Module]
) -> None:
    for target in target_modules:
        if not match_names(layers, [target]):
            raise UserError(
                f"no linear layer is named {target!r}",
                where="method.target_modules",
                fix=f"choose from: {', '.join(sorted({n.rsplit('.', 1)[-1] for n in layers}))}",
            )
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    if tied and any(layers[name] is output for name in match_names(layers, target_modules)):
        raise UserError(
            "the output matrix is tied to the embeddings and cannot have an adapter of its own",
            where="method.target_modules",
        )
