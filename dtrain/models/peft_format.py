"""An adapter's folder in PEFT layout, and the record of its training; read without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import Field
from typing_extensions import TypedDict

from dtrain.config.methods import parse_method
from dtrain.config.methods.patterns import compile_pattern
from dtrain.core.errors import UserError
from dtrain.core.file_types import Count, Number, check_type
from dtrain.core.files import read_json
from dtrain.core.stage_dir import ADAPTER, ADAPTER_CONFIG, STAGE_RECORD

WEIGHTS = "adapter_model.safetensors"
# Files of an adapter or merged model: its chat template, and the tokens that end an answer.
CHAT_TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
# Files of a tokenizer with new tokens, next to an adapter that trained them.
NEW_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
COMBINED = "combine.json"  # record of a combined adapter, in its folder
BOTTLENECK = "BOTTLENECK"  # peft_type of adapters that PEFT does not have

# In memory PEFT's names contain the adapter's name, which its files omit.
_NAMED = (
    re.compile(r"(.*\.lora_(?:embedding_)?[ABE])\.(?!weight$|bias$)([^.]+)(\.weight|\.bias)?"),
    re.compile(r"(.*\.lora_magnitude_vector)\.([^.]+)()(?:\.weight)?"),
    re.compile(r"(.*\.(?:ia3_l|vera_lambda_[bd]))\.([^.]+)()"),
    re.compile(r"(.*)\.modules_to_save\.([^.]+)(\..*)"),
    re.compile(r"(.*\.token_adapter\.trainable_tokens_delta)\.([^.]+)()"),
)


@dataclass(frozen=True)
class AdapterOrigin:
    """How an adapter was trained; all fields are empty for one that dtrain did not train.

    Attributes:
        identity: identity of the stage that trained it, or of the last stage combined into it.
        parent: identity of the model that it was trained on.
        base_in_nf4: whether it was trained on that model in NF4.
        kind: kind of the stage, or `combined`.
    """

    identity: str | None = None
    parent: str | None = None
    base_in_nf4: bool = False
    kind: str = ""


_TokenId = Annotated[int, Field(ge=-1, le=2**60)]  # -1: none, in some old files
_TokenIds = _TokenId | list[_TokenId] | None


class GenerationFile(TypedDict, total=False):
    """What dtrain and transformers' `generate` use of generation_config.json."""

    bos_token_id: _TokenIds
    decoder_start_token_id: _TokenIds
    eos_token_id: _TokenIds
    pad_token_id: _TokenIds
    stop_strings: str | list[str] | None


class _Origin(TypedDict):
    identity: str | None
    parent: str | None
    base_in_nf4: bool
    kind: str


class _Combined(TypedDict):
    origin: _Origin


class _StageInputs(TypedDict, total=False):
    parent: Required[str]
    method: Required[dict[str, Any]]
    kind: Required[str]
    dtype: str


class _StageFacts(TypedDict, total=False):
    dtype: str


class StageRecordContent(TypedDict, total=False):
    """A stage's record, as far as an adapter's origin is read from it."""

    identity: Required[str]
    inputs: Required[_StageInputs]
    facts: _StageFacts


_Rank = Annotated[int, Field(ge=1, le=2**20)]
_Names = list[str] | str | None
_Tokens = list[Count]
_Flag = bool | None


class _AdapterConfig(TypedDict, total=False):
    """An adapter_config.json, as far as its values are computed with."""

    peft_type: Required[str]
    base_model_name_or_path: str | None
    r: _Rank | None
    init_r: _Rank | None
    lora_alpha: Number | None
    rank_pattern: dict[str, _Rank | list[bool]] | None  # AdaLoRA: which ranks it kept
    alpha_pattern: dict[str, Number] | None
    target_modules: _Names
    exclude_modules: _Names
    modules_to_save: list[str] | None
    target_parameters: list[str] | None
    layers_to_transform: _Tokens | Count | None
    layers_pattern: _Names
    trainable_token_indices: _Tokens | dict[str, _Tokens] | None
    bias: str
    use_dora: _Flag
    use_rslora: _Flag
    lora_bias: _Flag
    fan_in_fan_out: _Flag
    ensure_weight_tying: _Flag
    projection_prng_key: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    bottleneck_size: _Rank
    activation: str
    num_virtual_tokens: Count | None


