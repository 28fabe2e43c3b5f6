"""A base with the recipe's new tokens: in its tokenizer, its embeddings and its output matrix.

It is a model folder of its own in the cache, so that whatever reads a base reads this one. Files
of weights without a row for each token are links to the base's. Rows that a base has beyond its
tokenizer's tokens are used first: only a token beyond the last row makes the matrices larger.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dtrain.config.schema import Model
from dtrain.config.tokens import Tokens
from dtrain.core.cache_paths import cache_folder
from dtrain.core.errors import UserError, first_line
from dtrain.core.files import atomic_folder, read_object, write_json
from dtrain.core.hash_cache import cached_hash
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.locks import FolderLock
from dtrain.core.log import say
from dtrain.core.weight_files import INDEX, SINGLE, read_header, weight_files
from dtrain.models.check_base import check_new
from dtrain.models.hub import PATTERNS, base_folder
from dtrain.models.load import read_config
from dtrain.models.packing_probe import build_probe_model
from dtrain.models.peft_format import read_generation
from dtrain.models.tokenizer import load_tokenizer, tokenizer_difference
from dtrain.models.vocabulary import (
    ROWS_KEY,
    NewRows,
    set_rows,
    vocabulary_tensors,
    write_with_rows,
)

WHERE = "model.tokens.add"
TOKEN_KEYS = ("_token_id", "_token_ids", "_token_index")  # of configs
VERSION = 2  # raise it whenever the same input gives another folder


def open_base(settings: Model) -> Path:
    """The folder of a recipe's base, with its new tokens; built at the first use.

    Raises:
        UserError: no such base, or it cannot get these tokens.
    """
    base = base_folder(settings.base, revision=settings.revision)
    if settings.tokens is None:
        return base
    other_files = {path.name: path for path in _other_files(base)}
    content = {
        "version": VERSION,
        "path": str(base.resolve()),  # of the links
        "weights": {path.name: cached_hash(path) for path in weight_files(base)},
        "files": {name: file_hash(path) for name, path in sorted(other_files.items())},
        "words": settings.tokens.words,
    }
    folder = cache_folder() / "bases" / fingerprint(content)[:32]
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FolderLock(folder.parent):
            if not folder.is_dir():
                _build(folder, base, settings, settings.tokens)
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror or error}",
            where=str(folder),
            fix="set DTRAIN_CACHE to a writable folder with free space",
        ) from error
    return folder


def open_tokenizer(settings: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's base, with its new tokens.

    Raises:
        UserError: as `open_base`.
    """
    base = base_folder(settings.base, revision=settings.revision)
    tokenizer = load_tokenizer(base, settings.trust_remote_code)
    if settings.tokens is not None:
        add_tokens(tokenizer, settings.tokens)
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Tokens | None) -> list[int]:
    """The numbers of a recipe's new tokens in the tokenizer of its base.

    Args:
        tokenizer: from `open_tokenizer`, or of the folder that `open_base` returns.

    Returns:
        -1 for a token that it does not have.
    """
    known = tokenizer.get_vocab() if tokens else {}
    return [known.get(token, -1) for token in tokens.words] if tokens else []


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[int]:
    """Add a recipe's new tokens to a tokenizer, and return their numbers.

    They are plain added tokens, as in axolotl and LLaMA-Factory: a text that contains one is
    encoded with it, and decoding does not leave it out, as it leaves out special tokens.

    Raises:
        UserError: it has one already, does not encode one as a single token, or gives it the number
            of another.
    """
    known = tokenizer.get_vocab()
    check_new(tokens.words, known)
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer.add_tokens([AddedToken(t, special=False, **rules) for t in tokens.words])
    ids = token_ids(tokenizer, tokens)
    if taken := set(ids) & set(known.values()):
        raise UserError(
            f"the tokenizer gives a new token number {min(taken)}, which another token has",
            where=WHERE,
            fix="choose a base whose tokenizer numbers its tokens without gaps",
        )
    for token, number in zip(tokens.words, ids, strict=True):
        encoded = tokenizer.encode(token, add_special_tokens=False)
        others = [x for x in encoded if x != number]  # a space in front of texts
        is_one = encoded.count(number) == 1 and tokenizer.decode([number]) == token
        if not is_one or str(tokenizer.decode(others)).strip():
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) does not encode the new token "
                f"{token!r} as one token",
                where=WHERE,
                fix="choose another text, such as <tool>, or a base with a tokenizer.json",
            )
    return ids


def _build(folder: Path, base: Path, settings: Model, tokens: Tokens) -> None:
    say(f"adding {len(tokens.words)} tokens to {base}, in {folder}")
    for unfinished in folder.parent.glob(f".{folder.name}.*"):  # of a killed process
        shutil.rmtree(unfinished)
    config = read_config(base, trust_remote_code=settings.trust_remote_code)
    old_rows = config.get_text_config(decoder=True).vocab_size
    names = vocabulary_tensors(base, config, settings.trust_remote_code)
    tokenizer = load_tokenizer(base, settings.trust_remote_code)
    starts = [_first_tokens(tokenizer, words, old_rows) for words in tokens.words.values()]
    known = sorted(set(tokenizer.get_vocab().values()))
    ids = add_tokens(tokenizer, tokens)
    _check_unused(dict(zip(ids, tokens.words, strict=True)), base, config)
    rows = max(old_rows, max(ids) + 1)
    with atomic_folder(folder) as target:
        for path in _other_files(base):
            shutil.copyfile(path, target / path.name)
        _save_tokenizer(tokenizer, target, settings)
        if rows != old_rows:
            _write_config(target, old_rows, rows)
            _check_config(target, rows, settings)
        check_lookup(
            read_config(target, trust_remote_code=settings.trust_remote_code), settings, ids
        )
        new = NewRows(rows, dict(zip(ids, starts, strict=True)), known)
        _write_weights(base, target, names, new)
    change = "as before" if rows == old_rows else f"not {old_rows:,}"
    say(
        f"the new tokens are numbers {min(ids)} to {max(ids)}; embeddings and output matrix have "
        f"{rows:,} rows, {change}"
    )


