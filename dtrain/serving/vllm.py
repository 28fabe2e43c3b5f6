"""The commands by which vLLM serves a run: merged, or adapters on their bases. No torch.

What vLLM takes was read in vllm/config/lora.py (ranks), vllm/lora/peft_helper.py (features),
vllm/lora/lora_model.py (names of tensors), vllm/entrypoints/openai/cli_args.py (--lora-modules),
vllm/config/model.py (--generation-config) and docs/features/lora.md.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain.core.cache_paths import cache_folder, hub_id, hub_snapshot, local_path
from dtrain.core.files import read_object, read_text, write_atomic
from dtrain.core.hashes import fingerprint
from dtrain.core.stage_dir import ADAPTER_CONFIG
from dtrain.launching.commands import quote
from dtrain.models.peft_format import CHAT_TEMPLATE, GENERATION, stop_texts
from dtrain.serving.adapter_list import AdapterInfo, list_adapters
from dtrain.serving.run_models import ServedRun, trained_template

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # --max-lora-rank takes no other
# Settings of an adapter, and why vLLM does not serve it under them as it was trained.
REFUSED = {
    "use_dora": "DoRA is refused",
    "modules_to_save": "whole modules (modules_to_save) are refused",
    "lora_bias": "biases are refused",
    "rank_pattern": "ranks by pattern are not read: its layers would be scaled wrongly",
    "alpha_pattern": "alphas by pattern are not read: its layers would be scaled wrongly",
    "layer_replication": "replicated layers are not read",
    "alora_invocation_tokens": "activated LoRA is not read: it would always be on",
    "trainable_token_indices": "trained tokens are refused",
    "target_parameters": "adapters on bare parameters are not read",
}
EMBEDDINGS = ("embed_tokens", "lm_head", "wte")


def script(run: ServedRun) -> str:
    """Commands to choose from, with what there is to know before as comments."""
    commands = ["# Each command below is a server of its own; choose one.", *_merged(run)]
    for adapters in _groups(list_adapters(run.folder)):
        commands.append(_adapters(run, adapters))
    if len(commands) == 1:
        commands.append("# Nothing can be served yet: no stage is complete.")
    return "\n\n".join(commands) + "\n"


def _merged(run: ServedRun) -> Iterator[str]:
    for stage in reversed(run.recipe.stages):
        if run.has_merged(stage):
            model = str(run.merged(stage))
            options = [("--served-model-name", run.recipe.name), *_model_options(run)]
            head = f"# The merged model of stage {stage.name}: trained in all stages up to it."
            folders = [run.merged(stage)]
            notes, chat = _notes(run, folders), _chat_options(run, folders)
            yield "\n".join([_comment(head), *notes, command(model, [*options, *chat])])
            return


def _groups(adapters: list[AdapterInfo]) -> list[list[AdapterInfo]]:
    """Adapters of one base, in one form, may share a server."""
    groups: dict[tuple[str, bool], list[AdapterInfo]] = {}
    for adapter in adapters:
        groups.setdefault((adapter.base, adapter.origin.base_in_nf4), []).append(adapter)
    return list(groups.values())


def _adapters(run: ServedRun, adapters: list[AdapterInfo]) -> str:
    base, quantized = adapters[0].base, adapters[0].origin.base_in_nf4
    taken = [adapter for adapter in adapters if not refusals(adapter)]
    names = [adapter.name for adapter in adapters]
    lines = [_comment(f"# Adapters of one base ({', '.join(names)}): {base}")]
    for adapter in adapters:
        lines += [_comment(f"# {adapter.name}: {why}") for why in refusals(adapter)]
        lines += [_comment(f"# {adapter.name}: {note}") for note in cautions(adapter)]
    if quantized and (stored := stored_codes(base)):
        why = f"Trained over this base in NF4; vLLM cannot load files in {stored} as NF4."
        lines.append(_comment(f"# {why}"))
        taken = []
    if not taken:
        instead = _instead(run, adapters)
        return "\n".join([*lines, _comment(f"# None of them can be served so: {instead}.")])
    if quantized:
        lines.append(
            "# Trained over this base in NF4: over the plain base they give other answers."
        )
    options = [*(("--quantization", "bitsandbytes") for _ in range(quantized)), *_lora(taken)]
    merged = [run.merged(stage) for stage in run.recipe.stages]
    folders = [*(m for m in merged if str(m) == base), *(adapter.folder for adapter in taken)]
    options += [*_model_options(run), *_chat_options(run, folders)]
    return "\n".join([*lines, *_notes(run, folders), command(base, options)])


def _instead(run: ServedRun, adapters: list[AdapterInfo]) -> str:
    """What to do with adapters that vLLM does not serve."""
    names = [adapter.name for adapter in adapters]
    stages = [stage for stage in run.recipe.stages if stage.name in names]
    if any(stage.method.traits.cannot_merge for stage in stages):
        return "use dtrain chat or dtrain generate"
    if len(stages) == len(adapters) and all(run.has_merged(stage) for stage in stages):
        return "serve the merged model"
    merged = {stage.name for stage in stages if run.has_merged(stage)}
    first = next(adapter for adapter in adapters if adapter.name not in merged)
    words = " ".join(quote(str(word)) for word in (first.base, first.folder))
    return f"merge it with `dtrain merge {words} OUT`, and serve OUT"


def stored_codes(base: str) -> str:
    """The format in which a base is already quantized, as far as it is here; else empty."""
    folder = hub_snapshot(base) if hub_id(base) else Path(base)
    config = folder / "config.json" if folder else None
    known = read_object(config) if config and config.is_file() else {}
    settings = known.get("quantization_config")
    return str(settings.get("quant_method")) if isinstance(settings, dict) else ""


def _lora(adapters: list[AdapterInfo]) -> list[tuple[str, ...]]:
    modules = [module(adapter.name, adapter.folder) for adapter in adapters]
    rank = max_rank([rank for adapter in adapters for rank in adapter.ranks])
    return [
        ("--enable-lora",),
        ("--lora-modules", *modules),
        ("--max-lora-rank", str(rank)),
        ("--max-loras", str(len(adapters))),  # those that one batch may mix
    ]


def refusals(adapter: AdapterInfo) -> list[str]:
    """Why vLLM would not serve an adapter, or not as it was trained; empty if it would."""
    config = adapter.config
    if config["peft_type"] != "LORA":
        return [f"{config['peft_type']} is not LoRA: refused"]
    reasons = [why for key, why in REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append(REFUSED["lora_bias"])
    if max_rank(adapter.ranks) is None:
        reasons.append(f"rank {max(adapter.ranks)}: the greatest that is served is {RANKS[-1]}")
    known = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    odd = sorted(key for key in adapter.shapes if not key.endswith(known))
    if odd and not reasons:
        reasons.append(f"{odd[0]} is refused")
    return reasons


def cautions(adapter: AdapterInfo) -> list[str]:
    """What may be refused, by the model's architecture."""
    tables = sorted(set(adapter.targets) & set(EMBEDDINGS))
    message = f"on {' and '.join(tables)}, which vLLM supports for some architectures only"
    return [message] if tables else []


