"""A base that comes from disk one block at a time, for engines that keep a share of it.

The model is built without storage; an engine asks for a block (a decoder layer), gets its tensors
on the device, quantised on the way if the method says so, and cuts out its share before it asks
for the next. Beyond its share a process holds one block. The files are memory-mapped: the ranks of
a node read each byte from disk once between them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dtrain.config import schema
from dtrain.core.errors import UserError
from dtrain.core.log import warn
from dtrain.models.kernels.packing import pack_fast
from dtrain.models.load import configured, made_ready
from dtrain.models.quantise import nf4_layers
from dtrain.models.weights import read_header, weight_files


class Streamed:
    """Where the tensors of a model without storage lie.

    Attributes:
        model: its parameters are on the meta device until `fill`.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self._device = model, device
        headers = {path: read_header(path)[0] for path in weight_files(folder)}
        self._files = {name: path for path, entries in headers.items() for name in entries}
        shapes = {n: e["shape"] for entries in headers.values() for n, e in entries.items()}
        # By module, not by name: adapters put modules around modules.
        self._names: dict[nn.Module, dict[str, str]] = {}
        self._made: dict[nn.Parameter, nn.Parameter] = {}
        tied: dict[nn.Parameter, str] = {}
        self.missing = []
        for prefix, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{prefix}.{leaf}"
                if name in self._files:
                    check_shape(folder, name, shapes[name], list(parameter.shape))
                    tied.setdefault(parameter, name)
                self._names.setdefault(module, {})[leaf] = name
        for names in self._names.values():
            for leaf, name in names.items():
                parameter = model.get_parameter(name)
                names[leaf] = tied.get(parameter, name)
                if parameter not in tied:
                    self.missing.append(name)

    def fill(self, block: nn.Module) -> None:
        """Give every parameter in `block` that has no storage yet its values, on the device."""
        for module in block.modules():
            for leaf, name in self._names.get(module, {}).items():
                parameter = module._parameters[leaf]
                if parameter is not None and parameter.is_meta:
                    module._parameters[leaf] = self._make(module, parameter, name)

    def _make(self, module: nn.Module, empty: nn.Parameter, name: str) -> nn.Parameter:
        if empty in self._made:  # tied to one that was filled before
            return self._made[empty]
        with safe_open(self._files[name], framework="pt") as file:
            values: Tensor = file.get_tensor(name)
        if isinstance(module, Linear4bit) and isinstance(empty, Params4bit):
            # packed from what it computes in, so that it is unpacked to that, not to float32
            values = values.to(self._device, module.compute_dtype)
            made: nn.Parameter = _packed(module, empty, values)
        else:
            values = values.to(self._device, empty.dtype)
            made = nn.Parameter(values, requires_grad=empty.requires_grad)
        self._made[empty] = made
        return made


def check_shape(folder: Path, name: str, found: list[int], wanted: list[int]) -> None:
    """Refuse a tensor of another model.

    Raises:
        UserError: naming it.
    """
    if found != wanted:
        raise UserError(
            f"{name} is {found} in the file, {wanted} by config.json",
            where=str(folder),
            fix="weights and config.json must be of one model; fetch them again",
        )


def stream_base(
    folder: Path,
    settings: schema.Model,
    *,
    quantised: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Streamed | None:
    """Open a base to be filled block by block; None if its files do not name tensors as it does.

    Args and errors: as `load_base`.
    """
    config = configured(folder, settings, dtype, device)
    model = empty_model(config, settings, quantised=quantised, dtype=dtype, device=device)
    streamed = Streamed(folder, model, device)
    if not streamed.missing:
        return streamed
    warn(
        f"{folder}: {len(streamed.missing)} tensors have other names than the model's parameters "
        f"({streamed.missing[0]}, …): every rank loads the whole base before it is sharded"
    )
    return None


def empty_model(
    config: PretrainedConfig,
    settings: schema.Model,
    *,
    quantised: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """A frozen model whose parameters have no storage; its buffers are on the device.

    Args:
        config: from `configured` or `for_training`; else as `load_base`.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=settings.trust_remote_code
        )
    model.tie_weights()  # accelerate made an empty parameter for each place
    if quantised:
        if settings.kernels != "plain":
            pack_fast()
        for name in nf4_layers(config, settings.trust_remote_code):
            _replace(model, name, dtype)
        model.is_loaded_in_4bit = True  # PEFT asks
    for name, buffer in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer.to(device)
    return made_ready(model, settings)


def _replace(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Put an NF4 layer without storage where a plain one is."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = Linear4bit(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=dtype,
        device=torch.device("meta"),
    )
    if old.bias is not None:
        new.bias = old.bias
    setattr(model.get_submodule(parent), leaf, new.requires_grad_(False))


def _packed(module: Linear4bit, empty: Params4bit, values: Tensor) -> Params4bit:
    packed = Params4bit(
        values,
        requires_grad=False,
        compress_statistics=empty.compress_statistics,
        quant_type=empty.quant_type,
        quant_storage=empty.quant_storage,
        module=module,
    )._quantize(values.device)
    module.quant_state = packed.quant_state
    return packed
