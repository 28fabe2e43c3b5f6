"""The files of a model's folder, and the tensors in them. Needs no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from math import prod
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from dtrain.core.cache_paths import hub_cache, hub_id, hub_snapshot
from dtrain.core.errors import UserError
from dtrain.core.file_types import check_type
from dtrain.core.files import MAX_BYTES, open_file, parse_json, read_json, read_object
from dtrain.core.log import warn

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROCESSOR_TEMPLATE = "chat_template.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
)
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = {  # with torch's names; smaller ones need scales
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"
}  # fmt: skip
PEFT_PREFIX = "base_model.model."  # of PEFT's names of layers and tensors, before the base's own
EXPERT = re.compile(r"(.*\.experts)\.(\d{1,6})\.(.+)")  # layer, number, tensor of an expert
_Size = Annotated[int, Field(ge=0, le=2**50)]


class TensorEntry(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: Annotated[list[_Size], Field(max_length=16)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model, sorted by name, as transformers chooses them.

    Raises:
        UserError: the folder does not exist or has no such file, a shard is missing, or the index
            points outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(folder))
    if not index.is_file():
        raise UserError(
            f"no safetensors weights ({SINGLE} or {INDEX})",
            where=str(folder),
            fix="save the model with save_pretrained(…); pickled weights are not read",
        )
    names = {_inside(index, name) for name in read_weight_map(index).values()}
    if missing := [name for name in sorted(names) if not (folder / name).is_file()]:
        raise UserError(f"shard {missing[0]} is missing", where=str(index), fix="download it again")
    return [folder / name for name in sorted(names)]


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has a file of a tokenizer."""
    return any(match for pattern in TOKENIZER_FILES for match in folder.glob(pattern))


