"""Tasks of lm-evaluation-harness: their settings, and their errors, without importing it.

The harness takes twenty seconds to read its 14,000 task files. Here their names are searched as
text, once per version.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dtrain.config.clash import Clash
from dtrain.config.group import Count, Group, PathText, Text
from dtrain.config.yaml_document import Key
from dtrain.core.cache_paths import cache_folder, user_path
from dtrain.core.errors import UserError, nearest_name
from dtrain.core.files import read_json, write_json

MODULE = "lm_eval"
EXTRA = "lm-eval"
AT: Key = ("evaluation", "tasks")

# `task: name`, or `tag:` with a list on the following lines.
_NAMES = re.compile(
    r"^[\"']?(task|group|tag)[\"']?[ \t]*:[ \t]*([^\n#]*?)[ \t]*(?:#[^\n]*)?$"
    r"((?:\n[ \t]*-[ \t]*[^\n]*)*)",
    re.M,
)
# What lets a YAML file name Python code; %TAG can hide the tag.
_CODE = re.compile(r"^[^#\n]*!function|^%TAG", re.M)


class Tasks(Group):
    """Tasks of lm-evaluation-harness that score the base, and the model after each stage.

    dtrain's extra `lm-eval` installs it.
    """

    names: Annotated[list[Text], Field(min_length=1)] = Field(
        description="tasks and groups of tasks, such as `arc_easy` or `mmlu`"
    )
    include_path: PathText | None = Field(
        None, description="folder of task files (YAML) in addition to those of the harness"
    )
    trust_remote_code: bool = Field(
        False,
        description=(
            "run the Python code that files in `include_path` name (`!function`), and that of "
            "metrics from the hub"
        ),
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="solved examples in a prompt; default: each task's"
    )
    limit: Count | None = Field(None, description="rows of each task, from the start; default: all")
    seed: Annotated[int, Field(ge=0)] = Field(
        1234, description="of the choice of examples and of sampled answers"
    )
    batch_size: Count = Field(8, description="prompts in a forward pass of a rank")
    every_steps: Count | None = Field(
        None, description="also score during a stage, every so many steps"
    )


def check_tasks(tasks: Tasks, sets: Collection[str]) -> Iterator[Clash]:
    """Errors that need no model: the harness or a file is missing, an unknown name, unwanted code.

    Args:
        sets: names of the evaluation sets, which a task cannot have too.
    """
    spec = find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        message = "lm-evaluation-harness is not installed"
        yield Clash([AT], message, f"pip install 'dtrain[{EXTRA}]'")
        return
    folder = None if tasks.include_path is None else user_path(tasks.include_path)
    if folder is not None and not folder.is_dir():
        yield Clash([(*AT, "include_path")], f"there is no folder {folder}")
        return
    own = {} if folder is None else names_in(folder)
    if folder is not None and not tasks.trust_remote_code:
        yield from _code_in(folder)
    known = own
    if any(name not in own for name in tasks.names):
        known = _harness_names(Path(spec.submodule_search_locations[0]) / "tasks") | own
    for number, name in enumerate(tasks.names):
        key = (*AT, "names", number)
        if name in sets:
            keys: list[Key] = [key, ("evaluation", "sets", name)]
            yield Clash(keys, "both have this name", "rename the set")
        if name not in known:
            fix = nearest_name(name, known, "lm-eval ls tasks", most=3)
            yield Clash([key], f"lm-evaluation-harness has no task {name}", fix)
        elif known[name] == "tag":
            message = f"{name} is a tag of several tasks, which have no score together"
            yield Clash([key], message, "name the tasks")


def names_in(folder: Path) -> dict[str, str]:
    """Names that the YAML files under a folder define, and what each is: task, group or tag."""
    names: dict[str, str] = {}
    for path in sorted(folder.rglob("*.yaml")):
        text = path.read_text("utf-8", errors="replace")
        for kind, value, lines in _NAMES.findall(text):
            listed = value.strip("[]").split(",") if value else lines.split("\n")
            if kind == "task" and not value:
                continue  # the members of a group
            for name in listed:
                if name := name.strip(" \t-\"'"):
                    names[name] = "group" if names.get(name) == "group" else kind
    return names


def _harness_names(folder: Path) -> dict[str, str]:
    """Names of the harness's tasks; read from its files once per version."""
    cached = cache_folder() / "tasks" / f"{EXTRA}-{version(MODULE)}.json"
    try:
        names: dict[str, str] = read_json(cached, dict[str, str])
    except (OSError, UserError):
        names = names_in(folder)
        with suppress(OSError):  # a cache that cannot be written costs a second each time
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_json(cached, names)
    return names


def _code_in(folder: Path) -> Iterator[Clash]:
    """The first line of each task file that names Python code."""
    for path in sorted(folder.rglob("*.yaml")):
        text = path.read_text("utf-8", errors="replace")
        if match := _CODE.search(text):
            line = text.count("\n", 0, match.end()) + 1
            message = f"{path}:{line} runs Python code"
            fix = "read that code; if you trust it, set evaluation.tasks.trust_remote_code=true"
            yield Clash([(*AT, "include_path")], message, fix)
