"""Write a first recipe for a base, data and GPUs, each choice with its reason.

The choices follow dtrain/recipes/GUIDE.md; the plan chooses the method and the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.config.schema import Recipe
from dtrain.config.yaml_document import parse_value
from dtrain.core.errors import UserError
from dtrain.core.units import count
from dtrain.data.end_of_turn import check_template
from dtrain.models.check_base import find_model
from dtrain.pipeline.data_survey import DataSurvey
from dtrain.planning.choose import resolve
from dtrain.planning.fit import FITS
from dtrain.planning.known_models import find_config, find_shape, trained_positions
from dtrain.planning.plan import make_plan
from dtrain.planning.shapes import ModelShape
from dtrain.planning.workload import Cluster

KINDS = {"text": "cpt", "conversation": "sft", "preference": "dpo", "labeled answer": "kto"}
NAMES = {"cpt": "domain", "sft": "task", "dpo": "preference", "kto": "ratings"}
TITLES = {
    "cpt": "continued pretraining: loss on every token of the texts",
    "sft": "fine-tuning: loss on the answers only",
    "dpo": "preferences: the chosen answer becomes likelier than the rejected one",
    "kto": "ratings: good answers become likelier, bad ones less likely",
}
LARGE_MODEL = 30e9  # parameters from which the learning rate is halved
SEQUENCE_LENGTH, CPU_SEQUENCE_LENGTH = 2048, 512
MIN_STEPS, MAX_BATCH_SIZE = 30, 32


@dataclass(frozen=True)
class Choice:
    """A value and the reason for it."""

    value: float
    reason: str


@dataclass(frozen=True)
class Hardware:
    """What a recipe trains on.

    Attributes:
        cluster: its GPUs; None for CPUs.
    """

    cluster: Cluster | None

    @property
    def ranks(self) -> int:
        """Ranks of the whole job."""
        return self.cluster.ranks if self.cluster else 1


@dataclass(frozen=True)
class StageDraft:
    """The choices of a stage.

    Attributes:
        template: of conversations; empty for texts.
    """

    kind: str
    data: DataSurvey
    sequence_length: int
    r: Choice
    rate: Choice
    epochs: Choice
    batch: Choice
    template: str


@dataclass(frozen=True)
class Draft:
    """The choices of a recipe.

    Attributes:
        method: lora or qlora.
        engine: settings of `engine`, as YAML.
        why: the reason for method and engine.
    """

    name: str
    base: str
    hardware: Hardware
    stages: tuple[StageDraft, ...]
    method: str = "lora"
    checkpointing: bool = False
    engine: str = "{kind: ddp}"
    why: str = "one process on CPUs"


def draft_recipe(name: str, base: str, surveys: Sequence[DataSurvey], hardware: Hardware) -> Draft:
    """Choose everything for a first recipe.

    Args:
        name: of the recipe.
        base: folder, hub id or sample.
        surveys: of the data; each kind of content becomes a stage.

    Raises:
        UserError: the base's sizes are not known, or it does not fit on the GPUs.
    """
    shape, _ = find_shape(base)
    length = _sequence_length(base, hardware)
    template = _template(base)
    kinds = list(KINDS.values())
    ordered = sorted(surveys, key=lambda survey: kinds.index(KINDS[survey.content]))
    stages = (_draft_stage(s, shape, length, template, hardware) for s in ordered)
    draft = Draft(name, base, hardware, tuple(stages))
    return _planned(draft, hardware.cluster) if hardware.cluster else draft


def _sequence_length(base: str, hardware: Hardware) -> int:
    known = trained_positions(find_config(base)[0]) or SEQUENCE_LENGTH
    return min(known, SEQUENCE_LENGTH if hardware.cluster else CPU_SEQUENCE_LENGTH)


def _template(base: str) -> str:
    """The base's own template, or that of instructions if it has none."""
    folder = find_model(base)
    if folder is None:
        is_chat = re.search(r"(?i)instruct|chat|[-_]it\b|dtrain:", base)
        return "auto" if is_chat else "instruction"
    try:
        check_template("auto", folder)
    except UserError:
        return "instruction"
    return "auto"


