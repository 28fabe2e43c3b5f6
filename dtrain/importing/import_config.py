"""A recipe from the config file of another tool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from pydantic import ValidationError

from dtrain.config.load import check_no_secrets, to_yaml
from dtrain.config.schema import Recipe
from dtrain.config.yaml_document import YamlDocument, read_document
from dtrain.core.errors import UserError
from dtrain.importing import axolotl, llama_factory, trl
from dtrain.importing.foreign_config import ForeignConfig, Note, Outcome

Reader = Callable[[ForeignConfig, int], None]
HEADINGS: dict[Outcome, str] = {
    "same": "same key",
    "renamed": "renamed",
    "computed": "computed",
    "default": "defaults of {tool}, where the file says nothing",
    "changed": "changed: {tool} would do something else",
    "left out": "left out",
}


@dataclass(frozen=True)
class Tool:
    """A training tool.

    Attributes:
        name: as people write it.
        typical: keys of its files, with spaces.
        read: fills the recipe from a file.
    """

    name: str
    typical: str
    read: Reader

    def count(self, values: dict[str, Any]) -> int:
        """How many of its typical keys there are."""
        return len(values.keys() & set(self.typical.split()))


TOOLS = [
    Tool(
        "axolotl",
        "base_model sequence_len micro_batch_size num_epochs lora_target_linear sample_packing "
        "val_set_size wandb_watch adapter pretraining_dataset lr_scheduler optimizer rl "
        "special_tokens dataset_prepared_path",
        axolotl.read,
    ),
    Tool(
        "LLaMA-Factory",
        "stage finetuning_type cutoff_len template dataset dataset_dir lora_rank lora_target "
        "pref_beta pref_loss do_train plot_loss overwrite_cache",
        llama_factory.read,
    ),
    Tool(
        "TRL",
        "dataset_name use_peft lora_r max_length dataset_text_field assistant_only_loss "
        "dataset_train_split dataset_test_split lora_target_modules attn_implementation "
        "model_name_or_path per_device_train_batch_size dtype loss_type",
        trl.read,
    ),
]


def import_config(path: Path, processes: int) -> ForeignConfig:
    """Read the config file of another tool.

    Args:
        path: a YAML or JSON file of axolotl, LLaMA-Factory or TRL.
        processes: ranks that train, which these files do not say.

    Returns:
        The recipe and what became of each key.

    Raises:
        UserError: it is none, or it trains what dtrain cannot.
    """
    document = read_document(path)
    check_no_secrets(document)
    values = document.values
    tool = _tool_of(values, path)
    config = ForeignConfig(tool.name, path, values)
    tool.read(config, processes)
    _name_and_output(config)
    config.leave_rest()
    check_no_secrets(YamlDocument(str(path), config.recipe))  # dataset_info.json, too
    return config


def _tool_of(values: dict[str, Any], path: Path) -> Tool:
    where = str(path)
    if "stages" in values and "model" in values:
        raise UserError("is a recipe of dtrain already", where=where, fix=f"dtrain check {path}")
    if any(isinstance(value, dict) and "_component_" in value for value in values.values()):
        fix = "dtrain recipes lists recipes to start from; `dtrain check` answers its keys"
        raise UserError("torchtune's configs name Python classes: not read", where=where, fix=fix)
    tool = max(TOOLS, key=lambda tool: tool.count(values))
    if tool.count(values) < 2:
        fix = f"these are read: {', '.join(tool.name for tool in TOOLS)}"
        raise UserError("is no config of a known tool", where=where, fix=fix)
    return tool


def _name_and_output(config: ForeignConfig) -> None:
    names = ("run_name", "wandb_name", "wandb_run_id")
    config.put("name", str(config.get(*names) or config.path.stem), *names)
    folder = config.get("output_dir") or f"runs/{config.path.stem}"
    config.put("output.folder", str(folder), "output_dir")
    config.stage["name"] = config.stage["kind"]
    trackers = [name for name in config.names("report_to") if name not in ("none", "all", "False")]
    trackers += ["wandb"] if config.name("wandb_project") else []
    trackers += ["tensorboard"] if config.get("use_tensorboard") else []
    trackers += ["swanlab"] if config.get("use_swanlab") else []
    if trackers:
        keys = ("report_to", "use_tensorboard", "use_swanlab", "wandb_project")
        config.put("monitoring.report_to", list(dict.fromkeys(trackers)), *keys)
        config.copy("wandb_project", "swanlab_project", "comet_project_name")


def recipe_text(config: ForeignConfig) -> str:
    """The recipe as YAML; its first lines say where it is from and what is not as there."""
    head = [f"From {config.path.name}, a config of {config.tool}."]
    head += [f"Changed: {_line(config, n)}" for n in config.notes if n.outcome == "changed"]
    if left_out := [note.key for note in config.notes if note.outcome == "left out"]:
        head.append(f"Left out: {', '.join(left_out)}")
    lines = [line for entry in head for line in wrap(entry, 97, break_long_words=False)]
    comment = "".join(f"# {line}\n" for line in lines)
    return comment + to_yaml(_in_order(config.recipe))


def _in_order(values: dict[str, Any]) -> dict[str, Any]:
    """The values in the order of the schema; as they are if it refuses them."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError:
        return values
    return recipe.model_dump(mode="python", exclude_unset=True)


def report(config: ForeignConfig) -> list[str]:
    """What became of each key, as lines."""
    lines = []
    for outcome, heading in HEADINGS.items():
        notes = [note for note in config.notes if note.outcome == outcome]
        if notes:
            lines += [heading.format(tool=config.tool)]
            lines += [f"  {_line(config, note)}" for note in notes]
    if off := [note.key for note in config.notes if note.outcome == "off"]:
        lines += ["not used there", f"  {', '.join(off)}"]
    return lines


def _line(config: ForeignConfig, note: Note) -> str:
    """A note, with the stage as an override names it."""
    return str(note).replace("stages[]", f"stages.{config.stage['name']}")
