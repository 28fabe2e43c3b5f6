"""A model in memory that generates text, with adapters that can be switched."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.generation.streamers import BaseStreamer

from dtrain.config.schema import Model
from dtrain.core.cache_paths import sample_name
from dtrain.core.coded_tensors import coded_formats, file_tensors
from dtrain.core.errors import UserError
from dtrain.core.stage_dir import ADAPTER_CONFIG
from dtrain.core.weight_files import read_header
from dtrain.data.chat_templates import answering_template, render_prompt
from dtrain.data.conversations import Conversation, Messages
from dtrain.data.end_of_turn import find_ends
from dtrain.models.bottleneck import load_bottlenecks
from dtrain.models.expert_layers import expert_parameters
from dtrain.models.expert_nf4 import unpack_experts
from dtrain.models.generation import Decoding, generate_texts
from dtrain.models.hub import base_folder
from dtrain.models.load import load_base, load_config, resolve_dtype
from dtrain.models.meta_model import build_meta_model
from dtrain.models.peft_format import BOTTLENECK, WEIGHTS, file_keys, read_adapter_config
from dtrain.models.sharded_loading import stream_base
from dtrain.models.tokenizer import load_tokenizer
from dtrain.objectives.base import adapters_disabled
from dtrain.samples.make import ensure
from dtrain.serving.run_models import ServedModel

# Of PEFT, torch and safetensors, for an adapter of another base or with damaged tensors.
PUT_ON_ERRORS = (
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    SafetensorError,
)

PROMPT = "prompt_embeddings"  # PEFT's key of virtual tokens
ALONE = (BOTTLENECK, PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.PREFIX_TUNING)


class TextGenerator:
    """Answers by greedy decoding, as one `Choice` at a time.

    Args:
        choice: what answers first.
        settings: how the base computes; its `base` is not read, the choice names it.
        device: where; on GPUs the model is spread over those of this machine.
    """

    def __init__(self, choice: ServedModel, settings: Model, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._dtype = resolve_dtype(settings.dtype, device)
        self._model: Any = None
        self._held: tuple[str, bool] | None = None  # base in memory, and whether it is in NF4
        self._family = ""  # of the adapters in memory
        self._names: dict[Path, str] = {}
        self._choice = choice
        self._become(choice)

    def switch(self, choice: ServedModel) -> None:
        """Switch to `choice`; the base is loaded again only if it differs.

        Raises:
            UserError: base or adapter cannot be used; what answered before still does.
        """
        try:
            self._become(choice)
        except BaseException as error:
            if not isinstance(error, UserError):  # Ctrl-C leaves half a model, or half an adapter
                self._held = None
            self._become(self._choice)
            raise

    def _become(self, choice: ServedModel) -> None:
        family = _family(choice)
        is_other_family = "" != self._family != family != ""
        if self._held != (choice.base, choice.quantized) or is_other_family:
            self._load(choice)
        self._family = family or self._family
        for folder in choice.adapters:
            if folder not in self._names:
                self._add(folder)
        if choice.adapters and isinstance(self._model, PeftModel):
            names = [self._names[folder] for folder in choice.adapters]
            tuner: Any = self._model.base_model
            if len(names) == 1:
                self._model.set_adapter(names[0])
            else:
                tuner.set_adapter(names)
        self._template = answering_template(choice.template, self.tokenizer)
        self._choice = choice

    def _load(self, choice: ServedModel) -> None:
        if (sample := sample_name(choice.base)) is not None:
            ensure(sample)
        folder = base_folder(choice.base, revision=self._settings.revision)
        self.tokenizer = load_tokenizer(folder, self._settings.trust_remote_code)
        self._model, self._held = None, None  # two would not fit into memory
        self._names, self._family = {}, ""
        if coded_formats(file_tensors(folder)) or (choice.quantized and self._has_experts(folder)):
            model = self._load_streamed(folder, choice.quantized)
        else:
            model = load_base(
                folder,
                self._settings,
                quantized=choice.quantized,
                dtype=self._dtype,
                device=self._device,
                all_gpus=self._device.type == "cuda",
            )
        model.config.use_cache = True
        self._model, self._held = model.eval(), (choice.base, choice.quantized)

    def _has_experts(self, folder: Path) -> bool:
        config = load_config(folder, self._settings, self._dtype, self._device)
        return bool(expert_parameters(build_meta_model(config, self._settings.trust_remote_code)))

    def _load_streamed(self, folder: Path, quantized: bool) -> Any:
        """Load what transformers would not load as it was trained; not on several GPUs.

        That is a base stored as codes, and one whose experts were in NF4.
        """
        base = stream_base(
            folder, self._settings, quantized=quantized, dtype=self._dtype, device=self._device
        )
        base.materialize(base.model)
        unpack_experts(base.model)
        return base.model

    def _add(self, folder: Path) -> None:
        """Put an adapter on the base; PEFT itself is silent about one that fits only in part."""
        name = f"adapter{len(self._names)}"  # PEFT takes no dots, a stage's name may have some
        read_header(folder / WEIGHTS)  # a file cut short is said here, with its name
        try:
            if odd := self._put_on(folder, name):
                raise ValueError(f"{odd[0]} has no counterpart")
        except PUT_ON_ERRORS as error:
            self._held = None  # what is half put on cannot be taken off
            reason = str(error).strip().split("\n")[-1].strip()
            raise UserError(
                f"does not fit this base: {reason}",
                where=str(folder),
                fix="put it on the base that it was trained on",
            ) from error
        self._model.eval()
        self._names[folder] = name

    def _put_on(self, folder: Path, name: str) -> list[str]:
        """Load an adapter; return the tensors that base and adapter do not both have."""
        if (config := read_adapter_config(folder))["peft_type"] == BOTTLENECK:
            load_bottlenecks(self._model, folder, config)
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
            if not self._names:
                config = PeftConfig.from_pretrained(str(folder))
                config.base_model_name_or_path = None  # PEFT warns that ours has another path
                self._model = get_peft_model(self._model, config, name)
            with _with_plain_keys(folder) as readable:
                result = self._model.load_adapter(readable, name)
        if self._model.peft_config[name].is_prompt_learning:  # PEFT checks the size of the rest
            return [] if _fits(self._model.peft_config[name], self._model.config) else [PROMPT]
        missing = [key for key in result.missing_keys if f".{name}" in key]
        return [*result.unexpected_keys, *missing]

    def prompt(self, messages: Messages) -> str:
        """Return the text that the model continues.

        Raises:
            UserError: the chat template refuses the conversation.
        """
        return render_prompt(self._template, Conversation(messages))

    def answers(
        self, prompts: Sequence[str], max_new_tokens: int, streamer: BaseStreamer | None = None
    ) -> list[str]:
        """An answer to each prompt, in one batch, padded on the left."""
        config = self._model.generation_config
        ends, texts = find_ends(config, self._template, self.tokenizer)
        decoding = Decoding(max_new_tokens, ends, texts)
        with self._as_chosen():
            return generate_texts(self._model, self.tokenizer, prompts, decoding, streamer=streamer)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """[batch, tokens, vocabulary] in float32, of token ids [batch, tokens]."""
        with self._as_chosen():
            logits: Tensor = self._model(input_ids=ids.to(self._model.device)).logits
        return logits[:, -ids.shape[1] :].float()  # not those of virtual tokens

    @contextmanager
    def _as_chosen(self) -> Iterator[None]:
        is_peft = isinstance(self._model, PeftModel)
        off = self._model.disable_adapter() if is_peft else adapters_disabled(self._model)
        with nullcontext() if self._choice.adapters else off:
            yield


def _fits(prompt: PeftConfig, base: PretrainedConfig) -> bool:
    """Whether virtual tokens have the sizes of a base."""
    text: Any = base.get_text_config()
    settings: Any = prompt
    has_width = (
        settings.peft_type == PeftType.PREFIX_TUNING or settings.token_dim == text.hidden_size
    )
    return bool(has_width and settings.num_layers == text.num_hidden_layers)


def _family(choice: ServedModel) -> str:
    """What adapters must share to be in memory at once: PEFT's type, or nothing if there is none.

    A bottleneck adapter is not PEFT's, and PEFT adds no second prompt: they are alone.
    """
    for folder in choice.adapters:
        kind = str(read_adapter_config(folder)["peft_type"])
        return f"{kind} {folder}" if kind in ALONE else kind
    return ""


@contextmanager
def _with_plain_keys(folder: Path) -> Iterator[Path]:
    """An adapter's folder; a copy if its keys hold the adapter's name, which PEFT does not read."""
    stored = file_keys(read_header(folder / WEIGHTS)[0], folder / WEIGHTS)
    if all(key == name for key, name in stored.items()):
        yield folder
        return
    with TemporaryDirectory() as copy:
        shutil.copyfile(folder / ADAPTER_CONFIG, Path(copy) / ADAPTER_CONFIG)
        tensors = load_file(folder / WEIGHTS)
        save_file({key: tensors[name] for key, name in stored.items()}, Path(copy) / WEIGHTS)
        yield Path(copy)