def _draft_stage(
    data: DataSurvey, shape: ModelShape, length: int, template: str, hardware: Hardware
) -> StageDraft:
    kind = KINDS[data.content]
    epochs = _epochs(kind, data)
    return StageDraft(
        kind=kind,
        data=data,
        sequence_length=length,
        r=_rank(kind, data),
        rate=_rate(kind, shape),
        epochs=epochs,
        batch=_batch(data.tokens * epochs.value / length, hardware.ranks),
        template="" if kind == "cpt" and data.content == "text" else template,
    )


def _rank(kind: str, data: DataSurvey) -> Choice:
    if kind == "cpt":
        if data.tokens < 5_000_000:
            return Choice(32, "domain knowledge takes 32 to 64; the texts are few")
        return Choice(64, "domain knowledge takes 32 to 64")
    if kind in ("dpo", "kto"):
        return Choice(16, "the usual rank; preferences change little")
    if data.rows < 500:
        return Choice(8, "few rows: a small adapter overfits later")
    if data.rows < 20_000:
        return Choice(16, "the usual rank for one task")
    return Choice(32, "many rows, so perhaps many tasks")


def _rate(kind: str, shape: ModelShape) -> Choice:
    if kind in ("dpo", "kto"):
        return Choice(2e-5, "preferences take 5e-6 to 5e-5")
    if shape.parameters >= LARGE_MODEL:
        return Choice(1e-4, "for adapters of models of 30B and more; halve it if the loss jumps")
    return Choice(2e-4, "for adapters; halve it if the loss jumps")


def _epochs(kind: str, data: DataSurvey) -> Choice:
    if kind in ("dpo", "kto"):
        return Choice(1, "preferences overfit fast")
    if kind == "cpt":
        if data.tokens < 2_000_000:
            return Choice(2, "few texts; more repeats teach them by heart")
        return Choice(1, "the texts once")
    if data.rows < 5_000:
        return Choice(3, "few rows; watch the held-out loss for overfitting")
    if data.rows < 50_000:
        return Choice(2, "1 to 3; fewer with more rows")
    return Choice(1, "many rows")


def _batch(sequences: float, ranks: int) -> Choice:
    """The largest of the usual batches that leaves enough steps and divides among the ranks."""
    sizes = [ranks]
    while sizes[-1] * 2 <= max(MAX_BATCH_SIZE, ranks):
        sizes.append(sizes[-1] * 2)
    enough = [size for size in sizes if sequences / size >= MIN_STEPS]
    if enough:
        return Choice(max(enough), "over all ranks; 16 to 32 is usual")
    return Choice(ranks, "over all ranks; small, because the data make few steps")


def _planned(draft: Draft, cluster: Cluster) -> Draft:
    """The draft with the first method that fits, and the engine that the plan chooses for it.

    Raises:
        UserError: none fits.
    """
    auto = replace(draft, engine="{kind: auto}")
    tried = [replace(auto, method=method, checkpointing=recompute)
             for method in ("lora", "qlora") for recompute in (False, True)]  # fmt: skip
    for candidate in tried:
        recipe = _recipe_of(candidate)
        if make_plan(recipe, cluster).verdict == FITS:
            engine = resolve(recipe, cluster).engine
            shard = ", shard: node" if engine.shard == "node" else ""
            settings = f"{{kind: {engine.kind}{shard}}}"
            return replace(candidate, engine=settings, why=_why(candidate, engine.kind))
    raise UserError(
        f"does not fit on {cluster}, even in 4 bits with recomputed activations",
        where=draft.base,
        fix="more or larger GPUs (--gpus, --nodes, --gpu), or a smaller base",
    )


