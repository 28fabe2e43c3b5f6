"""Loads a model's tokenizer and fingerprints it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dtrain.core.errors import UserError
from dtrain.core.hashes import fingerprint


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        UserError: it is missing or broken, or needs code that the recipe does not allow.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers also raises plain Exception
        fix = "put the tokenizer's files into the model's folder"
        if "trust_remote_code" in str(error):
            fix = "read that code, then set model.trust_remote_code: true"
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the tokenizer cannot be loaded: {reason}", where=str(folder), fix=fix
        ) from error
    if len(tokenizer) == 0:
        raise UserError("the tokenizer has no tokens", where=str(folder))
    tokenizer.chat_template = _without_bom(tokenizer.chat_template)
    return tokenizer


def _without_bom(template: Any) -> Any:
    """A chat template, or several by name, without a byte-order mark."""
    if isinstance(template, dict):
        return {name: _without_bom(text) for name, text in template.items()}
    return template.removeprefix("\ufeff") if isinstance(template, str) else template


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that turns text into token ids: vocabulary, rules, specials, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        json.loads(backend.to_str()) if backend is not None else {"type": type(tokenizer).__name__}
    )
    for setting in ("truncation", "padding"):  # left over from the last call
        rules.pop(setting, None)
    return fingerprint(
        {
            "rules": rules,
            "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]),
            "special": {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())},
            "add_bos": bool(getattr(tokenizer, "add_bos_token", False)),
            "add_eos": bool(getattr(tokenizer, "add_eos_token", False)),
            "template": tokenizer.chat_template,
        }
    )
