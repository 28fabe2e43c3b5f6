"""`dtrain merge`: a base and what was trained → a plain Hugging Face model."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dtrain.config.methods import TRAITS
from dtrain.core.errors import UserError
from dtrain.core.lazy_import import import_fast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtrain.merge.adapter import Adapter
    from dtrain.merge.merge import Applied
    from dtrain.merge.nf4 import Packed
    from dtrain.merge.provenance import Origin
    from dtrain.merge.tied_weights import Shapes

Places = Annotated[
    list[str],
    typer.Argument(
        metavar="BASE ADAPTER... OUT | CHECKPOINT OUT",
        help="Folders (BASE also a hub id). CHECKPOINT: RUN/STAGE/checkpoints/step-…",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="W,W,…", help="A factor for each adapter; 1 if not given."),
]
Combine = Annotated[
    Literal["linear", "ties", "dare_linear", "dare_ties"] | None,
    typer.Option(help="Combine A and B as PEFT does; else the adapters are added one by one."),
]
Density = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of the elements that ties and dare keep.")
]
Seed = Annotated[int | None, typer.Option(help="Of dare's choice of elements; needed for it.")]
QloraBase = Annotated[
    Literal["dequantised", "original"] | None,
    typer.Option(
        help="The base as the 4-bit model computed with it, or as it is stored; "
        "if not given, what the adapter's run was trained on."
    ),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Shards at once; if not given, one a core, at most 8.")
]


def merge(
    places: Places,
    weights: Weights = None,
    combine: Combine = None,
    density: Density = 0.5,
    seed: Seed = None,
    qlora_base: QloraBase = None,
    processes: Processes = None,
) -> None:
    """Write BASE with its ADAPTERs, or the model that a CHECKPOINT holds, to the new folder OUT.

    It streams, so a model of any size needs little memory; stopped, the same command goes on.
    Started several times (srun, torchrun, two terminals), all take part and one publishes.
    """
    import_fast("dtrain.merge.merge")  # torch, which is most of what a small merge costs
    from dtrain.merge.merge import shards_at_once
    from dtrain.merge.provenance import is_checkpoint

    at_once = processes or shards_at_once()
    out, first = Path(places[-1]), Path(places[0])
    if len(places) == 2 and is_checkpoint(first):
        if weights or combine:
            raise UserError("a checkpoint takes no --weights and no --combine", where=str(first))
        _consolidate(first, out, qlora_base, at_once)
    elif len(places) < 3:
        raise UserError("give BASE ADAPTER... OUT, or CHECKPOINT OUT", where="dtrain merge")
    else:
        factors = _factors(weights, len(places) - 2)
        adapters = [Path(place) for place in places[1:-1]]
        base = _base(places[0])
        how = None if combine is None else (combine, density, _seed(combine, seed))
        _merge(base, adapters, out, factors, how, qlora_base, at_once)
    print(out)


def _merge(
    base: Path,
    folders: Sequence[Path],
    out: Path,
    factors: Sequence[float],
    how: tuple[str, float, int] | None,
    qlora_base: str | None,
    at_once: int,
) -> None:
    from dtrain.core.run_dir import MERGE_MANIFEST
    from dtrain.merge.adapter import Adapter
    from dtrain.merge.chat_files import carried_files, merged_files
    from dtrain.merge.merge import check_places, merge, part_of
    from dtrain.merge.provenance import adapter_origin, known_bases

    shapes = check_places(base, folders, out)
    origins = [adapter_origin(folder) for folder in folders]
    adapters = [Adapter.open(folder, shapes) for folder in folders]
    packings = _packings(base, shapes, origins, qlora_base, together=how is not None)
    known = known_bases(base, origins, MERGE_MANIFEST)
    if how is None:
        parts = [part_of(*one) for one in zip(adapters, factors, packings, strict=True)]
    else:
        parts = [_combined(adapters, factors, how, packings)]
    files = merged_files(base, carried_files(base, folders))
    merge(base, parts, out, source=str(base), processes=at_once, known=known, files=files)


def _combined(
    adapters: Sequence[Adapter],
    factors: Sequence[float],
    how: tuple[str, float, int],
    packings: Sequence[Packed | None],
) -> Applied:
    from dtrain.merge.merge import Applied
    from dtrain.merge.weighted_merge import Combined

    about = {"combine": list(how), "weights": list(factors)}
    about |= {"adapters": [adapter.tensors.mark() for adapter in adapters]}
    about |= {"quantised": packings[0].about if packings[0] else False}
    return Applied(Combined(adapters, factors, *how), about, packings[0])


def _consolidate(folder: Path, out: Path, qlora_base: str | None, at_once: int) -> None:
    from dtrain.core.run_dir import MERGE_MANIFEST
    from dtrain.merge.chat_files import checkpoint_files, merged_files
    from dtrain.merge.from_checkpoint import base_of, open_saved, replace_with, saved_adapter
    from dtrain.merge.merge import check_places, merge, part_of
    from dtrain.merge.provenance import known_bases

    saved = open_saved(folder)
    base, origin = base_of(saved), saved.origin
    shapes = check_places(base, [folder], out)
    known = known_bases(base, [origin], MERGE_MANIFEST)
    source = origin.identity
    files = merged_files(base, checkpoint_files(saved.run, saved.stage, base))
    if TRAITS[origin.method["kind"]].trains_base:
        replace_with(
            saved.checkpoint, base, out, source, processes=at_once, known=known, files=files
        )
        return
    packing = _packing(base, shapes, origin, qlora_base)
    part = part_of(saved_adapter(saved, shapes), packing=packing)
    merge(base, [part], out, source=source, processes=at_once, known=known, files=files)


def _packings(
    base: Path,
    shapes: Shapes,
    origins: Sequence[Origin | None],
    qlora_base: str | None,
    together: bool,
) -> list[Packed | None]:
    """The 4-bit form of what each adapter goes onto.

    Adapters of one base share its form: it is packed once, before the first of them.
    """
    forms = [_packing(base, shapes, origin, qlora_base) for origin in origins]
    parents = [None if together or origin is None else origin.parent for origin in origins]
    for parent in set(parents):
        of_it = zip(forms, parents, strict=True)
        if len({form is not None for form, other in of_it if other == parent}) > 1:
            raise UserError(
                "some of the adapters were trained over this base in 4 bits, others over it as it "
                "is stored: no base is right for all",
                where="dtrain merge",
                fix="choose one: --qlora-base original, or dequantised",
            )
    if together:
        return forms
    first = [parent not in parents[:number] for number, parent in enumerate(parents)]
    return [form if here else None for form, here in zip(forms, first, strict=True)]


def _packing(
    base: Path, shapes: Shapes, origin: Origin | None, qlora_base: str | None
) -> Packed | None:
    """The base's 4-bit form, if that is what is asked for or what was trained on."""
    if qlora_base == "original" or (qlora_base is None and not (origin and origin.quantised)):
        return None
    import torch

    from dtrain.merge.nf4 import Packed
    from dtrain.models.load import resolve_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(origin.dtype, device) if origin and origin.dtype else None
    return Packed(base, shapes, dtype, origin is not None and origin.trusts_code(), device)


def _base(address: str) -> Path:
    """A folder as it is; else a hub id or a sample."""
    if (Path(address) / "config.json").is_file():
        return Path(address)
    from dtrain.models.hub import base_folder

    return base_folder(address)


def _factors(weights: str | None, adapters: int) -> list[float]:
    try:
        factors = [float(text) for text in weights.split(",")] if weights else [1.0] * adapters
        if not all(map(isfinite, factors)):
            raise ValueError(weights)
    except ValueError as error:
        raise UserError(f"not numbers: {weights}", where="--weights", fix="0.7,0.3") from error
    if len(factors) != adapters:
        raise UserError(f"{len(factors)} weights for {adapters} adapters", where="--weights")
    return factors


def _seed(combine: str, seed: int | None) -> int:
    if combine.startswith("dare") and seed is None:
        raise UserError(f"{combine} chooses at random", where="--combine", fix="--seed 0")
    return seed or 0