def _check_unused(tokens: dict[int, str], base: Path, config: PretrainedConfig) -> None:
    """Check that a base reads no number of a new token as another token, such as an image's.

    The row of a padding token would not train, and generation would stop at one that ends a turn.
    """
    for group in (config.to_dict(), read_generation(base)):
        for key, number in _named_tokens(group):
            if number in tokens:
                raise UserError(
                    f"the new token {tokens[number]!r} would get number {number}, which is the "
                    f"{key} of the base and not in its tokenizer",
                    where=WHERE,
                    fix="choose a base whose tokenizer has every token that its config names",
                )


def _named_tokens(group: dict[Any, Any]) -> Iterator[tuple[str, int]]:
    """The numbers of tokens that a config and the groups inside it name, with their keys."""
    for key, value in group.items():
        if isinstance(value, dict):
            yield from _named_tokens(value)
        elif str(key).endswith(TOKEN_KEYS):
            numbers = value if isinstance(value, list) else [value]
            yield from ((key, number) for number in numbers if isinstance(number, int))


def _first_tokens(
    tokenizer: PreTrainedTokenizerBase, words: str | None, rows: int
) -> list[int] | None:
    """The tokens of the words that a new token starts from."""
    if words is None:
        return None
    ids: list[int] = tokenizer.encode(words, add_special_tokens=False)
    if not ids or max(ids) >= rows:
        raise UserError(f"{words!r} has no tokens to start from", where=WHERE)
    unknown = tokenizer.unk_token_id
    if unknown in ids and str(tokenizer.unk_token) not in words:
        each = {word: tokenizer.encode(word, add_special_tokens=False) for word in words.split()}
        word = next((word for word, numbers in each.items() if unknown in numbers), words)
        raise UserError(
            f"{word!r} is unknown to the base's tokenizer",
            where=WHERE,
            fix="write other words, or a list of tokens, which start at the mean of all",
        )
    return ids


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, target: Path, settings: Model) -> None:
    tokenizer.save_pretrained(target)
    loaded = load_tokenizer(target, settings.trust_remote_code)
    if difference := tokenizer_difference(tokenizer, loaded):
        message = f"the tokenizer does not keep new tokens when it is saved: {difference}"
        raise UserError(message, where=WHERE, fix="choose a base with a tokenizer.json")


def _other_files(base: Path) -> list[Path]:
    patterns = [pattern for pattern in PATTERNS if pattern != "*.safetensors"]
    paths = {path for pattern in patterns for path in base.glob(pattern) if path.is_file()}
    return sorted(path for path in paths if path.name != INDEX)


def _write_config(target: Path, old_rows: int, rows: int) -> None:
    """Write the number of rows into a config, wherever it says the old one."""
    config = read_object(target / "config.json")
    groups = [config, *(v for v in config.values() if isinstance(v, dict))]
    if not any([set_rows(group, old_rows, rows) for group in groups]):
        (config.get("text_config") or config)[ROWS_KEY] = rows
    write_json(target / "config.json", config)


def _check_config(target: Path, rows: int, settings: Model) -> None:
    config = read_config(target, trust_remote_code=settings.trust_remote_code)
    if config.get_text_config(decoder=True).vocab_size != rows:
        message = "its config does not say how many rows its embeddings have"
        raise UserError(message, where=settings.base, fix="choose another base")


@torch.no_grad()
def check_lookup(config: PretrainedConfig, settings: Model, ids: list[int]) -> None:
    """Check that a model takes its input of new tokens from their rows of its embeddings.

    Gemma 3n takes numbers above its text for images and sounds; Gemma 4 looks them up in a second
    table, too.

    Raises:
        UserError: it does not.
    """
    model = build_probe_model(config, settings, all_layers=False)
    known, new = (torch.tensor(numbers)[:, None] for numbers in ([4, 5], [min(ids), max(ids)]))
    try:
        model(input_ids=known, use_cache=False)
    except Exception:  # the packing probe says why
        return
    try:
        before = model(input_ids=new, use_cache=False).logits
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.flip(-1))
        after = model(input_ids=new, use_cache=False).logits
        reason = (
            "takes the number for something else"
            if (before == after).flatten(1).all(1).any()
            else ""
        )
    except Exception as error:  # a model's code may raise anything
        reason = f"fails: {first_line(error)}"
    if reason:
        raise UserError(
            f"{config.model_type!r} does not read token {max(ids)} as text: its code {reason}",
            where=WHERE,
            fix="train without new tokens, or choose a base of text alone",
        )


def _write_weights(base: Path, target: Path, names: set[str], new: NewRows) -> None:
    added = 0
    for path in weight_files(base):
        if names.isdisjoint(read_header(path)[0]):
            (target / path.name).symlink_to(path.absolute())
        else:
            added += write_with_rows(path, target / path.name, names, new)
    if not (base / SINGLE).is_file():
        index = read_object(base / INDEX)
        totals = index.get("metadata")
        if isinstance(totals, dict) and isinstance(totals.get("total_size"), int):
            totals["total_size"] += added
        write_json(target / INDEX, index)
