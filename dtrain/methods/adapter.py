"""What all adapters of linear layers share: PEFT attaches them, and reads them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_config, get_peft_model
from peft import __version__ as peft_version
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils import transformers_weight_conversion
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.config.methods import AdapterSettings
from dtrain.config.methods.patterns import match_names
from dtrain.core.errors import UserError
from dtrain.core.log import say
from dtrain.core.weight_files import PEFT_PREFIX
from dtrain.methods.added import AddedMethod
from dtrain.methods.base import summarize_names
from dtrain.methods.saved_modules import (
    check_modules_to_save,
    fill_copies,
    prepare_copies,
    saved_buffers,
    saved_parameters,
    trained_routers,
)
from dtrain.methods.targets import resolve_targets
from dtrain.models.dropout import key_dropouts
from dtrain.models.expert_layers import expert_parameters, own_experts, router_layers, routers
from dtrain.models.expert_nf4 import packed_parameters
from dtrain.models.meta_model import (
    build_meta_model,
    linear_layers,
    unused_linear_layers,
    unused_parameters,
)
from dtrain.models.peft_format import file_key
from dtrain.models.token_rows import MARK, fill_token_rows, prepare_token_rows, token_row_parameters

ADAPTER = "default"  # PEFT's name of the adapter that trains, inside a parameter's name

Settings = TypeVar("Settings", bound=AdapterSettings)


class AdapterMethod(AddedMethod[Settings]):
    """A PEFT model: a frozen base, a float32 adapter, and dropout keyed by the sample.

    Attributes:
        unused: names of the base's parameters that no text reaches.
        experts: the parameters of experts that get adapters.
    """

    unused: set[str]
    experts: list[str]

    def attach(
        self, model: PreTrainedModel, *, seed: int, device: torch.device | None = None
    ) -> nn.Module:
        described = build_meta_model(model.config, trust_remote_code=model.is_custom_code())
        unused = unused_linear_layers(described)
        self.unused = no_gradient = unused_parameters(described)
        saved = check_modules_to_save(model, self.settings.whole_modules, no_gradient)
        trained = trained_routers(model, self.settings, no_gradient)
        if frozen := routers(model) - trained:
            say(f"the routers of {len(frozen)} layers stay frozen")
        barred = self.barred_layers(model)
        self.experts = self._expert_targets(model)
        experts = [*expert_parameters(model)] if self.settings.adapts_experts else []
        chosen, choosing = self.settings.target_modules, router_layers(model)
        targets = resolve_targets(described, chosen, unused, saved, barred, choosing, experts)
        # transformers and PEFT each hook the embeddings so that their output requires a gradient,
        # for reentrant checkpointing. Ours needs none: backward may end at the first adapter.
        model.disable_input_require_grads()
        adapted, inner = self.adapt(model, targets), model
        model.disable_input_require_grads()
        prepare_copies(inner, no_gradient)
        prepare_token_rows(adapted)
        with_values = saved_parameters(adapted).keys() | token_row_parameters(adapted)
        self.initialize_all(adapted, seed, device, with_values)
        if undropped := key_dropouts(adapted, described):
            names = summarize_names(undropped)
            say(f"no dropout where a layer computes other rows than tokens: {names}")
        adapted.train()
        if isinstance(adapted, PeftModel):
            loadable_config(adapted)  # raises before the training
            check_peft_names(adapted)
        return adapted

    def _expert_targets(self, model: PreTrainedModel) -> list[str]:
        """The parameters of experts that get adapters: those that the settings name.

        Raises:
            UserError: the experts are computed by code of the model's own.
        """
        named, targets = [*expert_parameters(model)], self.settings.target_modules
        if (own := own_experts(model)) and isinstance(targets, str):
            what = f"the experts of this model ({own[0]}, ...)"
            if self.settings.adapts_experts:
                raise UserError(
                    f"{what} are computed by code of its own, in which they cannot get adapters",
                    where="method.experts",
                    fix="method.experts=false, which adapts the other layers",
                )
            stay = "stay unquantized" if self.traits.quantizes_base else "stay as they are"
            say(f"{what} {stay}, without adapters")
        named = [name for name in named if name not in self.unused]
        if not isinstance(targets, str):
            named = match_names(named, targets)
        if named and not self.settings.adapts_experts:
            modules = {name.rpartition(".")[0] for name in named}
            say(f"the experts of {len(modules)} layers stay as they are, without adapters")
            return []
        return named

    def barred_layers(self, model: PreTrainedModel) -> set[str]:
        """Names of the linear layers that PEFT does not adapt.

        Mamba's kernels for GPUs multiply with the weight of `out_proj` without calling the layer.
        """
        config: Any = SimpleNamespace(peft_type=self.settings.peft_config()["peft_type"])
        barred = set()
        for name in linear_layers(model):
            try:
                _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
            except ValueError:
                barred.add(name)
        return barred

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
        trained = sorted(trained_routers(model, self.settings, self.unused))
        settings = {
            "target_modules": targets,
            "modules_to_save": [*self.settings.whole_modules, *trained] or None,
            "task_type": "CAUSAL_LM",
        }
        config: Any = get_peft_config(self.settings.peft_config() | settings | more)
        try:
            # PEFT's first values are replaced; of a base without values it need not compute them.
            is_empty = any(parameter.is_meta for parameter in model.parameters())
            with names_as_given():
                adapted = get_peft_model(model, config, low_cpu_mem_usage=is_empty)
        except ValueError as error:
            reason = str(error).removeprefix(f"[PEFT:{config.peft_type}] ")
            fix = "name layers that PEFT adapts: method.target_modules: [in_proj, ...]"
            raise UserError(reason, where="method.target_modules", fix=fix) from error
        assert isinstance(adapted, PeftModel)
        if isinstance(targets, list):  # PEFT shortens the names: to such as towers have too,
            config.target_modules = set(targets)  # which it does not see here
        self.settings.check_layers(_pattern_names(adapted.get_base_model()))
        return adapted

    def on_weights_loaded(self, block: nn.Module) -> None:
        fill_copies(block)
        fill_token_rows(block)

    def changed_tensors(self, model: nn.Module) -> set[str]:
        """Weights under an adapter, whole modules, and all that NF4 rounded: a merge writes it."""
        assert isinstance(model, PeftModel)
        base = model.get_base_model()
        modules = dict(base.named_modules())
        changed = {n: m for n, m in modules.items() if isinstance(m, BaseTunerLayer | Linear4bit)}
        weights = {
            f"{name}.{getattr(module, 'parameter_name', 'weight')}"
            for name, module in changed.items()
        }
        weights |= {f"{n}.{p}" for n, m in modules.items() for p in packed_parameters(m)}
        weights = {name.replace(".base_layer", "").replace(MARK, ".") for name in weights}
        return weights | set(saved_parameters(base).values())

    def saved_tensors(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().saved_tensors(model, tensors | saved_buffers(model))

    def saved_config(self, model: nn.Module) -> dict[str, Any]:
        """The content of adapter_config.json, without the base."""
        assert isinstance(model, PeftModel)
        content = loadable_config(model).to_dict()
        # PEFT writes its sets in an order that changes
        return {k: sorted(v) if isinstance(v, set) else v for k, v in content.items()}


def loadable_config(model: PeftModel) -> Any:
    """The adapter's config with targets that PEFT does not replace when it loads the adapter.

    PEFT takes some names of layers for those of experts in transformers 4. Of such a layer, the
    weight is named as a target parameter: PEFT then computes the same, with the same names of
    tensors.

    Raises:
        UserError: PEFT could not load the adapter.
    """
    config: Any = model.peft_config[ADAPTER]
    base = model.get_base_model()
    layers = adapted_layers(base).items()
    adapted = [name for name, module in layers if not isinstance(module, ParamWrapper)]
    replaced = [name for name in adapted if _is_replaced(config, base, name)]
    if not replaced:
        return config
    if getattr(config, "use_dora", False):
        raise UserError(
            f"PEFT {peft_version} takes {replaced[0]} for experts, which it has no DoRA of",
            where="method.kind",
            fix="method.kind=lora, or method.target_modules without such layers",
        )
    saved: Any = deepcopy(config)
    saved.target_modules = set(adapted) - set(replaced)
    weights = [f"{name}.weight" for name in replaced]
    saved.target_parameters = sorted([*(saved.target_parameters or ()), *weights])
    saved.lora_dropout = 0.0  # which target parameters do not have
    return saved


def adapted_layers(base: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers with an adapter, by their names in the base."""
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)
    }


