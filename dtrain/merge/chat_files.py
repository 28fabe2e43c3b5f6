"""The files that let a server use a result as it was trained: chat template, and where to stop.

They are saved with an adapter and in a merged model, in the format that transformers saves and vLLM
reads: chat_template.jinja, and generation_config.json with every token that ends an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from dtrain.config.load import load_recipe
from dtrain.config.objectives import OBJECTIVES
from dtrain.config.schema import Stage
from dtrain.core.errors import UserError
from dtrain.core.files import json_text, read_json, read_object, read_text
from dtrain.core.log import say
from dtrain.core.run_dir import RunDir
from dtrain.core.weight_files import PROCESSOR_TEMPLATE, processor_template
from dtrain.data.chat_templates import resolve_template
from dtrain.data.end_of_turn import StopCriterion, find_stop_criterion
from dtrain.models.added_tokens import open_tokenizer
from dtrain.models.peft_format import (
    CHAT_TEMPLATE,
    GENERATION,
    NEW_TOKENIZER_FILES,
    GenerationFile,
    read_generation,
    stop_texts,
)

TOKENIZER = "tokenizer_config.json"
TOKENIZER_BYTES = 1 << 28
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class _Template(TypedDict):
    name: str
    template: str


class _Tokenizer(TypedDict, total=False):
    chat_template: str | list[_Template] | dict[str, str] | None


class _Config(GenerationFile, total=False):
    text_config: dict[str, Any] | None


def adapter_chat_files(
    stage: Stage, base: Path, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Return the text files to save with a stage's adapter, by name; none without conversations.

    Args:
        base: the model that the stage was trained on.
        tokenizer: of the run's base, used for `template: auto`.
    """
    if not OBJECTIVES[stage.kind].trains_on_answers:
        return {}
    try:
        template = resolve_template(stage.data.template, tokenizer)
    except UserError:  # plain text needs none; conversations could not be prepared without one
        return {}
    stop = find_stop_criterion(template, tokenizer)
    if stop.text:
        say(
            f"stage {stage.name}: a turn ends with {stop.text!r}, which is not a single token: "
            f"pass it as a stop string when you serve the model ({GENERATION} has it)"
        )
    files = {GENERATION: generation_config(base, [stop])}
    if {stored_template(base), processor_template(base) or template.text} != {template.text}:
        files[CHAT_TEMPLATE] = template.text
    return files


def checkpoint_chat_files(run: Path, stage_name: str, base: Path) -> dict[str, str]:
    """Return the same for a stage that may be incomplete, from its run's recipe."""
    recipe = load_recipe(str(RunDir(run).recipe))
    stage = next(stage for stage in recipe.stages if stage.name == stage_name)
    if not OBJECTIVES[stage.kind].trains_on_answers:
        return {}
    return adapter_chat_files(stage, base, open_tokenizer(recipe.model))


def combined_chat_files(base: Path, adapters: Sequence[Path]) -> dict[str, str]:
    """Return the files for several adapters of one base: every stop, the last one's template."""
    stops, files = list[StopCriterion](), dict[str, str]()
    for folder in adapters:
        ends = _as_list(read_generation(folder).get("eos_token_id"))
        stops += [StopCriterion(token=token) for token in ends]
        stops += [StopCriterion(text=text) for text in stop_texts(folder)]
        if template := stored_template(folder):
            files[CHAT_TEMPLATE] = template
    return files | ({GENERATION: generation_config(base, stops)} if stops else {})


def merged_chat_files(base: Path, files: dict[str, str]) -> dict[str, str]:
    """Return the files for a merged model, without an earlier template.

    The tokenizer may have one, and the processor of a multimodal model another, which it prefers.

    Raises:
        UserError: a file of the base, which the merge would copy, is damaged.
    """
    read_generation(base)
    if CHAT_TEMPLATE not in files:
        return files
    result = dict(files)
    if (base / PROCESSOR_TEMPLATE).is_file():
        result[PROCESSOR_TEMPLATE] = json_text({"chat_template": files[CHAT_TEMPLATE]})
    path = base / TOKENIZER
    config = read_object(path) if path.is_file() else {}
    if "chat_template" in config:
        config.pop("chat_template")
        result[TOKENIZER] = json_text(config)
    return result


def stored_template(folder: Path) -> str | None:
    """Return the chat template in a tokenizer's or an adapter's folder."""
    if (folder / CHAT_TEMPLATE).is_file():
        return read_text(folder / CHAT_TEMPLATE)
    path = folder / TOKENIZER
    config = read_json(path, _Tokenizer) if path.is_file() else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # older versions of transformers saved several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def tokenizer_texts(folder: Path) -> dict[str, str]:
    """Return the text files of a model's tokenizer, by name, with its chat template."""
    paths = [folder / name for name in (*NEW_TOKENIZER_FILES, CHAT_TEMPLATE)]
    return {path.name: read_text(path, TOKENIZER_BYTES) for path in paths if path.is_file()}


def generation_config(base: Path, stops: Sequence[StopCriterion]) -> str:
    """Return a base's generation_config.json with these stops added to its own."""
    path = base / GENERATION
    config = read_json(path, GenerationFile) if path.is_file() else _from_model_config(base)
    config.pop("_from_model_config", None)  # it now has more than the model's config
    base_ends = _as_list(config.get("eos_token_id"))
    ends = dict.fromkeys([*base_ends, *(stop.token for stop in stops if stop.token is not None)])
    texts = [
        *_as_list(config.get("stop_strings")),
        *(text for stop in stops for text in stop.texts),
    ]
    if ends:
        config["eos_token_id"] = [*ends] if len(ends) > 1 else next(iter(ends))
    if texts:
        config["stop_strings"] = [*dict.fromkeys(texts)]
    return json_text(config)


def _from_model_config(base: Path) -> dict[str, Any]:
    """Return what transformers takes from config.json if there is no generation_config.json."""
    config = read_json(base / "config.json", _Config)
    config = (config.get("text_config") or {}) | {k: v for k, v in config.items() if v is not None}
    return {name: config[name] for name in TOKENS if config.get(name) is not None}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