def _why(draft: Draft, engine: str) -> str:
    bits = "in 16 bits" if draft.method == "lora" else "only in 4 bits"
    copies = {"ddp": "a copy on each GPU"}.get(engine, "its weights shared among the GPUs")
    return f"by the plan the base fits {bits}, {copies}"


def _recipe_of(draft: Draft) -> Recipe:
    return Recipe.model_validate(parse_value(recipe_text(draft), draft.name))


def recipe_text(draft: Draft) -> str:
    """The recipe as YAML, with the reasons as comments."""
    return "\n".join(_lines(draft)) + "\n"


def _lines(draft: Draft) -> Iterator[str]:
    processes = draft.hardware.cluster.gpus_per_node if draft.hardware.cluster else 1
    yield "# Written by `dtrain init`. dtrain/recipes/README.md has all keys, GUIDE.md says which."
    yield f"name: {_quoted(draft.name)}"
    yield "model:"
    yield f"  base: {_quoted(draft.base)}"
    if draft.checkpointing:
        yield "  gradient_checkpointing: true  # a third more time; without it, it does not fit"
    if draft.hardware.cluster is None:
        yield "device: cpu"
    yield f"engine: {draft.engine}  # {draft.why}"
    yield f"launch: {{processes: {processes}}}  # ranks on each node"
    yield "stages:"
    for number, stage in enumerate(draft.stages):
        yield from _stage_lines(draft, stage, is_first=number == 0)
    yield "evaluation:"
    yield "  sets:  # measured before the first stage and after each; add held-out rows of your own"
    yield "    general: {kind: cpt, sequence_length: 128,  # short texts that show forgetting"
    yield '              sources: [{path: "dtrain:general/heldout.jsonl", format: text}]}'
    yield f"output: {{folder: {_quoted(f'runs/{draft.name}')}}}"


def _stage_lines(draft: Draft, stage: StageDraft, *, is_first: bool) -> Iterator[str]:
    start = "" if is_first else "  # starts from the merged model of the stage before"
    yield f"  - name: {NAMES[stage.kind]}{start}"
    yield f"    kind: {stage.kind}  # {TITLES[stage.kind]}"
    r, rate = int(stage.r.value), f"{stage.rate.value:.1e}"
    yield f"    method: {{kind: {draft.method}, r: {r}, alpha: {2 * r}}}  # {stage.r.reason}"
    yield "    data:"
    rows = f"{stage.data.rows:,} {'documents' if stage.kind == 'cpt' else 'rows'}"
    yield f"      sources:  # about {rows}, {count(stage.data.tokens)} tokens"
    for path in stage.data.paths:
        yield f"        - {{path: {_quoted(path)}, format: {stage.data.row_format}}}"
    yield f"      sequence_length: {stage.sequence_length}"
    if stage.template:
        own = stage.template == "auto"
        why = "the base's own" if own else "no chat template of the base is known"
        yield f"      template: {stage.template}  # {why}"
    yield "      # replay: {path: general.jsonl, ratio: 0.05}  # rows of what it must not forget"
    yield "    train:"
    yield f"      global_batch_size: {int(stage.batch.value)}  # {stage.batch.reason}"
    if draft.hardware.cluster:
        yield "      micro_batch_size: auto  # as many sequences at once as fit"
    yield f"      learning_rate: {rate}  # {stage.rate.reason}"
    yield f"      epochs: {stage.epochs.value:g}  # {stage.epochs.reason}"
    if draft.method == "qlora":
        yield "      max_grad_norm: 0.3  # QLoRA needs less than the usual 1.0"
    yield "      checkpoint_every_steps: 100"


def _quoted(text: str) -> str:
    """A text as YAML."""
    return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else json.dumps(text)


def recipe_name(data: Sequence[str]) -> str:
    """A name from the first path of the data."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data[0]).stem).strip("-.")
    return stem or "mine"
