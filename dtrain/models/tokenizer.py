"""The tokenizer that lies beside a model."""

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
        UserError: there is none, it is broken, or it needs code that the recipe does not allow.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers and tokenizers raise bare Exceptions too
        fix = "put the tokenizer's files beside the model's weights"
        if "trust_remote_code" in str(error):
            fix = "read that code, then set model.trust_remote_code: true"
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the tokenizer cannot be loaded: {reason}", where=str(folder), fix=fix
        ) from error
    if len(tokenizer) == 0:
        raise UserError("the tokenizer has no tokens", where=str(folder))
    tokenizer.chat_template = _without_mark(tokenizer.chat_template)
    return tokenizer


def _without_mark(template: Any) -> Any:
    """A chat template, or several by name, without the byte-order mark of the file it was in."""
    if isinstance(template, dict):
        return {name: _without_mark(text) for name, text in template.items()}
    return template.removeprefix("\ufeff") if isinstance(template, str) else template


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that turns text into token ids: vocabulary, rules, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        json.loads(backend.to_str()) if backend is not None else {"type": type(tokenizer).__name__}
    )
    for passing in ("truncation", "padding"):  # left behind by the last call
        rules.pop(passing, None)
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
