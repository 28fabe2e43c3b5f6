"""The model card of a merged model or an adapter: README.md, with the YAML header of the hub.

It is written from what the run folder records, after the files that hashes cover: it is no part of
a model's identity, so a person may edit it. All text from recipes and data is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from jinja2 import Environment, StrictUndefined, Template
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dtrain.config.schema import Stage
from dtrain.core.cache_paths import hub_id, local_path
from dtrain.core.coded_tensors import coded_formats, file_tensors
from dtrain.core.errors import UserError
from dtrain.core.files import read_text, write_atomic
from dtrain.core.output import printable
from dtrain.core.run_dir import RECIPE
from dtrain.core.stage_dir import ADAPTER_CONFIG, STAGE_RECORD
from dtrain.models.peft_format import read_adapter_config
from dtrain.monitoring.run_record import RunRecord, describe_used, read_run
from dtrain.serving.card_training import environment_text, held_out_table, settings_text, stage_row
from dtrain.serving.card_usage import Usage, adapter_usage, model_usage
from dtrain.serving.run_models import ServedRun, open_run

README = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_SPECIAL = re.compile(r"([\\`*_\[\]{}()<>#|~&!$])")


class Markdown(str):
    """Text that is Markdown already."""


@dataclass(frozen=True)
class BaseModel:
    """The original base of a model.

    Attributes:
        name: for people.
        hub: its id on the hub, if it is known.
        license: keys of the header about its license.
        license_text: a sentence.
        codes: formats of codes that its files store instead of floats.
    """

    name: str
    hub: str | None
    license: dict[str, Any]
    license_text: str
    codes: Sequence[str] = ()


def write_stage_cards(run: ServedRun, stage: Stage) -> None:
    """Write the cards of a complete stage's adapter and merged model, where there are none."""
    adapter, merged = run.adapter(stage), run.merged(stage)
    if adapter.parent.is_symlink():  # reused from another run, whose folder stays as it is
        return
    if (adapter / ADAPTER_CONFIG).is_file():
        write_card(adapter, adapter_card(run, stage))
    if run.has_merged(stage):
        write_card(merged, merged_card(run, stage, merged))


def write_card(folder: Path, card: str) -> None:
    """Write the card of a model that is complete, unless it has one."""
    if not (folder / README).exists():
        write_atomic(folder / README, card)


def adapter_card(run: ServedRun, stage: Stage) -> str:
    """The card of a stage's adapter."""
    base, record = _run_base(run), read_run(run.folder)
    parent = run.recipe.parent_of(stage)
    summary = f"An adapter for {_link(base)}"
    if parent is not None:
        summary = (
            f"An adapter for the merged model of stage {md(parent.name)}, not for {_link(base)}"
        )
    if stage.method.traits.quantizes_base:
        summary += ", which was in NF4 while it was trained"
    header = _header(base, record, [stage], "peft", "adapter")
    title = f"{run.recipe.name} {stage.name}"
    chain = _chain(run, stage)
    summary = f"{summary}.{_new_tokens(run)}"
    return _render(header, title, summary, base, adapter_usage(run, stage), chain, record)


def merged_card(run: ServedRun, stage: Stage, folder: Path, checkpoint: str = "") -> str:
    """The card of a stage's merged model.

    Args:
        folder: of the model.
        checkpoint: name of the checkpoint that it was merged from, instead of the stage's end.
    """
    base, record, chain = _run_base(run), read_run(run.folder), _chain(run, stage)
    base = _with_license_file(base, folder)
    header = _header(base, record, chain, "transformers", "finetune")
    stages = "stage" if len(chain) == 1 else "stages"
    summary = f"{_link(base)}, fine-tuned in {len(chain)} {stages}.{_codes_note(base)}"
    summary += _new_tokens(run)
    if checkpoint:
        summary += f" The last stage is at its checkpoint {md(checkpoint)}, which was not measured."
        record = replace(record, evaluation={}, lineage={})
    usage = model_usage(folder, chain, run.recipe.model.trust_remote_code)
    return _render(header, run.recipe.name, summary, base, usage, chain, record)