def _pattern_names(base: nn.Module) -> list[str]:
    """The names that PEFT compares with patterns: of layers, and of parameters of experts."""
    names = []
    for name, module in adapted_layers(base).items():
        if isinstance(module, ParamWrapper):
            name = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        names.append(name)
    return names


def check_peft_names(model: PeftModel) -> None:
    """Check that PEFT loads an adapter under the names that it has.

    PEFT renames its tensors as transformers renames those of older files, and loses those that the
    model does not have.

    Raises:
        UserError: it does not.
    """
    saved = {file_key(n): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    convert = transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers
    loaded = convert(model, model.peft_config[ADAPTER], dict(saved), ADAPTER)
    if lost := sorted(saved.keys() - loaded.keys()):
        layer = lost[0].partition(".lora_")[0].removeprefix(PEFT_PREFIX)
        raise UserError(
            f"PEFT {peft_version} would lose the adapter of {layer}: it renames that layer",
            where="method.target_modules",
            fix="name the layers, without that one: method.target_modules: [q_proj, ...]",
        )


def _is_replaced(config: Any, base: nn.Module, name: str) -> bool:
    """Whether PEFT would replace the name of a layer by that of a parameter of experts."""
    probe: Any = deepcopy(config)
    probe.target_modules, probe.target_parameters = {name}, []
    try:
        transformers_weight_conversion.convert_peft_config_for_transformers(probe, base, None)
    except ValueError:  # half of a pair
        return True
    return probe.target_modules != {name}


@contextmanager
def names_as_given() -> Iterator[None]:
    """Keep PEFT from replacing target names that it takes for those of transformers 4.

    There, experts were linear layers: `down_proj` would adapt them in place of the layers of that
    name.
    """
    convert = transformers_weight_conversion.convert_peft_config_for_transformers
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = convert