def processor_template(folder: Path) -> str | None:
    """The chat template in the processor's file of a multimodal model, if it has one.

    Raises:
        UserError: the file is broken.
    """
    path = folder / PROCESSOR_TEMPLATE
    template = read_object(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None


def undownloaded(address: str, revision: str | None = None) -> str:
    """What is missing of a hub id in the cache of the hub's client; empty if nothing is.

    Args:
        address: a model; empty for folders and samples.
        revision: branch, tag or commit.
    """
    if not hub_id(address):
        return ""
    folder = hub_snapshot(address, revision)
    if folder is None or not (folder / "config.json").is_file() or not has_tokenizer(folder):
        return f"{address} was not downloaded to this machine ({hub_cache()})"
    try:
        weight_files(folder)
    except UserError as error:
        return f"{address} was not downloaded whole: {error.where}: {error.message}"
    return ""


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by the tensor's name."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("no weight_map in it", where=str(index))
    return check_type(weight_map, dict[str, str], str(index))


def _inside(index: Path, name: str) -> str:
    """Check that a name stays in the folder: transformers itself would follow `../elsewhere`."""
    if name in ("", ".", "..") or PurePosixPath(name).name != name or len(name) > 255:
        raise UserError(f"points outside its folder: {name!r}", where=str(index))
    return name


def read_headers(folder: Path) -> dict[Path, dict[str, dict[str, Any]]]:
    """The tensors of each file of a model: `read_header` of its `weight_files`.

    Raises:
        UserError: as these two; a tensor of an expert is in no file.
    """
    headers = {path: read_header(path)[0] for path in weight_files(folder)}
    names = {name for entries in headers.values() for name in entries}
    _check_stored(_expert_tensors(folder, names), names, folder)
    return headers


def check_index(folder: Path, names: Container[str]) -> None:
    """Check that the tensors of a model's index are among those of its files.

    Raises:
        UserError: one is not.
    """
    if not (folder / SINGLE).is_file():
        _check_stored(read_weight_map(folder / INDEX), names, folder / INDEX)


def _check_stored(expected: Iterable[str], names: Container[str], where: Path) -> None:
    for name in expected:
        if name not in names:
            message, fix = f"{name} is in no file of the model", "download the model again"
            raise UserError(message, where=str(where), fix=fix)


def _expert_tensors(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """The names that the tensors of all experts must have, where each is stored by itself.

    A layer's experts are numbered without a gap, and have what most of them have. Layers of fewer
    experts than the largest lack some if the config says the number of the largest, not theirs.
    """
    layers: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if match := EXPERT.fullmatch(name):
            layer, number, leaf = match.groups()
            layers.setdefault(layer, {}).setdefault(int(number), set()).add(leaf)
    if not layers:
        return
    most = 1 + max(number for experts in layers.values() for number in experts)
    known = _expert_counts(folder / "config.json")
    for layer, experts in layers.items():
        counts = Counter(leaf for leaves in experts.values() for leaf in leaves)
        shared = sorted(leaf for leaf, count in counts.items() if 2 * count > len(experts))
        own = 1 + max(experts)
        count = most if most in known and own not in known else own
        for leaf in shared:  # LongCat Flash has experts without a last matrix
            last = 1 + max(number for number, leaves in experts.items() if leaf in leaves)
            numbers = range(last if last in known else count)
            yield from (f"{layer}.{number}.{leaf}" for number in numbers)


def _expert_counts(config: Path) -> list[Any]:
    """The numbers in a config under keys about experts, which may be lists with one per layer.

    None of a model with code of its own, which may compute others from them.
    """
    content = read_json(config) if config.is_file() else None
    if not isinstance(content, dict) or "auto_map" in content:
        return []
    groups = [content, *content.values()]
    pairs = (item for group in groups if isinstance(group, dict) for item in group.items())
    values = (value for key, value in pairs if "expert" in key)
    return [n for value in values for n in (value if isinstance(value, list) else [value])]


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], bytes]:
    """Read the header of a safetensors file.

    Returns:
        The entry of each tensor (dtype, shape, data_offsets), in the order of their bytes, and the
        file's first bytes up to the tensors.

    Raises:
        UserError: it is not a complete safetensors file.
    """
    where = str(path)
    try:
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_BYTES:
                raise UserError("not a safetensors file", where=where)
            head = file.read(length)
        tensors_size = path.stat().st_size - 8 - length
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=where) from error
    if not head.startswith(b"{") or len(head) < length:
        raise UserError("not a whole safetensors file", where=where)
    entries = parse_json(head, where)
    entries.pop("__metadata__", None)
    check_type(entries, dict[str, TensorEntry], where)
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    if problem := _layout_problem(ordered, tensors_size):
        raise UserError(f"not a whole safetensors file: {problem}", where=where)
    return dict(ordered), length.to_bytes(8, "little") + head


def _layout_problem(entries: list[tuple[str, dict[str, Any]]], size: int) -> str:
    """What is wrong with the places of the tensors in a file; empty if nothing is."""
    position = 0
    for name, entry in entries:
        start, stop = entry["data_offsets"]
        if start != position or stop < start:
            return f"a gap before {name}"
        item = ITEM_BYTES.get(entry["dtype"])
        if item is not None and item * prod(entry["shape"]) != stop - start:
            return f"{name} has {stop - start} bytes, not those of its shape"
        position = stop
    return "" if position == size else f"{size} bytes of tensors, but {position} in the header"


def check_complete(
    folder: Path, missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[str] = ()
) -> None:
    """Check that the files match the model's tensors; transformers would fill in random ones.

    Raises:
        UserError: they do not; the error names the first tensors.
    """
    for names, problem in (
        (missing, "are missing"),
        (reshaped, "are of another shape"),
        (unexpected, "are in the files but not in the model"),
    ):
        if names := sorted(names):
            raise UserError(
                f"{len(names)} tensors {problem}: {', '.join(names[:3])}",
                where=str(folder),
                fix="weights and config.json must belong to the same model; download them again",
            )


def warn_incomplete(folder: Path, missing: Iterable[str]) -> None:
    """Warn that files lack tensors outside the language model, such as an image tower's, if so."""
    if names := sorted(missing):
        warn(
            f"{folder}: {len(names)} tensors outside the language model are missing, such as "
            f"{names[0]}. A model merged from these files lacks them too; for the whole model "
            "download them again"
        )