def combined_card(
    base: str, base_folder: Path, adapters: Mapping[Path, float], method: str, folder: Path
) -> str:
    """The card of adapters that were merged into a base, of which no run has measured the result.

    Args:
        base: as the command named it.
        adapters: with the factor of each.
        method: by which they were combined; empty if they were added one after another.
        folder: of the merged model.
    """
    about = _with_codes(base_model(base, base_folder), base_folder)
    about = _with_license_file(about, folder)
    names = [
        f"{weight:g} x {md(_short_name(path))} ({_peft_method(path)})"
        for path, weight in adapters.items()
    ]
    how = f", combined by {md(method)}" if method else ""
    summary = f"{_link(about)} with {', '.join(names)} merged into it{how}.{_codes_note(about)}"
    found = (run_stage_of(path) for path in adapters)
    stages = [(run, stage) for run, stage in filter(None, found)]
    data = ModelCardData(
        base_model=about.hub, library_name="transformers", pipeline_tag="text-generation",
        tags=["dtrain"], **about.license,
    )  # fmt: skip
    usage = model_usage(folder, [stage for _, stage in stages], trusts_code=False)
    record = RunRecord(folder)
    return _render(data, folder.name, summary, about, usage, [s for _, s in stages], record)


def run_stage_of(result: Path) -> tuple[ServedRun, Stage] | None:
    """The run and the stage whose adapter or merged model a folder is; None if it is no run's."""
    stage = result.absolute().parent
    if not ((stage / STAGE_RECORD).is_file() and (stage.parent / RECIPE).is_file()):
        return None
    run = open_run(stage.parent)
    found = (each for each in run.recipe.stages if each.name == stage.name)
    return next(((run, each) for each in found), None)


def measured_stage(base: Path, adapters: Sequence[Path]) -> tuple[ServedRun, Stage] | None:
    """The stage of a run whose merged model a base and adapters, one after the other, make.

    None if they are not consecutive stages of one run on their own base.
    """
    found = [run_stage_of(path) for path in adapters]
    if None in found or len({run.folder for run, _ in filter(None, found)}) != 1:
        return None
    stages = [stage for _, stage in filter(None, found)]
    run = next(run for run, _ in filter(None, found))
    follows = all(run.recipe.parent_of(b) == a for a, b in pairwise(stages))
    is_base = Path(run.base_of(stages[0])).resolve() == base.resolve()
    return (run, stages[-1]) if follows and is_base else None


def base_model(address: str, folder: Path) -> BaseModel:
    """What is known of a base by its address and the card in its folder."""
    header = _read_header(folder / README)
    hub = hub_id(address)
    if hub is None and isinstance(named := header.get("base_model"), str):
        hub = hub_id(named)  # it was itself made by dtrain or another trainer
    name = hub or _short_name(folder)
    keys = ("license", "license_name", "license_link")
    known = {key: header[key] for key in keys if _is_line(header.get(key))}
    if "license" not in known:
        return BaseModel(name, hub, {}, "No license is stated with the base; ask its authors.")
    link = known.get("license_link", "")
    if link and "://" not in link:
        known.pop("license_link")
        if hub:
            known["license_link"] = f"https://huggingface.co/{hub}/blob/main/{link}"
    terms = known.get("license_name") or known["license"]
    return BaseModel(name, hub, known, f"The base has the license {md(terms)}.")


def _with_codes(base: BaseModel, folder: Path) -> BaseModel:
    with suppress(UserError):  # its files may be gone
        return replace(base, codes=coded_formats(file_tensors(folder)))
    return base


def _codes_note(base: BaseModel) -> str:
    """How a merged model differs from a base that is stored as codes."""
    if not base.codes:
        return ""
    return f" The base is stored in {' and '.join(base.codes)}; this model is in bfloat16."


