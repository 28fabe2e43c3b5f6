"""A LoRA adapter's folder in PEFT layout, and where it comes from; read without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.config.methods import TRAITS
from dtrain.core.errors import UserError
from dtrain.core.files import read_json
from dtrain.core.run_dir import ADAPTER, STAGE_RECORD

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# In the folder of an adapter or merged model: its chat template, and where an answer ends.
CHAT_TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
COMBINED = "combine.json"  # beside an adapter that was made of two

# PEFT's names in memory hold the adapter's own name, which its files leave out.
_NAMED = (
    re.compile(r"(.*\.lora_(?:embedding_)?[ABE])\.(?!weight$|bias$)([^.]+)(\.weight|\.bias)?"),
    re.compile(r"(.*\.lora_magnitude_vector)\.([^.]+)()(?:\.weight)?"),
    re.compile(r"(.*)\.modules_to_save\.([^.]+)(\..*)"),
    re.compile(r"(.*\.token_adapter\.trainable_tokens_delta)\.([^.]+)()"),
)


@dataclass(frozen=True)
class Origin:
    """What is known of an adapter's making; nothing, of one that dtrain did not make.

    Attributes:
        identity: of the stage that trained it, or the last one whose change it holds.
        parent: identity of the model that it was trained on.
        quantised: it was trained over that model in NF4.
        kind: cpt, sft or combined; empty if not known.
    """

    identity: str | None = None
    parent: str | None = None
    quantised: bool = False
    kind: str = ""


def origin(folder: Path) -> Origin:
    """Where an adapter comes from, by the record that dtrain left."""
    if (folder / COMBINED).is_file():
        return Origin(**read_json(folder / COMBINED)["origin"])
    record = folder.absolute().parent / STAGE_RECORD
    if folder.name != ADAPTER or not record.is_file():
        return Origin()
    known = read_json(record)
    inputs = known["inputs"]
    quantised = TRAITS[inputs["method"]["kind"]].quantizes_base
    return Origin(known["identity"], inputs["parent"], quantised, inputs["kind"])


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of an adapter's adapter_config.json.

    Raises:
        UserError: it is missing or broken, or says no kind of adapter.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"is not an adapter: no {CONFIG} in it", where=str(folder))
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UserError("is not the config of an adapter", where=str(folder / CONFIG))
    return config


def file_key(key: str) -> str:
    """A tensor's key as PEFT writes it to a file: without the adapter's name."""
    for pattern in _NAMED:
        if found := pattern.fullmatch(key):
            return found[1] + (found[3] or "")
    return key


def file_keys(keys: Iterable[str], where: Path) -> dict[str, str]:
    """The stored key of each tensor, by the key that PEFT gives it in a file.

    Raises:
        UserError: the file holds more than one adapter.
    """
    found: dict[str, str] = {}
    for key in keys:
        if (other := found.setdefault(file_key(key), key)) != key:
            raise UserError(
                f"holds two adapters: {other} and {key}",
                where=str(where),
                fix="save one adapter with PEFT's save_pretrained(…, selected_adapters=[NAME])",
            )
    return found
