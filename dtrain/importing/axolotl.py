"""Configs of axolotl: its adapters, preference trainers and types of datasets."""

from __future__ import annotations

from typing import Any

from dtrain.core.errors import UserError
from dtrain.importing.foreign_config import STAGE, ForeignConfig
from dtrain.importing.method import method
from dtrain.importing.model import model
from dtrain.importing.sources import held_out_set, sources_of
from dtrain.importing.training import TrainerDefaults, intervals, training

DEFAULTS = TrainerDefaults(
    micro_batch_size=1, lr_scheduler="cosine", warmup_ratio=0.03, epochs=1.0, save_steps=None
)
RL = {"dpo": "dpo", "ipo": "dpo", "orpo": "orpo", "kto": "kto", "simpo": "simpo"}
DATA, PREFERENCE = STAGE + "data.", STAGE + "preference."

# The start of a dataset's type → format, and dtrain's name of a column → the type's.
Layout = tuple[str, dict[str, str]]
ANSWERS: dict[str, Layout] = {
    "alpaca_chat.load_qa": ("alpaca", {"instruction": "question", "output": "answer"}),
    "alpaca_chat.load_camel_ai": ("alpaca", {"instruction": "message_1", "output": "message_2"}),
    "alpaca_w_system.load_open_orca": (
        "alpaca",
        {"instruction": "question", "output": "response", "system": "system_prompt"},
    ),
    "alpaca": ("alpaca", {}),
    "gpteacher": ("alpaca", {"output": "response"}),
    "oasst": ("alpaca", {"instruction": "INSTRUCTION", "output": "RESPONSE"}),
    "summarizetldr": ("alpaca", {"instruction": "article", "output": "summary"}),
    "sharegpt": ("sharegpt", {}),
    "chat_template": ("messages", {}),
    "completion": ("text", {}),
    "pretrain": ("text", {}),
}
QUESTION, INPUT = {"prompt": "question"}, {"prompt": "input"}
PAIRS: dict[str, Layout] = {
    **{f"{name}.intel": ("preference", QUESTION) for name in ("chatml", "llama3")},
    **{f"{name}.icr": ("preference", INPUT) for name in ("chatml", "llama3")},
    **{name: ("preference", {}) for name in ("chat_template", "chatml", "llama3", "zephyr")},
}
RATED: dict[str, Layout] = {
    **{f"{name}.argilla": ("kto", {"prompt": "instruction"}) for name in ("chatml", "llama3")},
    **{f"{name}.intel": ("kto", QUESTION) for name in ("chatml", "llama3")},
    **{name: ("kto", {}) for name in ("chatml", "llama3")},
}
FIELDS = {
    "field": "text",
    "text_column": "text",
    "field_messages": "messages",
    **{f"field_{name}": name for name in ("tools", "chosen", "rejected", "instruction", "input")},
    **{f"field_{name}": name for name in ("output", "system", "prompt", "completion", "label")},
}
NO_COUNTERPART = {
    "input_output": "rows of segments have no counterpart; write messages whose turns have "
    "`train: true` or `train: false`",
    "stepwise_supervised": "dtrain trains no reward model",
    "bradley_terry": "dtrain trains no reward model",
}
KNOWN_TURNS = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})


def read(config: ForeignConfig, processes: int) -> None:
    """Fill the recipe from a config of axolotl.

    Raises:
        UserError: it trains what dtrain cannot.
    """
    rl = str(config.get("rl") or "")
    if rl and rl not in RL:
        fix = f"dtrain trains by {', '.join(RL)}"
        raise UserError(f"{rl} has no counterpart", where=config.where("rl"), fix=fix)
    model(config, checkpointing=False)
    method(config, str(config.get("adapter") or "full"), {"r": 8, "dropout": 0.0})
    sources = [x for data in config.groups("datasets", text="path") for x in _sources(data, rl)]
    for data in config.groups("pretraining_dataset", text="path"):
        sources += _sources(data, "pretrain")
    config.stage["data"] = {"sources": sources}
    _objective(config, rl, {source["format"] for source in sources})
    _sequences(config)
    _template(config, {source["format"] for source in sources})
    training(config, DEFAULTS, processes)
    for number, data in enumerate(config.groups("test_datasets", text="path")):
        data.source = f"evaluation.sets.heldout-{number}.sources[]."
        held_out = held_out_set(config, _sources(data, rl))
        config.assign(f"evaluation.sets.heldout-{number}", held_out)
    intervals(config, DEFAULTS)


def _sources(data: ForeignConfig, rl: str) -> list[dict[str, Any]]:
    """The sources of a dataset.

    Raises:
        UserError: its rows have no counterpart.
    """
    written = data.get("type")
    name = rl if rl == "pretrain" else str(written or "")
    if reason := next((NO_COUNTERPART[x] for x in NO_COUNTERPART if name.startswith(x)), ""):
        raise UserError(f"{name}: {reason}", where=data.where("type"))
    if isinstance(written, dict):
        row_format = "kto" if rl == "kto" else "preference" if rl in RL else "alpaca"
        fields, columns = data.group("type", written), dict[str, str]()
        data.expand("type")
    else:
        types = RATED if rl == "kto" else PAIRS if rl in RL else ANSWERS
        start = next((start for start in types if name.startswith(start)), "")
        row_format, columns = types.get(start, ("auto", {}))
        fields, columns = data, dict(columns)
        why = "" if start else "found from the first row"
        data.note(data.source + "format", row_format, "type", why=why)
    columns |= _columns(fields, row_format)
    files = data.name("data_files") or "path"
    paths = data.paths(files)
    data.note(data.source + "path", paths[0] if len(paths) == 1 else paths, files)
    data.leave("path", why="data_files names the files")
    data.leave("roles_to_train", why="see train_on: answers have loss, and the turns named there")
    _check_turns(data)
    result = sources_of(data, row_format, columns, paths)
    fields.leave_rest()
    data.leave_rest()
    return result


