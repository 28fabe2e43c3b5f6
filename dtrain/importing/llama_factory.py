"""Configs of LLaMA-Factory: its stages, and the datasets of dataset_info.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import read_json
from dtrain.importing.foreign_config import STAGE, ForeignConfig
from dtrain.importing.method import method
from dtrain.importing.model import model
from dtrain.importing.sources import held_out_set, sources_of
from dtrain.importing.training import TrainerDefaults, intervals, training

DEFAULTS = TrainerDefaults()
STAGES = {"pt": "cpt", "sft": "sft", "dpo": "dpo", "kto": "kto"}
PAIR_LOSSES = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo"}
DATA, PREFERENCE = STAGE + "data.", STAGE + "preference."
INFO = "dataset_info.json"

# Name of a column in dataset_info.json → dtrain's name of it.
EXCHANGE = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
COMMON = {"system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected"}
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}  # the default names
SHAREGPT = {"messages": "conversations"}
KNOWN_TAGS = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}


def read(config: ForeignConfig, processes: int) -> None:
    """Fill the recipe from a config of LLaMA-Factory.

    Raises:
        UserError: it trains what dtrain cannot, or a dataset is not described.
    """
    kind = _objective(config)
    model(config, checkpointing=True)
    method(config, str(config.get("finetuning_type") or "lora"), {"r": 8, "dropout": 0.0})
    config.stage["data"] = {"sources": _datasets(config, "dataset", kind)}
    _data(config, kind)
    training(config, DEFAULTS, processes)
    if config.name("eval_dataset"):
        sources = _datasets(config, "eval_dataset", kind)
        config.assign("evaluation.sets.heldout", held_out_set(config, sources))
    intervals(config, DEFAULTS)


def _objective(config: ForeignConfig) -> str:
    stage = str(config.get("stage") or "sft")
    loss = str(config.get("pref_loss") or "sigmoid")
    kind = PAIR_LOSSES.get(loss, "") if stage == "dpo" else STAGES.get(stage, "")
    if not kind:
        key = "pref_loss" if stage == "dpo" else "stage"
        fix = f"dtrain knows {', '.join(PAIR_LOSSES if stage == 'dpo' else STAGES)}"
        message = f"{config.get(key)} has no counterpart"
        raise UserError(message, where=config.where(key), fix=fix)
    config.put(
        STAGE + "kind", kind, "stage", *(("pref_loss",) if kind not in (stage, "cpt") else ())
    )
    config.leave("do_train", why="every stage trains")
    if kind in ("dpo", "kto", "orpo", "simpo"):
        config.copy("pref_beta")
    if kind == "dpo":
        config.put(PREFERENCE + "loss", loss, "pref_loss")
        config.copy("pref_ftx")
        config.copy("dpo_label_smoothing", path=PREFERENCE + "label_smoothing")
    if kind == "simpo":
        config.copy("simpo_gamma")
    if kind == "kto":
        config.copy("kto_chosen_weight")
        config.copy("kto_rejected_weight")
    return kind


def _data(config: ForeignConfig, kind: str) -> None:
    config.put(DATA + "sequence_length", int(config.number("cutoff_len") or 2048), "cutoff_len")
    packing = ("neat_packing", "packing")
    given = [config.get(key) for key in packing if config.get(key) is not None]
    config.put(DATA + "packing", any(given) if given else kind == "cpt", *packing)
    if kind == "sft" and config.get("mask_history"):
        config.put(DATA + "train_on", "last", "mask_history")
    elif kind == "sft" and config.get("train_on_prompt"):
        config.put(DATA + "train_on", "all+user", "train_on_prompt")
    config.leave("mask_history", "train_on_prompt")
    name = config.get("template")
    if name == "alpaca":
        config.put(DATA + "template", "instruction", "template")
    elif kind == "cpt":
        config.leave("template", why="cpt renders no template")
    elif name:
        why = "the tokenizer's own, which may differ; a jinja file can be named"
        config.put(DATA + "template", "auto", "template", why=why, changed=True)
    if config.get("split_special_tokens") is None and kind != "cpt":
        config.put(DATA + "split_special_tokens", False)
    config.copy("split_special_tokens", path=DATA + "split_special_tokens")


def _datasets(config: ForeignConfig, key: str, kind: str) -> list[dict[str, Any]]:
    """The sources of the datasets that a key names."""
    names = config.names(key)
    if not names:
        raise UserError("names no dataset", where=str(config.path), fix=f"set {key}")
    info, folder = _info(config)
    prefix = config.source if key == "dataset" else "evaluation.sets.heldout.sources[]."
    groups = [_dataset(config, name, info, folder, kind, prefix) for name in names]
    weights = config.numbers("interleave_probs") if key == "dataset" else []
    for group, weight in zip(groups, weights, strict=False):
        for source in group:
            source["weight"] = weight / len(group)
    if weights:
        config.note(DATA + "sources[].weight", weights, "interleave_probs")
        config.leave("mix_strategy", why="the weights mix the sources")
    config.expand(key)
    config.leave("dataset_dir", why=f"its {INFO} was read")
    return [source for group in groups for source in group]


def _info(config: ForeignConfig) -> tuple[dict[str, Any], Path]:
    """The content of dataset_info.json, and its folder.

    Raises:
        UserError: it is not there, or is not a JSON object.
    """
    written = config.get("dataset_dir") or "data"
    here = config.path.parent
    folders = [Path(str(written)), here / str(written), here, here / "data"]
    for folder in folders:
        if (folder / INFO).is_file():
            content = read_json(folder / INFO)
            if not isinstance(content, dict):
                raise UserError("is not a JSON object", where=str(folder / INFO))
            return content, folder
    searched = ", ".join(dict.fromkeys(map(str, folders)))
    fix = f"copy it, with its data, next to {config.path.name}"
    raise UserError(f"{INFO} is in none of {searched}", where=config.where("dataset"), fix=fix)


def _dataset(
    config: ForeignConfig, name: str, info: dict[str, Any], folder: Path, kind: str, prefix: str
) -> list[dict[str, Any]]:
    entry = info.get(name)
    if not isinstance(entry, dict):
        known = ", ".join(list(info)[:10])
        raise UserError(f"{name} is not described", where=str(folder / INFO), fix=f"known: {known}")
    data = config.group(f"{INFO}: {name}", entry)
    data.source = prefix
    urls = ("hf_hub_url", "ms_hub_url", "script_url", "cloud_file_name")
    if data.name(*urls):
        path = str(data.get(*urls))
        data.note(data.source + "path", path, data.name(*urls))
    else:
        path = str(folder / str(entry.get("file_name", name)))
        data.note(data.source + "path", path, "file_name")
    row_format, columns = _layout(data, kind)
    _check_tags(data)
    result = sources_of(data, row_format, columns, [path])
    data.leave_rest()
    return result


def _layout(data: ForeignConfig, kind: str) -> tuple[str, dict[str, str]]:
    """The format of a dataset, and dtrain's name of a column → its name in the files."""
    is_sharegpt = data.get("formatting") in ("sharegpt", "openai")
    written = {name: str(column) for name, column in data.mapping("columns").items()}
    names = written or (SHAREGPT if is_sharegpt else ALPACA)
    columns = {COMMON[name]: column for name, column in names.items() if name in COMMON}
    if kind == "cpt":
        row_format, columns = "text", {"text": names.get("prompt", "instruction")}
    elif data.get("ranking") or "kto_tag" in names:
        row_format = "preference" if data.get("ranking") else "kto"
        if row_format == "kto":
            columns["label"] = names["kto_tag"]
        columns |= _question(data, names, row_format, is_sharegpt)
    elif is_sharegpt:
        row_format = "sharegpt"
        columns["conversations"] = names.get("messages", "conversations")
    else:
        row_format = "alpaca"
        columns |= {EXCHANGE[name]: column for name, column in names.items() if name in EXCHANGE}
    if key := data.name("ranking", "formatting"):
        data.note(data.source + "format", row_format, key)
    data.leave("formatting", why="the format of pairs and of rated answers is one")
    if written:
        data.note(data.source + "columns", columns, "columns")
    return row_format, columns


def _question(
    data: ForeignConfig, names: dict[str, str], row_format: str, is_sharegpt: bool
) -> dict[str, str]:
    """The columns of what is asked, and of a rated answer."""
    if is_sharegpt:
        return {"conversations": names.get("messages", "conversations")}
    columns = {"prompt": names.get("prompt", "instruction")}
    if row_format == "kto":
        columns["completion"] = names.get("response", "output")
    if query := names.get("query"):
        why = f"{row_format} rows have one column for the question: `{query}` is not read"
        data.note(
            data.source + "columns.prompt", columns["prompt"], "columns", why=why, changed=True
        )
    return columns


def _check_tags(data: ForeignConfig) -> None:
    tags = data.mapping("tags")
    strange = [key for key, known in KNOWN_TAGS.items() if tags.get(key, known[0]) not in known]
    why = "dtrain reads from and value, or role and content" if strange else "found in the rows"
    data.leave("tags", why=why)
