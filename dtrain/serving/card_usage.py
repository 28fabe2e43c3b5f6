"""How to use a merged model or an adapter: the Python and the command of its model card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.config.objectives import OBJECTIVES
from dtrain.config.schema import Stage
from dtrain.core.cache_paths import hub_id
from dtrain.core.errors import UserError
from dtrain.core.files import read_object
from dtrain.core.lazy_import import LazyModule
from dtrain.core.stage_dir import ADAPTER_CONFIG
from dtrain.models.check_base import find_model
from dtrain.models.peft_format import BOTTLENECK, CHAT_TEMPLATE, stop_texts
from dtrain.serving.adapter_list import AdapterInfo, read_adapter
from dtrain.serving.run_models import ServedRun
from dtrain.serving.vllm import command, max_rank, refusals, stored_codes

auto_classes: Any = LazyModule("transformers.models.auto.modeling_auto")
expert_layers: Any = LazyModule("dtrain.models.expert_layers")
load: Any = LazyModule("dtrain.models.load")
meta_model: Any = LazyModule("dtrain.models.meta_model")
quantize: Any = LazyModule("dtrain.models.quantize")
CAUSAL = "AutoModelForCausalLM"
# Stands for the folder or the hub id of what the card describes.
PLACEHOLDER = "THIS_MODEL"
BASE_PLACEHOLDER = "BASE_MODEL"
_NF4 = """\
quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True{more}
    ),
    """


@dataclass(frozen=True)
class Usage:
    """Commands of a model card.

    Attributes:
        code: in Python; empty where neither transformers nor PEFT can load it.
        command: that serves it; empty if vLLM cannot.
        notes: sentences.
    """

    code: str
    command: str
    notes: tuple[str, ...] = ()


def model_usage(folder: Path, stages: list[Stage], trusts_code: bool) -> Usage:
    """How to use a model folder that stages were merged into."""
    chats = any(OBJECTIVES[stage.kind].trains_on_answers for stage in stages)
    chats = chats and _has_template(folder)
    loader = _auto_class(folder)
    code = _pipeline_code(chats, trusts_code) if loader == CAUSAL else _wrapper_code(loader, chats)
    options = [("--trust-remote-code",)] if trusts_code else []
    return Usage(code, command(PLACEHOLDER, options), tuple(_stop_notes(folder)))


def adapter_usage(run: ServedRun, stage: Stage) -> Usage:
    """How to use the adapter of a stage."""
    folder = run.adapter(stage)
    adapter = read_adapter(folder, run.base_of(stage), stage.adapter_name)
    notes = list(_stop_notes(folder))
    trusts_code = run.recipe.model.trust_remote_code
    is_first = run.recipe.parent_of(stage) is None
    base = (hub_id(run.recipe.model.base) if is_first else None) or BASE_PLACEHOLDER
    if base == BASE_PLACEHOLDER:
        notes.append(f"{BASE_PLACEHOLDER} is the folder or the hub id of the base named above.")
    if adapter.config["peft_type"] == BOTTLENECK:
        return Usage("", "", (*notes, "PEFT has no adapters of this kind: dtrain chat loads it."))
    if reasons := refusals(adapter):
        notes.append(f"vLLM does not serve it unmerged: {'; '.join(reasons)}.")
    serve = "" if reasons else _serve_command(adapter, base, trusts_code)
    local = _local_folder(run.base_of(stage), run.recipe.model.revision)
    nf4 = ""
    if adapter.origin.base_in_nf4:
        if why := only_merged(local, trusts_code):
            return Usage("", "", (*notes, f"{why}: merge it, or use dtrain chat."))
        nf4 = nf4_code(local, trusts_code)
    code = _peft_code(base, _auto_class(local), nf4, trusts_code)
    if is_first and run.recipe.model.tokens is not None:
        code = _with_new_tokens(code, trusts_code)
    return Usage(code, serve, tuple(notes))


def only_merged(folder: Path | None, trusts_code: bool) -> str:
    """Why transformers and vLLM do not load a base in NF4 as training did; empty if they do.

    Args:
        folder: as for `_auto_class`.
    """
    if folder is None:
        return ""
    if stored := stored_codes(str(folder)):
        return f"This adapter was trained over a base in NF4 whose files are in {stored}"
    config = load.read_config(folder, trust_remote_code=trusts_code)
    if expert_layers.expert_parameters(meta_model.build_meta_model(config, trusts_code)):
        return "This adapter was trained over experts in NF4, which transformers leaves in 16 bits"
    return ""


def _local_folder(address: str, revision: str | None) -> Path | None:
    try:
        return find_model(address, revision)
    except UserError:  # the card of a run that was moved
        return None


def _auto_class(folder: Path | None) -> str:
    """Name of the auto class of transformers that loads a whole model; a wrapper with its towers.

    Args:
        folder: None for a model that is not on this machine.
    """
    path = folder / "config.json" if folder else None
    kind = read_object(path).get("model_type") if path and path.is_file() else None
    names: dict[str, Any] = auto_classes.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return "AutoModelForMultimodalLM" if kind in names else CAUSAL


def _has_template(folder: Path) -> bool:
    tokenizer = folder / "tokenizer_config.json"
    stored = read_object(tokenizer).get("chat_template") if tokenizer.is_file() else None
    return bool(stored) or (folder / CHAT_TEMPLATE).is_file()


def _pipeline_code(chats: bool, trusts_code: bool) -> str:
    trust = ", trust_remote_code=True" if trusts_code else ""
    lines = [
        "from transformers import pipeline",
        "",
        f'generate = pipeline("text-generation", "{PLACEHOLDER}", dtype="auto"{trust})',
    ]
    if chats:
        lines.append('messages = [{"role": "user", "content": "…"}]')
        lines.append("answer = generate(messages, max_new_tokens=256)[0]")
        lines.append('print(answer["generated_text"][-1]["content"])')
    else:
        lines.append('print(generate("…", max_new_tokens=256)[0]["generated_text"])')
    return "\n".join(lines)


def _wrapper_code(loader: str, chats: bool) -> str:
    """Without a pipeline, which takes text models alone, or needs the libraries for images."""
    prompt = 'tokenizer("…", return_tensors="pt")'
    if chats:
        prompt = (
            "tokenizer.apply_chat_template(\n"
            '    [{"role": "user", "content": "…"}], add_generation_prompt=True,\n'
            '    return_tensors="pt", return_dict=True,\n'
            ")"
        )
    return (
        f"from transformers import {loader}, AutoTokenizer\n"
        "\n"
        f'model = {loader}.from_pretrained("{PLACEHOLDER}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACEHOLDER}")\n'
        f"inputs = {prompt}\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))"
    )


def nf4_code(folder: Path | None, trusts_code: bool) -> str:
    """The argument with which transformers quantizes the layers of a base that dtrain does.

    Args:
        folder: as for `_auto_class`.
    """
    names: list[str] = []
    if folder is not None:
        config = load.read_config(folder, trust_remote_code=trusts_code)
        names = quantize.names_to_skip(config, trusts_code)
    return _NF4.format(
        more=f",\n        llm_int8_skip_modules={json.dumps(names)}" if names else ""
    )


def _peft_code(base: str, loader: str, quantized: str, trusts_code: bool) -> str:
    trust = ", trust_remote_code=True" if trusts_code else ""
    imported = ", BitsAndBytesConfig" if quantized else ""
    return (
        "from peft import PeftModel\n"
        f"from transformers import {loader}, AutoTokenizer{imported}\n"
        "\n"
        f"base = {loader}.from_pretrained(\n"
        f'    "{base}", {quantized}dtype="auto"{trust}\n'
        ")\n"
        f'model = PeftModel.from_pretrained(base, "{PLACEHOLDER}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{base}"{trust})'
    )


def _with_new_tokens(code: str, trusts_code: bool) -> str:
    """The same, with the adapter's tokenizer, and rows for its tokens in the base."""
    trust = ", trust_remote_code=True" if trusts_code else ""
    lines = code.split("\n")[:-1]
    lines[-1:-1] = [
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACEHOLDER}"{trust})',
        "rows = len(base.get_input_embeddings().weight)",
        "base.resize_token_embeddings(max(rows, len(tokenizer)))",
    ]
    return "\n".join(lines)


def _serve_command(adapter: AdapterInfo, base: str, trusts_code: bool) -> str:
    options: list[tuple[str, ...]] = [
        *(("--quantization", "bitsandbytes") for _ in range(adapter.origin.base_in_nf4)),
        ("--enable-lora",),
        ("--lora-modules", f"{adapter.name}={PLACEHOLDER}"),
        ("--max-lora-rank", str(max_rank(adapter.ranks))),
        *(("--trust-remote-code",) for _ in range(trusts_code)),
    ]
    return command(base, options)


def _stop_notes(folder: Path) -> Iterator[str]:
    """The settings with which a server ends an answer."""
    if texts := stop_texts(folder):
        yield f"An answer ends with one of these texts, to send as `stop`: {texts}."
    if (folder / ADAPTER_CONFIG).is_file() and (folder / CHAT_TEMPLATE).is_file():
        yield f"Conversations have the chat template of the file {CHAT_TEMPLATE}."
