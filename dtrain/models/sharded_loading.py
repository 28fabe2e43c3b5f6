"""A base that comes from disk one block at a time, for engines that keep a share of it.

The model is built without storage; an engine asks for a block (a decoder layer), gets its tensors
on the device, quantised on the way if the method says so, and cuts out its share before it asks
for the next. Beyond its share a process holds one block. The files are memory-mapped: the ranks of
a node read each byte from disk once between them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from dtrain.config import schema
from dtrain.core.errors import UserError
from dtrain.models.kernels.nf4_pack import pack_fast
from dtrain.models.load import configured, freeze_for_training
from dtrain.models.outline import outline, without_weights
from dtrain.models.quantize import nf4_layers
from dtrain.models.weight_files import check_complete, file_names, read_header, weight_files

FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors; smaller ones mean little without scales


class Streamed:
    """Where the tensors of a model without storage are stored.

    Raises:
        UserError: the files lack a parameter or a persistent buffer of the model, hold more than
            it has, or hold one of another shape or of no plain float.

    Attributes:
        model: its parameters are on the meta device until `fill`.
        converted: names in the files of what cannot be read one by one; empty in most models.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self._device = model, device
        headers = {path: read_header(path)[0] for path in weight_files(folder)}
        self._files = {name: path for path, entries in headers.items() for name in entries}
        entries = {n: e for found in headers.values() for n, e in found.items()}
        names = file_names(model, self._files)
        self.converted = names.converted
        # By module, not by name: adapters put modules around modules.
        self._names: dict[nn.Module, dict[str, str]] = {}
        self._shared: dict[nn.Parameter, nn.Parameter | None] = {}
        if self.converted:  # which entries they make is known once they are read
            return
        check_complete(folder, names.missing, names.unexpected)
        self._untie(names.stored)
        self._place(folder, names.stored, entries)

    def _untie(self, stored: dict[str, str]) -> None:
        """Part tied parameters whose two stored values differ, as transformers does."""
        seen: dict[nn.Parameter, str] = {}
        for own, name in stored.items():
            tensor = self.model.get_parameter_or_buffer(own)
            first = seen.setdefault(tensor, name)
            if first != name and not torch.equal(self._read(first), self._read(name)):
                parent, _, leaf = own.rpartition(".")
                alone = nn.Parameter(torch.empty_like(tensor), requires_grad=tensor.requires_grad)
                self.model.get_submodule(parent)._parameters[leaf] = alone

    def _place(
        self, folder: Path, stored: dict[str, str], entries: dict[str, dict[str, Any]]
    ) -> None:
        by_tensor = {self.model.get_parameter_or_buffer(own): n for own, n in stored.items()}
        places: Counter[Tensor] = Counter()
        for module in self.model.modules():
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or tensor not in by_tensor:
                    continue
                name = by_tensor[tensor]
                check_shape(folder, name, entries[name]["shape"], list(tensor.shape))
                check_dtype(folder, name, entries[name]["dtype"], tensor)
                self._names.setdefault(module, {})[leaf] = name
                places[tensor] += 1
        self._shared = {p: None for p, count in places.items() if count > 1}  # type: ignore[misc]

    def fill(self, block: nn.Module) -> None:
        """Give what `block` has in the files its values, on the device; once to each.

        An engine that shards a block frees what it replaces, so nothing here may refer to it:
        only parameters that stand in several modules are kept, until the last block.
        """
        for module in block.modules():
            for leaf, name in self._names.pop(module, {}).items():
                if (buffer := module._buffers.get(leaf)) is not None:
                    module._buffers[leaf] = self._on_device(name, buffer.dtype)
                elif (parameter := module._parameters[leaf]) is not None:
                    module._parameters[leaf] = self._fill_one(module, parameter, name)
        if not self._names:
            self._shared.clear()

    def _fill_one(self, module: nn.Module, empty: nn.Parameter, name: str) -> nn.Parameter:
        if empty not in self._shared:
            return self._make(module, empty, name)
        shared = self._shared[empty]
        if shared is None:
            shared = self._shared[empty] = self._make(module, empty, name)
        return shared

    def _make(self, module: nn.Module, empty: nn.Parameter, name: str) -> nn.Parameter:
        if isinstance(module, Linear4bit) and isinstance(empty, Params4bit):
            # packed from what it computes in, so that it is unpacked to that, not to float32
            return _packed(module, empty, self._on_device(name, module.compute_dtype))
        values = self._on_device(name, empty.dtype)
        return nn.Parameter(values, requires_grad=empty.requires_grad)

    def _on_device(self, name: str, dtype: torch.dtype) -> Tensor:
        """A stored tensor; it is moved in its own dtype, as a CPU converts slowly."""
        return self._read(name).to(self._device).to(dtype)

    def _read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            values: Tensor = file.get_tensor(name)
        return values


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


def check_dtype(folder: Path, name: str, stored: str, wanted: Tensor) -> None:
    """Refuse quantized numbers where weights belong: a plain cast would take them for values.

    Raises:
        UserError: naming the tensor.
    """
    if wanted.is_floating_point() and stored not in FLOATS:
        raise UserError(
            f"{name} is stored as {stored}, so this base is quantized",
            where=str(folder),
            fix="use the model that it was made from",
        )


def stream_base(
    folder: Path,
    settings: schema.Model,
    *,
    quantised: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Streamed:
    """Open a base to be filled block by block, where its `converted` is empty.

    Args and errors: as `load_base`.
    """
    config = configured(folder, settings, dtype, device)
    model = empty_model(config, settings, quantised=quantised, dtype=dtype, device=device)
    return Streamed(folder, model, device)


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
    model = without_weights(config, dtype, settings.trust_remote_code)
    _keep_precision(model, dtype)
    if quantised:
        if settings.kernels != "off":
            pack_fast()
        for name in nf4_layers(outline(config, settings.trust_remote_code)):
            _replace(model, name, dtype)
        model.is_loaded_in_4bit = True  # type: ignore[assignment] # PEFT asks
    for name, buffer in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer.to(device)
    return freeze_for_training(model, settings)


def _keep_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give what transformers keeps in float32 that dtype, as `from_pretrained` does."""
    dtypes = model._get_dtype_plan(dtype)
    if not dtypes:
        return
    pattern, by_group, _ = build_glob_alternation(list(dtypes))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (match := pattern.search(name)) and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[by_group[str(match.lastgroup)]])


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