def read_adapter_origin(folder: Path) -> AdapterOrigin:
    """Read the record that dtrain wrote of an adapter."""
    if (folder / COMBINED).is_file():
        return AdapterOrigin(**read_json(folder / COMBINED, _Combined)["origin"])
    record = folder.absolute().parent / STAGE_RECORD
    if folder.name != ADAPTER or not record.is_file():
        return AdapterOrigin()
    known = read_json(record, StageRecordContent)
    inputs = known["inputs"]
    in_nf4 = parse_method(inputs["method"]).traits.quantizes_base
    return AdapterOrigin(known["identity"], inputs["parent"], in_nf4, inputs["kind"])


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of an adapter's adapter_config.json.

    Raises:
        UserError: it is missing, broken, or not an adapter's config.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"is not an adapter: no {ADAPTER_CONFIG} in it", where=str(folder))
    config = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UserError("is not the config of an adapter", where=str(folder / ADAPTER_CONFIG))
    check_type(config, _AdapterConfig, str(folder / ADAPTER_CONFIG))
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            compile_pattern(pattern, str(folder / ADAPTER_CONFIG))
    return config


def adapter_base(folder: Path) -> str | None:
    """Hub id or path of the base that an adapter's config names; None if it names none.

    A path that begins with a dot starts from the adapter's folder; from the working folder in an
    adapter of another program, which is found if the first is not there.

    Raises:
        UserError: as `read_adapter_config`.
    """
    named = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    inside = Path(os.path.normpath(folder.absolute() / named))
    return str(inside) if named.startswith(".") and inside.exists() else named


def read_generation(folder: Path) -> dict[str, Any]:
    """The generation_config.json of a model or adapter; empty if it has none.

    Raises:
        UserError: it is damaged, or a value that dtrain or transformers uses has another type.
    """
    path = folder / GENERATION
    content: dict[str, Any] = read_json(path, GenerationFile) if path.is_file() else {}
    return content


def stop_texts(folder: Path) -> list[str]:
    """The texts that end an answer of a model or adapter, where no single token does.

    Raises:
        UserError: as `read_generation`.
    """
    texts: str | list[str] = read_generation(folder).get("stop_strings") or []
    return [texts] if isinstance(texts, str) else texts


def base_reference(base: str, adapter: Path, run: Path) -> str:
    """How an adapter's config names its base, so that a run folder can be moved.

    A base in the adapter's run folder moves with it: the path is relative. Any other folder stays
    where it is: the path is absolute.

    Args:
        base: hub id or absolute path of the model that the adapter was trained on.
        adapter: its folder.
        run: the run folder.
    """
    folder, adapter, run = Path(base), adapter.absolute(), run.absolute()
    moves_along = folder.is_relative_to(run) and adapter.is_relative_to(run)
    return os.path.relpath(folder, adapter) if moves_along else base


def file_key(key: str) -> str:
    """The key under which PEFT saves a tensor: its name without the adapter's name."""
    for pattern in _NAMED:
        if match := pattern.fullmatch(key):
            return match[1] + (match[3] or "")
    return key


def file_keys(keys: Iterable[str], where: Path) -> dict[str, str]:
    """Map the keys of PEFT's layout to the keys that a file really has.

    Raises:
        UserError: the file contains more than one adapter.
    """
    stored: dict[str, str] = {}
    for key in keys:
        if (first := stored.setdefault(file_key(key), key)) != key:
            raise UserError(
                f"contains two adapters: {first} and {key}",
                where=str(where),
                fix="save one adapter with PEFT's save_pretrained(…, selected_adapters=[NAME])",
            )
    return stored
