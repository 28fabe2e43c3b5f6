"""Loads a base block by block, for engines that shard it.

The model is built on the meta device. An engine materializes one block (a decoder layer) on its
device, quantized if the method asks for it, and shards it before it loads the next, so a process
holds one block beyond its share. The files are memory-mapped: the ranks of a node together read
each byte from disk once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dtrain.config import schema
from dtrain.core.errors import UserError
from dtrain.core.weight_files import FLOATS, check_complete, warn_incomplete
from dtrain.models.check_base import stored_quantized_error
from dtrain.models.compute_dtype import kept_dtypes
from dtrain.models.conversion import Conversion, check_conversions, expert_parts
from dtrain.models.expert_layers import expert_parameters
from dtrain.models.expert_nf4 import holds_nf4, mark_experts, packed_parameter
from dtrain.models.finite_weights import check_tensor
from dtrain.models.load import freeze_for_training, load_config
from dtrain.models.meta_model import build_meta_model, build_without_parameters, unused_towers
from dtrain.models.quantize import nf4_layers, pack_natively
from dtrain.models.state_dict_names import match_state_dict
from dtrain.models.stored_tensors import ModelTensors


class StreamedModel:
    """A model on the meta device, and where its tensors are in the files.

    Raises:
        UserError: the files lack a parameter or persistent buffer of the model, have others, or
            have one with another shape or without a plain float dtype.

    Attributes:
        model: its parameters are on the meta device until `materialize`.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self._device = model, device
        self._files = ModelTensors(folder)
        whole = build_meta_model(model.config) if unused_towers(model.config) else model
        matched = match_state_dict(whole, self._files)
        names = matched.among(model.state_dict())
        # keyed by module, not by name: adapters wrap modules and change their names
        self._sources: dict[nn.Module, dict[str, TensorSource]] = {}
        self._shared: dict[nn.Parameter, nn.Parameter | None] = {}
        check_complete(folder, names.missing, names.unexpected)
        check_conversions(folder, names.conversions, self._files)
        warn_incomplete(folder, {*matched.missing} - {*names.missing})
        self._untie(names.stored)
        sources = {
            n: TensorSource([x], partial(self._files.read, x, device))
            for n, x in names.stored.items()
        }
        for conversion in names.conversions:
            made = ConvertedTensors(conversion, self._files.read)
            for entry in conversion.entries:
                read, matrices = partial(made.take, entry), _matrices_of_experts(conversion)
                sources[entry] = TensorSource(conversion.names, read, True, matrices)
        self._assign(folder, sources)

    def _untie(self, stored: dict[str, str]) -> None:
        """Untie parameters whose two stored values differ, as transformers does."""
        seen, read = dict[nn.Parameter, str](), self._files.read
        for local_name, name in stored.items():
            tensor = self.model.get_parameter_or_buffer(local_name)
            first = seen.setdefault(tensor, name)
            if first != name and not torch.equal(read(first), read(name)):
                parent, _, leaf = local_name.rpartition(".")
                alone = nn.Parameter(torch.empty_like(tensor), requires_grad=tensor.requires_grad)
                self.model.get_submodule(parent)._parameters[leaf] = alone

    def _assign(self, folder: Path, sources: dict[str, TensorSource]) -> None:
        by_tensor = {self.model.get_parameter_or_buffer(n): x for n, x in sources.items()}
        uses: Counter[Tensor] = Counter()
        for module in self.model.modules():
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or tensor not in by_tensor:
                    continue
                source = by_tensor[tensor]
                for name in source.names:
                    check_dtype(folder, name, self._files[name].dtype, tensor)
                if not source.is_converted:
                    (name,) = source.names
                    check_shape(folder, name, list(self._files[name].shape), list(tensor.shape))
                self._sources.setdefault(module, {})[leaf] = source
                uses[tensor] += 1
        self._shared = {p: None for p, count in uses.items() if count > 1}  # type: ignore[misc]

    def materialize(self, block: nn.Module) -> None:
        """Load the tensors of a block onto the device; each is loaded once.

        An engine frees the tensors that it shards, so nothing here may reference them. Only
        parameters that several modules share are referenced, until the last block is loaded.
        """
        for module in block.modules():
            for leaf, source in self._sources.pop(module, {}).items():
                if (buffer := module._buffers.get(leaf)) is not None:
                    module._buffers[leaf] = self._on_device(source, buffer)
                elif (parameter := module._parameters[leaf]) is not None:
                    module._parameters[leaf] = self._load_parameter(module, leaf, parameter, source)
        if not self._sources:
            self._shared.clear()

    def _load_parameter(
        self, module: nn.Module, leaf: str, empty: nn.Parameter, source: TensorSource
    ) -> nn.Parameter:
        if empty not in self._shared:
            return self._read_parameter(module, leaf, empty, source)
        shared = self._shared[empty]
        if shared is None:
            shared = self._shared[empty] = self._read_parameter(module, leaf, empty, source)
        return shared

    def _read_parameter(
        self, module: nn.Module, leaf: str, empty: nn.Parameter, source: TensorSource
    ) -> nn.Parameter:
        if isinstance(module, Linear4bit) and isinstance(empty, Params4bit):
            # packed from the compute dtype, so that it is unpacked to that and not to float32
            return _packed(module, empty, self._on_device(source, empty, module.compute_dtype))
        values = self._on_device(source, empty)
        if holds_nf4(module) and values.dim() == 3:
            return packed_parameter(module, leaf, values, source.matrices, empty.dtype)
        return nn.Parameter(values, requires_grad=empty.requires_grad)

    def _on_device(
        self, source: TensorSource, empty: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Read a tensor; it is checked and cast on the device, as CPUs cast slowly."""
        first = source.names[0]
        folder = str(self._files[first].path.parent)
        try:
            values = source.read().to(self._device)
        except UserError as error:  # of a conversion, which knows no folder
            where = error.where or folder
            raise UserError(error.message, where=where, fix=error.fix) from error
        name = f"what {first}, … make" if source.is_converted else first
        if isinstance(empty, nn.Parameter):
            check_tensor(values, name, self._files[first].path)
        return values.to(dtype or empty.dtype)


class ConvertedTensors:
    """The entries of the model that one conversion makes."""

    def __init__(self, conversion: Conversion, read: Callable[[str], Tensor]) -> None:
        self.conversion, self._read = conversion, read
        self._waiting: dict[str, Tensor] = {}

    def take(self, entry: str) -> Tensor:
        """An entry's values, which are not kept; each is taken once."""
        if entry not in self._waiting:
            self._waiting = self.conversion.convert(self._read)
        return self._waiting.pop(entry)


@dataclass(frozen=True)
class TensorSource:
    """Where an entry of the model comes from.

    Attributes:
        names: names in the files.
        read: returns its values.
        is_converted: it is made from tensors of other names or shapes.
        matrices: of experts: as how many matrices each of them is stored.
    """

    names: list[str]
    read: Callable[[], Tensor]
    is_converted: bool = False
    matrices: int = 1


def _matrices_of_experts(conversion: Conversion) -> int:
    parts = [part for of_entry in expert_parts(conversion).values() for part in of_entry]
    return parts[0].share[1] if parts else 1


def check_shape(folder: Path, name: str, stored: list[int], expected: list[int]) -> None:
    """Check that a stored tensor has the shape of the model's.

    Raises:
        UserError: it does not.
    """
    if stored != expected:
        raise UserError(
            f"{name} is {stored} in the file, but {expected} by config.json",
            where=str(folder),
            fix="weights and config.json must belong to the same model; download them again",
        )


def check_dtype(folder: Path, name: str, stored: str, expected: Tensor) -> None:
    """Check that a tensor is not stored quantized: a cast would take its codes for values.

    Raises:
        UserError: it is.
    """
    if expected.is_floating_point() and stored not in FLOATS:
        raise stored_quantized_error(name, stored, folder)


def stream_base(
    folder: Path,
    settings: schema.Model,
    *,
    quantized: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> StreamedModel:
    """Open a base for loading by block.

    Args and errors: as for `load_base`.
    """
    config = load_config(folder, settings, dtype, device)
    model = build_frozen_meta_model(
        config, settings, quantized=quantized, dtype=dtype, device=device
    )
    return StreamedModel(folder, model, device)


def build_frozen_meta_model(
    config: PretrainedConfig,
    settings: schema.Model,
    *,
    quantized: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """A frozen model with parameters on the meta device and buffers on the device.

    Args:
        config: from `load_config` or `prepare_config`; the others as for `load_base`.
    """
    model = build_without_parameters(config, dtype, settings.trust_remote_code)
    _keep_precision(model, dtype)
    if quantized:
        if settings.kernels != "off":
            pack_natively()
        for name in nf4_layers(build_meta_model(config, settings.trust_remote_code)):
            _replace_by_nf4(model, name, dtype)
        mark_experts(model, expert_parameters(model))
        model.is_loaded_in_4bit = True  # type: ignore[assignment] # read by PEFT
    for name, buffer in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer.to(device)
    return freeze_for_training(model, settings)


def _keep_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Set the dtypes of parameters that transformers keeps in float32, as `from_pretrained`."""
    tensors = model.state_dict(keep_vars=True)
    for name, kept in kept_dtypes(model, dtype).items():
        tensors[name].data = tensors[name].data.to(kept)


def _replace_by_nf4(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Replace a linear layer by an NF4 layer on the meta device."""
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
