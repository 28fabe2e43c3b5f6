"""Loads a model's tokenizer and fingerprints it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dtrain.core.errors import UserError, first_line
from dtrain.core.hashes import fingerprint
from dtrain.core.lazy_import import LazyModule
from dtrain.core.weight_files import has_tokenizer, processor_template
from dtrain.planning.architectures import read_config

# Seconds to import, and only a tokenizer that cannot be loaded needs it.
load: Any = LazyModule("dtrain.models.load")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, with the chat template of its processor if it has none.

    Raises:
        UserError: it is missing or broken, or needs code that the recipe does not allow; or the
            model's config is broken, which transformers reads to choose the tokenizer.
    """
    fix = "put the tokenizer's files into the model's folder"
    if not has_tokenizer(folder):  # transformers makes one without words for some models
        message = "the tokenizer cannot be loaded: there is no file of one, such as tokenizer.json"
        raise UserError(message, where=str(folder), fix=fix)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers also raises plain Exception
        if (path := folder / "config.json").is_file():
            load.parse_config(folder, read_config(path), trust_remote_code)
        if "trust_remote_code" in str(error):
            fix = "read that code, then set model.trust_remote_code: true"
        raise UserError(
            f"the tokenizer cannot be loaded: {first_line(error)}", where=str(folder), fix=fix
        ) from error
    if len(tokenizer) == 0:
        raise UserError("the tokenizer has no tokens", where=str(folder))
    template = tokenizer.chat_template or processor_template(folder)
    tokenizer.chat_template = _without_bom(template)
    return tokenizer


def tokenizer_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str:
    """What the second tokenizer does otherwise, so that ids mean other tokens; empty if nothing."""
    theirs = second.get_vocab()
    ours = dict(sorted(first.get_vocab().items(), key=lambda item: item[1]))
    if missing := [token for token in ours if token not in theirs]:
        return f"it lacks {missing[0]!r}"
    if more := sorted(theirs.keys() - ours.keys(), key=theirs.__getitem__):
        return f"it has {more[0]!r} in addition"
    for token, number in ours.items():
        if theirs[token] != number:
            return f"its {token!r} is number {theirs[token]}, not {number}"
    specials = [
        {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        for tokenizer in (first, second)
    ]
    if odd := [token for token in ours if specials[0].get(token) != specials[1].get(token)]:
        return f"{odd[0]!r} is a special token in only one of the two"
    merges = [_merges(tokenizer) for tokenizer in (first, second)]
    return "" if merges[0] == merges[1] else "it splits text in other places"


def _merges(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model that splits text into tokens, if the tokenizer is a fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"]


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