def _run_base(run: ServedRun) -> BaseModel:
    model = run.recipe.model
    base = _with_codes(base_model(model.base, Path(run.base)), Path(run.base))
    if model.tokens is None or base.hub is not None:
        return base
    return replace(base, name=local_path(model.base).name)  # its folder in the cache has none


def _with_license_file(base: BaseModel, folder: Path) -> BaseModel:
    """The base, with the license file that was copied into the merged model."""
    files = sorted(path.name for path in folder.glob("LICENSE*") if path.is_file())
    if not files:
        return base
    text = f"{base.license_text} Its file {md(files[0])} is in this folder."
    if base.license:
        return replace(base, license_text=text)
    known = {"license": "other", "license_name": "license-of-the-base", "license_link": files[0]}
    text = f"The license of the base is in the file {md(files[0])}."
    return replace(base, license=known, license_text=text)


def _read_header(path: Path) -> dict[str, Any]:
    """The YAML header of a card; empty if there is none that can be read."""
    try:
        found = REGEX_YAML_BLOCK.search(read_text(path))
        content = YAML(typ="safe").load(found[2]) if found else {}
    except (OSError, UserError, ValueError, YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_line(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def _header(
    base: BaseModel, record: RunRecord, stages: Sequence[Stage], library: str, relation: str
) -> ModelCardData:
    facts = [record.artifacts.get(stage.name, {}) for stage in stages]
    sources = [source for artifact in facts for source in artifact.get("sources") or []]
    datasets = sorted({str(source["name"]) for source in sources if source.get("on_hub")})
    kinds = [kind for stage in stages for kind in (stage.kind, stage.method.kind)]
    return ModelCardData(
        base_model=base.hub,
        base_model_relation=relation if base.hub else None,
        datasets=datasets or None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["dtrain", *kinds])),
        **base.license,
    )


def _new_tokens(run: ServedRun) -> str:
    tokens = run.recipe.model.tokens
    names = ", ".join(md(token) for token in tokens.words) if tokens else ""
    return f" New tokens: {names}." if tokens else ""


def _chain(run: ServedRun, stage: Stage) -> list[Stage]:
    """The stages whose results a stage's model contains, the first one first."""
    parent = run.recipe.parent_of(stage)
    return [*(_chain(run, parent) if parent else []), stage]


def _render(
    header: ModelCardData,
    title: str,
    summary: str,
    base: BaseModel,
    usage: Usage,
    stages: Sequence[Stage],
    record: RunRecord,
) -> str:
    settings = settings_text(stages)
    text = _template().render(
        title=title,
        summary=Markdown(summary),
        notes=[
            f"Stage {name} is {describe_used(facts)}."
            for name, facts in record.artifacts.items()
            if facts.get("used") and any(stage.name == name for stage in stages)
        ],
        stages=[stage_row(stage, record) for stage in stages],
        usage=usage,
        held_out=held_out_table(record, stages),
        settings=settings,
        fence="`" * max(3, *(len(run) + 1 for run in re.findall("`+", settings) or [""])),
        environment=environment_text(record, stages),
        license=Markdown(base.license_text),
    )
    return f"---\n{header.to_yaml()}\n---\n\n{text}"


@cache
def _template() -> Template:
    environment = Environment(
        undefined=StrictUndefined, finalize=md, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["raw"] = Markdown
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def md(value: object) -> str:
    """A text in one line of Markdown that shows exactly these characters."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_SPECIAL.sub(r"\\\1", " ".join(printable(str(value)).split())))


def _link(base: BaseModel) -> str:
    return f"[{md(base.hub)}](https://huggingface.co/{base.hub})" if base.hub else md(base.name)


def _short_name(path: Path) -> str:
    """The last name of a path, or the stage's of an adapter: folders above it are the user's."""
    path = path.absolute()
    return path.parent.name if run_stage_of(path) is not None else path.name


def _peft_method(adapter: Path) -> str:
    config = read_adapter_config(adapter)
    rank = f", r = {config['r']}" if config.get("r") else ""
    return md(f"{config['peft_type']}{rank}")
