"""Greedy answers of a plain Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtrain.core.log import Meter


@torch.no_grad()
def answer(
    folder: Path,
    questions: list[str],
    max_new_tokens: int,
    device: torch.device,
    bar: Meter,
    trust_remote_code: bool,
) -> list[str]:
    """Answer each question by greedy decoding.

    On GPUs the model is spread over those of this node (accelerate's device map), so that a
    70B model needs no engine for three questions.
    """
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    placement = "auto" if device.type == "cuda" else None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map=placement, **trust
    ).eval()
    answers = []
    for question in questions:
        prompt = _prompt(tokenizer, question)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(str(tokenizer.decode(new, skip_special_tokens=True)).strip())
        bar.advance()
    return answers


def _prompt(tokenizer: object, question: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        return f"### Instruction:\n{question}\n\n### Response:\n"
    messages = [{"role": "user", "content": question}]
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
    )
