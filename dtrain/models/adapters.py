"""What trains: a LoRA adapter (arXiv:2106.09685) over a frozen base, or every parameter."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.config.methods import Full, Lora
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import atomic_folder, write_json
from dtrain.core.log import say
from dtrain.models.dropout import key_dropouts
from dtrain.models.outline import linear_layers, outline, unused_layers, unused_parameters
from dtrain.models.tensor_utils import all_finite

ADAPTER = "default"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def attach(
    model: PreTrainedModel,
    method: Full | Lora,
    *,
    seed: int,
    device: torch.device | None = None,
) -> nn.Module:
    """Make a frozen base trainable.

    Args:
        model: from `load_base` or `stream_base`.
        seed: decides the adapter's first weights, with the layers' names and nothing else: they
            are the same on every rank, device and dtype.
        device: of the adapter; that of its layer if not given.

    Returns:
        lora, qlora: a PEFT model with a float32 adapter and keyed dropout; full: the model itself
        with every parameter trainable in float32.

    Raises:
        UserError: a target that no linear layer answers to.
    """
    described = outline(model.config, trust_remote_code=model.is_custom_code())
    if isinstance(method, Full):
        return _train_all(model, unused_parameters(described))
    target_modules = _resolve_targets(model, method.target_modules, unused_layers(described))
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.scale_alpha,  # type: ignore[arg-type] # PEFT divides it by r, so a float
        lora_dropout=method.dropout,
        target_modules=target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # transformers and PEFT each hook the embeddings so that their output requires a gradient, for
    # the reentrant kind of checkpointing. Ours needs none: backward may end at the first adapter.
    model.disable_input_require_grads()
    adapted = _with_adapter(model, config)
    model.disable_input_require_grads()
    _initialise(adapted, seed, device)
    key_dropouts(adapted)
    adapted.train()
    return adapted


def _with_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """PEFT's model; what it does not adapt is refused in its words, such as Mamba's projections."""
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).removeprefix("[PEFT:PeftType.LORA] ")
        fix = "name layers that PEFT adapts: method.target_modules: [in_proj, ...]"
        raise UserError(reason, where="method.target_modules", fix=fix) from error
    assert isinstance(adapted, PeftModel)
    return adapted


def _train_all(model: PreTrainedModel, unused: set[str]) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(name not in unused)
    if unused:
        say(f"{len(unused)} parameters stay frozen, as no text reaches them: {_groups(unused)}")
    model.train()
    return model


def _groups(names: set[str]) -> str:
    """The modules of parameters, where their names part from one another."""
    stems = sorted({".".join(name.split(".")[:2]) for name in names})
    return ", ".join(stems[:3]) + (", …" if len(stems) > 3 else "")


def _resolve_targets(
    model: PreTrainedModel, target_modules: str | list[str], unused: set[str]
) -> str | list[str]:
    """What PEFT is to adapt; it is silent about a target that matches nothing if another one does.

    Args:
        unused: layers that no text reaches; an adapter there would never get a gradient.
    """
    output = model.get_output_embeddings()
    layers = linear_layers(model)
    if target_modules == "all-linear":
        matched = {n for n, m in layers.items() if m is not output}
    else:
        _check_targets(model, target_modules, layers)
        names = (name for name, _ in model.named_modules())  # as PEFT: of any kind
        matched = {n for n in names if any(n == t or n.endswith(f".{t}") for t in target_modules)}
    used = (matched & layers.keys()) - unused
    if not used:
        raise UserError("no text reaches any of these layers", where="method.target_modules")
    if used == matched:
        return target_modules if isinstance(target_modules, str) else list(target_modules)
    say(f"{len(matched - used)} layers get no adapter, as no text reaches them: "
        f"{_groups(matched - used)}")  # fmt: skip
    return sorted(used)


def _check_targets(
    model: PreTrainedModel, target_modules: str | list[str], layers: dict[str, nn.Module]
) -> None:
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise UserError(
                f"no linear layer is named {target!r}",
                where="method.target_modules",
                fix=f"choose from: {', '.join(sorted({n.rsplit('.', 1)[-1] for n in layers}))}",
            )
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    matched = [
        m for n, m in layers.items() if any(n == t or n.endswith(f".{t}") for t in target_modules)
    ]
    if tied and any(module is output for module in matched):
        raise UserError(
            "the output matrix is tied to the embeddings and cannot have an adapter of its own",
            where="method.target_modules",
        )


def changed_tensors(model: nn.Module) -> set[str]:
    """The base's parameters that a merge of what trains changes, as the base's modules name them.

    NF4 changes all that it held: what was trained is written onto what it had made of them.
    """
    if not isinstance(model, PeftModel):
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    base = model.get_base_model()
    changed = {n for n, m in base.named_modules() if isinstance(m, BaseTunerLayer | Linear4bit)}
    return {f"{name.removesuffix('.base_layer')}.weight" for name in changed}


def _initialise(model: nn.Module, seed: int, device: torch.device | None) -> None:
    """A uniform as in PEFT (Kaiming, a = √5), B zero; both in float32."""
    for name, parameter in list(model.named_parameters()):
        if not parameter.requires_grad:
            continue
        assert parameter.dim() == 2 and ("lora_A" in name or "lora_B" in name), name
        first = torch.zeros(parameter.shape, dtype=torch.float32, device="cpu")
        if "lora_A" in name:
            digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        owner, _, leaf = name.rpartition(".")
        first = first.to(device or parameter.device)
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(first)


def save_adapter(
    folder: Path,
    model: nn.Module,
    tensors: dict[str, Tensor],
    base: str | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter in PEFT layout; a folder that is there already is replaced at the end.

    Args:
        model: the PEFT model, for its settings and the names of what trains.
        tensors: whole tensors by `named_parameters()` name.
        base: what PEFT shall load as the base; not named if None.
        files: text of other files to save in its folder, by name.

    Raises:
        UserError: a value that is not finite, which is never saved.
    """
    assert isinstance(model, PeftModel), "save_adapter is for LoRA"
    _check_tensors(model, tensors)
    stored = {_peft_name(name): tensor.contiguous().cpu() for name, tensor in tensors.items()}
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=_made(folder.parent)))
    try:
        with atomic_folder(staging / "new") as target:
            save_file(stored, target / WEIGHTS, metadata={"format": "pt"})
            write_json(target / CONFIG, adapter_config(model, base))
            for name, text in (files or {}).items():
                (target / name).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(staging / "old")
        (staging / "new").rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def adapter_config(model: PeftModel, base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json; PEFT writes its sets in an order that changes."""
    content = model.peft_config[ADAPTER].to_dict()
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in content.items()}
    return dict(sorted((settings | {"base_model_name_or_path": base}).items())) | {
        "inference_mode": True
    }


def _check_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(wanted ^ tensors.keys())
    assert not odd, f"adapter and model disagree on {len(odd)} names: {odd[:3]}"
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise UserError(
                f"the adapter is not finite in {name}", status=Exit.NON_FINITE,
                fix="go on from an earlier checkpoint with a lower train.learning_rate",
            )  # fmt: skip


def _peft_name(name: str) -> str:
    """….lora_A.default.weight → ….lora_A.weight"""
    return name.replace(f".{ADAPTER}.", ".")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
