"""A base folder and an adapter → a plain Hugging Face model, in the memory of about one tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.core.files import atomic_folder, write_json
from dtrain.core.hashes import file_sha256, fingerprint
from dtrain.core.log import progress
from dtrain.core.units import size
from dtrain.merge.adapter import CONFIG, FLOATS, WEIGHTS, Adapter
from dtrain.merge.fingerprint import combine
from dtrain.merge.stream import Change, rewrite_file
from dtrain.models.load import read_config
from dtrain.models.quantise import nf4_layers, through_nf4
from dtrain.models.weights import INDEX, read_header, weight_files

MANIFEST = "merge.json"
# What makes a folder of weights a model: config, tokenizer, template, licence, the model's code.
BESIDE = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "NOTICE*")
NOT_BESIDE = (INDEX, MANIFEST, CONFIG)
SPARE_BYTES = 64 << 20
Shapes = dict[str, tuple[str, list[int]]]


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    quantised: bool,
    source: str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Add a LoRA adapter to a base; shards, dtypes and all other files stay as the base's.

    A tensor is computed in float32 and rounded once to its own dtype: to the bit what PEFT's
    merge_and_unload gives for float32, bfloat16 and float16 bases with a float32 adapter.

    Args:
        out: a new folder; it appears whole or not at all.
        quantised: the adapter was trained over the base in NF4: every layer that was packed is
            packed and unpacked again, so that the result computes what was trained.
        source: what the base is called, for the manifest.
        dtype: quantised only: that the base was loaded in for training; None: as it is stored.
        trust_remote_code: quantised only: build the model from code beside it to find its layers.

    Raises:
        UserError: see `Adapter`; OUT is there, or is BASE; too little disk.
    """
    lora = Adapter(adapter)
    shapes = _check(base, adapter, out)
    lora.check_against(shapes)
    packed: set[str] = set()
    if quantised:
        config = read_config(base, trust_remote_code=trust_remote_code)
        packed = {f"{name}.weight" for name in nf4_layers(config, trust_remote_code)}
        _check_packed(base, packed, shapes)
    names = packed | lora.layers.keys()
    changes = {n: partial(_merged, n, lora, n in packed, dtype) for n in sorted(names)}
    identity = {name: file_sha256(adapter / name) for name in (CONFIG, WEIGHTS)}
    about = {"source": source, "adapter": fingerprint(identity), "quantised": quantised}
    _write(base, out, changes, about)


def replace(
    base: Path,
    tensors: Mapping[str, Sequence[int]],
    read: Callable[[str], Tensor],
    out: Path,
    *,
    source: str,
) -> None:
    """Write the model that full fine-tuning made, in its base's layout and dtypes.

    Args:
        tensors: shapes by `named_parameters()` name; of tied tensors one name is enough.
        read: gives the tensor of a name, one at a time.

    Raises:
        UserError: the base has no such tensor, or one of another shape; non-finite values.
    """
    shapes = _check(base, None, out)
    for name, shape in tensors.items():
        if name not in shapes or shapes[name][1] != list(shape):
            raise UserError(f"{name} {list(shape)} is not in the base", where=str(base))
    changes = {name: partial(_replaced, read, name) for name in tensors}
    _write(base, out, changes, {"source": source, "adapter": None, "quantised": False})


def _merged(
    name: str, lora: Adapter, packed: bool, dtype: torch.dtype | None, old: Tensor
) -> Tensor:
    if packed:
        old = through_nf4(old, dtype or old.dtype)
    return lora.add(name, old) if name in lora.layers else old


def _replaced(read: Callable[[str], Tensor], name: str, old: Tensor) -> Tensor:
    return read(name).detach().cpu()


def _check(base: Path, adapter: Path | None, out: Path) -> Shapes:
    """Places and disk; the dtype and shape of every tensor of the base."""
    if out.resolve() in {p.resolve() for p in (base, adapter) if p}:
        raise UserError("would be overwritten by what is made from it", where=str(out))
    if out.exists():
        raise UserError("exists already", where=str(out), fix="choose another folder")
    files = weight_files(base)
    needed = sum(path.stat().st_size for path in files) + SPARE_BYTES
    place = next(p for p in out.absolute().parents if p.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise UserError(
            f"the merged model needs {size(needed)}, {size(free)} are free", where=str(place)
        )
    headers = (read_header(path)[0] for path in files)
    return {name: (e["dtype"], e["shape"]) for entries in headers for name, e in entries.items()}


def _check_packed(base: Path, packed: Iterable[str], shapes: Shapes) -> None:
    for name in sorted(packed):
        if name not in shapes or shapes[name][0] not in FLOATS:
            raise UserError(f"no plain {name}, which was held in NF4", where=str(base))


def _write(base: Path, out: Path, changes: Mapping[str, Change], about: dict[str, Any]) -> None:
    files = weight_files(base)
    total = sum(len(read_header(path)[0]) for path in files)
    old, new = [], {}
    with atomic_folder(out) as target, progress(f"merging into {out.name}", total) as bar:
        for path in files:
            before, after = rewrite_file(path, target / path.name, changes, bar)
            old.append(before)
            new[path.name] = after
        for path in _beside(base):
            shutil.copyfile(path, target / path.name)  # content only: a cache may be read-only
            new[path.name] = file_sha256(target / path.name)
        prints = {"base": combine(old, base), "result": combine([new[p.name] for p in files], base)}
        files_by_name = dict(sorted(new.items()))
        write_json(target / MANIFEST, about | prints | {"files": files_by_name})


def _beside(base: Path) -> list[Path]:
    found = {path for pattern in BESIDE for path in base.glob(pattern) if path.is_file()}
    index = base / INDEX
    wanted = {path for path in found if path.name not in NOT_BESIDE}
    sharded = weight_files(base)[0].name != "model.safetensors"
    return sorted(wanted | ({index} if sharded else set()))
