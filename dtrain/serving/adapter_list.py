"""Lists the adapters of a run or a folder, with base, rank and size. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import indent
from typing import Any

from dtrain.config.methods.patterns import match_names, value_for
from dtrain.core.errors import UserError
from dtrain.core.output import fit
from dtrain.core.run_dir import RECIPE
from dtrain.core.stage_dir import ADAPTER, ADAPTER_CONFIG
from dtrain.core.units import count, size
from dtrain.core.weight_files import read_header
from dtrain.models.peft_format import (
    WEIGHTS,
    AdapterOrigin,
    adapter_base,
    read_adapter_config,
    read_adapter_origin,
)
from dtrain.serving.run_models import ServedRun, is_run, open_run

LORA_DOWN = ".lora_A.weight"  # [r, in]
COLUMNS = ("adapter", "stage", "method", "rank", "targets", "trains", "size", "base")
LAYERS = COLUMNS.index("targets")


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter.

    Attributes:
        base: folder or hub id of the model it was trained on.
        shapes: of every tensor, by its key.
    """

    name: str
    folder: Path
    base: str
    origin: AdapterOrigin
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    size_bytes: int

    @property
    def ranks(self) -> list[int]:
        """The ranks of its layers, each once, rising; empty if it is no LoRA."""
        own = {
            shape[0]
            for key, shape in self.shapes.items()
            if key.endswith(LORA_DOWN) and not self._is_of_parameter(key)
        }
        return sorted(own | self._parameter_ranks)

    @property
    def _parameters(self) -> list[str]:
        """What PEFT adapts as bare parameters, such as the matrices of experts."""
        return list(self.config.get("target_parameters") or ())

    @property
    def _parameter_ranks(self) -> set[int]:
        """Their ranks by the config: A of E experts is [E r, in]."""
        patterns, default = self.config.get("rank_pattern"), self.config.get("r")
        ranks = (value_for(patterns, parameter, default) for parameter in self._parameters)
        return {rank for rank in ranks if isinstance(rank, int)}

    def _is_of_parameter(self, key: str) -> bool:
        module = key.partition(".lora_")[0].replace(".base_layer", "")
        return bool(match_names([module], [x.rpartition(".")[0] for x in self._parameters]))

    @property
    def targets(self) -> list[str]:
        """The last part of the names of the layers it changes, each once."""
        keys = [k for k in self.shapes if ".lora_" in k and not self._is_of_parameter(k)]
        layers = [key.partition(".lora_")[0] for key in keys] + self._parameters
        return sorted({layer.rpartition(".")[2] for layer in layers})

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        total = 0
        for shape in self.shapes.values():
            product = 1
            for length in shape:
                product *= length
            total += product
        return total

    @property
    def method(self) -> str:
        """The method, for example lora, qlora, or qlora+dora."""
        kind = str(self.config["peft_type"]).lower()
        kind = f"q{kind}" if self.origin.base_in_nf4 else kind
        return "+".join([kind, *(n for n in ("dora", "rslora") if self.config.get(f"use_{n}"))])

    def as_json(self) -> dict[str, Any]:
        """What `dtrain adapters --json` prints."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "base": self.base,
            "base_in_nf4": self.origin.base_in_nf4,
            "stage": self.origin.kind or None,
            "method": self.method,
            "ranks": self.ranks,
            "alpha": self.config.get("lora_alpha"),
            "targets": self.targets,
            "trainable_parameters": self.parameters,
            "size_bytes": self.size_bytes,
        }


def list_adapters(address: Path) -> list[AdapterInfo]:
    """The adapters of a run in the order of its stages, or all adapters and runs below a folder.

    Raises:
        UserError: there is no such folder, or an adapter in it is broken.
    """
    if not address.is_dir():
        raise UserError("there is no such folder", where=str(address))
    if is_run(str(address)):
        return list(_of_run(open_run(address)))
    address = address.absolute()
    listed: list[AdapterInfo] = []
    runs = [path.parent for path in sorted(address.rglob(RECIPE)) if is_run(str(path.parent))]
    for folder in runs:
        name = folder.relative_to(address)
        listed += [replace(x, name=f"{name}/{x.name}") for x in _of_run(open_run(folder))]
    folders = [path.parent for path in sorted(address.rglob(ADAPTER_CONFIG))]
    return listed + [read_adapter(x) for x in folders if not any(x.is_relative_to(r) for r in runs)]


def _of_run(run: ServedRun) -> Iterator[AdapterInfo]:
    for stage in run.recipe.stages:
        if (run.adapter(stage) / ADAPTER_CONFIG).is_file():
            yield read_adapter(run.adapter(stage), run.base_of(stage), stage.adapter_name)
    for folder in run.extra_adapters():
        yield read_adapter(folder, base=run.base)


def read_adapter(folder: Path, base: str | None = None, name: str | None = None) -> AdapterInfo:
    """An adapter from its folder; only the head of its weights is read.

    Args:
        base: the model it was trained on, if that is known better than the adapter says.
        name: as the recipe calls it; otherwise its stage's or folder's.

    Raises:
        UserError: no adapter, or one without safetensors.
    """
    config = read_adapter_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"no {WEIGHTS}", where=str(folder), fix="pickled adapters are not read")
    entries, _ = read_header(weights)
    return AdapterInfo(
        name=name or (folder.parent.name if folder.name == ADAPTER else folder.name),
        folder=folder,
        base=base or adapter_base(folder) or "?",
        origin=read_adapter_origin(folder),
        config=config,
        shapes={key: entry["shape"] for key, entry in entries.items()},
        size_bytes=weights.stat().st_size,
    )


def format_table(adapters: list[AdapterInfo], columns: int | None = None) -> str:
    """A line for each, under a head; the base stands last, since it is long.

    Args:
        columns: of the terminal; where they are too few, layers and base stand below each line.
    """
    rows = [COLUMNS, *map(_row, adapters)]
    lines = _aligned(rows)
    if columns is None or max(map(len, lines)) <= columns:
        return "\n".join(lines)
    head, *short = _aligned([(*row[:LAYERS], *row[LAYERS + 1 : -1]) for row in rows])
    texts = [head]
    for line, row in zip(short, rows[1:], strict=True):
        below = f"{row[LAYERS].replace(',', ', ')}\nof {row[-1]}"
        texts += [line, *fit(indent(below, "    "), columns).split("\n")]
    return "\n".join(texts)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _row(adapter: AdapterInfo) -> tuple[str, ...]:
    ranks = adapter.ranks
    return (
        adapter.name,
        adapter.origin.kind or "-",
        adapter.method,
        "-" if not ranks else "-".join(str(r) for r in sorted({ranks[0], ranks[-1]})),
        ",".join(adapter.targets) or "-",
        count(adapter.parameters),
        size(adapter.size_bytes),
        adapter.base + (" (in NF4)" if adapter.origin.base_in_nf4 else ""),
    )