def _columns(fields: ForeignConfig, row_format: str) -> dict[str, str]:
    """The columns that the keys of a dataset name."""
    columns = {}
    for key, column in FIELDS.items():
        if theirs := fields.get(key):
            ours = "conversations" if row_format == "sharegpt" and column == "messages" else column
            columns[ours] = str(theirs)
            fields.note(f"{fields.source}columns.{ours}", theirs, key)
    return columns


def _check_turns(data: ForeignConfig) -> None:
    """Note how turns name their role and text, which dtrain finds by itself."""
    if mapping := data.mapping("message_property_mappings"):
        known = any(mapping.items() <= turns.items() for turns in KNOWN_TURNS)
        reads = "dtrain reads role and content, or from and value"
        data.leave("message_property_mappings", why="found in the rows" if known else reads)
    data.leave("message_field_role", "message_field_content", "roles", why="found in the rows")
    if data.get("train_on_eos", "train_on_eot") in ("all", "none", "last"):
        why = "the end of each answer has loss"
        data.note(
            STAGE + "data.train_on", "all", "train_on_eos", "train_on_eot", why=why, changed=True
        )
    data.leave("train_on_eos", "train_on_eot", why="the end of each answer has loss")


def _objective(config: ForeignConfig, rl: str, formats: set[str]) -> None:
    path, keys = STAGE + "kind", ("datasets", "pretraining_dataset")
    if rl:
        config.put(path, RL[rl], "rl")
        _preference(config, rl)
    elif formats == {"text"}:
        config.put(path, "cpt", why="all rows are plain texts")
    elif "text" in formats:
        why = "some rows are plain texts: every token of all rows has loss"
        config.put(path, "cpt", why=why, changed=True)
    else:
        config.put(path, "sft", why="rows with answers")
        _trained_turns(config)
    config.leave("train_on_inputs", *keys)


def _trained_turns(config: ForeignConfig) -> None:
    """Set which turns have loss, for all datasets alike."""
    path, roles = DATA + "train_on", set[str]()
    for data in config.groups("datasets", text="path"):
        roles |= set(data.names("roles_to_train"))
    others = [role for role in ("user", "tool") if role in roles or role + "s" in roles]
    if config.get("train_on_inputs") is True:
        config.put(path, "all+user", "train_on_inputs")
    elif others:
        config.put(path, "+".join(["all", *others]), why="roles_to_train of the datasets")


def _preference(config: ForeignConfig, rl: str) -> None:
    if rl == "ipo":
        config.put(PREFERENCE + "loss", "ipo", "rl")
    config.copy(
        *(("orpo_alpha",) if rl == "orpo" else ("dpo_beta", "rl_beta")), path=PREFERENCE + "beta"
    )
    if rl == "simpo":
        config.copy("simpo_gamma")
    if rl == "kto":
        config.copy("kto_desirable_weight")
        config.copy("kto_undesirable_weight")
    if rl == "dpo":
        config.copy("rpo_alpha")
        config.copy("dpo_label_smoothing", path=PREFERENCE + "label_smoothing")
        config.copy("precompute_ref_log_probs")


def _sequences(config: ForeignConfig) -> None:
    config.put(DATA + "sequence_length", int(config.number("sequence_len") or 512), "sequence_len")
    packs = bool(config.get("sample_packing")) or config.name("pretraining_dataset") != ""
    config.put(DATA + "packing", packs, "sample_packing")
    config.leave("eval_sample_packing", why="held-out sets are packed as the stage's data are")
    if config.stage["kind"] != "cpt":
        policies = {"truncate": "truncate", "raise": "fail"}
        policy = policies.get(str(config.get("excess_length_strategy")), "drop")
        config.put(DATA + "overlong", policy, "excess_length_strategy")


def _template(config: ForeignConfig, formats: set[str]) -> None:
    path, file = DATA + "template", config.get("chat_template_jinja")
    name = str(config.get("chat_template") or "")
    if isinstance(file, str) and file.endswith((".jinja", ".jinja2", ".j2")):
        config.put(path, file, "chat_template_jinja")
    elif name == "alpaca" or (formats == {"alpaca"} and not name):
        config.put(path, "instruction", "chat_template", why="type alpaca")
    elif name and not name.startswith("tokenizer_default"):
        why = f"the tokenizer's own; dtrain has no {name}, but reads a jinja file"
        config.put(path, "auto", "chat_template", why=why, changed=True)
    else:
        config.leave("chat_template", why="the tokenizer's own template is the default")