def max_rank(ranks: Sequence[int]) -> int | None:
    """The least --max-lora-rank that holds all; None if there is none."""
    return next((rank for rank in RANKS if rank >= max(ranks, default=1)), None)


def module(name: str, folder: Path) -> str:
    """An argument of --lora-modules: name=path, or JSON where that would be read wrongly."""
    if any(sign in f"{name}{folder}" for sign in "=,"):
        return json.dumps({"name": name, "path": str(folder)})
    return f"{name}={folder}"


def command(model: str, options: Sequence[tuple[str, ...]]) -> str:
    """A command line for bash, one option a line."""
    lines = [f"vllm serve {quote(model)}", *(" ".join(map(quote, option)) for option in options)]
    return " \\\n    ".join(lines)


def _model_options(run: ServedRun) -> list[tuple[str, ...]]:
    """What the recipe says of the model: compute as in training, code."""
    dtype = "float32" if run.recipe.model.dtype == "float32" else "bfloat16"
    options: list[tuple[str, ...]] = [("--dtype", dtype)]
    if run.recipe.model.trust_remote_code:
        options.append(("--trust-remote-code",))
    return options


def _chat_options(run: ServedRun, folders: Sequence[Path]) -> list[tuple[str, ...]]:
    """The chat template and the ends of an answer, where the model's own folder has others."""
    options: list[tuple[str, ...]] = []
    template = trained_template(folders, run.recipe.chat_template)
    templates = [run.merged(stage) / CHAT_TEMPLATE for stage in run.recipe.stages]
    if template not in ("auto", "instruction", *map(str, templates)):
        options.append(("--chat-template", str(_template_file(local_path(template)))))
    ends = [folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()]
    ends = [folder for folder in ends if (folder / GENERATION).is_file()]
    if ends:
        options.append(("--generation-config", str(ends[-1])))
    return options


def _template_file(path: Path) -> Path:
    """The template, or a copy without its byte-order mark, which vLLM would write into prompts."""
    if not (path.is_file() and path.read_bytes().startswith(BOM_UTF8)):
        return path.absolute()
    text = read_text(path)
    copy = cache_folder() / "templates" / f"{fingerprint(text)[:32]}.jinja"
    write_atomic(copy, text)
    return copy


def _notes(run: ServedRun, folders: Sequence[Path]) -> list[str]:
    notes = []
    if trained_template(folders, run.recipe.chat_template) == "instruction":
        notes += [
            "# Trained with the instruction template, which no chat template of the model's "
            "repeats:",
            "# ask /v1/completions with '### Instruction:\\n…\\n\\n### Response:\\n'.",
        ]
    for folder in folders:
        if texts := stop_texts(folder):
            stop = json.dumps({"stop": texts}, ensure_ascii=False)
            notes.append(
                _comment(f"# Its turns end with a text, so send {stop} with each request.")
            )
    return [*dict.fromkeys(notes)]


def _comment(line: str) -> str:
    """A comment stays one, whatever a folder is called."""
    return line.replace("\n", "\\n").replace("\r", "\\r")
