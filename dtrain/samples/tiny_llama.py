"""A random Llama of two layers with a small tokenizer, which trains in seconds on any machine.

Embeddings and output matrix are not tied, as in the large models that dtrain is for. The weights
are bit-identical on every machine: they come from the raw 64-bit stream of PCG64, which numpy keeps
stable, and from exact arithmetic (torch's normal_ depends on the vector unit of the CPU).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from dtrain.core.log import console
from dtrain.samples.tiny_text import document, task

SEED = 20240229
VOCABULARY = 512
PAD, BOS, TURN_START, TURN_END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# With a smaller deviation the logits are too flat for the loss to fall in ten steps.
STD_EMBEDDING, STD_LINEAR = 0.1, 0.05


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off the progress bars of transformers; some ignore the setting, and would fill a log."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with nullcontext() if console.is_terminal else redirect_stderr(io.StringIO()):
            yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def make(folder: Path) -> None:
    """Write model, tokenizer and chat template into `folder`, in Hugging Face layout."""
    tokenizer = build_tokenizer()
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
        build_model(tokenizer).save_pretrained(folder)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the text of the recipe `tiny`.

    The text yields only 365 tokens, so the model's vocabulary is larger than the tokenizer's, as in
    many real models, which pad theirs.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of two layers (hidden 64, 4 heads, 2 key/value heads) with seeded weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="float32",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # keep the caller's random state
        model = LlamaForCausalLM(config).float()
    stream = np.random.PCG64(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                is_linear = "proj" in name
                std = STD_LINEAR if is_linear else STD_EMBEDDING
                parameter.copy_(_uniform(stream, tuple(parameter.shape), std))
    return model


def _uniform(stream: np.random.PCG64, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Uniform numbers around 0 with standard deviation `std`, from 24 random bits each."""
    raw = stream.random_raw(int(np.prod(shape))) >> np.uint64(40)
    centered = (raw.astype(np.float64) - (2**23 - 0.5)) / 2**23
    return torch.from_numpy((centered * (std * sqrt(3.0))).astype(np.float32).reshape(shape))


def _training_text() -> list[str]:
    rows = [task(i) for i in range(100)]
    turns = [f"user\n{row['instruction']}\nassistant\n{row['output']}" for row in rows]
    return [*turns, *(document(i) for i in range(100))]
