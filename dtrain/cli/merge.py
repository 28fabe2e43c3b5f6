"""`dtrain merge`: a base and what was trained → a plain Hugging Face model."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dtrain.core.cache_paths import user_path
from dtrain.core.errors import UserError
from dtrain.core.lazy_import import import_fast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtrain.merge.base_tensors import BaseTensors
    from dtrain.merge.merge_inputs import CombineMethod
    from dtrain.merge.nf4 import Nf4Base
    from dtrain.merge.provenance import TrainingOrigin

Folders = Annotated[
    list[str],
    typer.Argument(
        metavar="BASE ADAPTER... OUT | CHECKPOINT OUT",
        help="Folders; BASE can be a hub id. CHECKPOINT: a folder step-… in RUN/STAGE/checkpoints.",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="W,W,…", help="A factor for each adapter (default: 1)."),
]
Combine = Annotated[
    Literal["linear", "ties", "dare_linear", "dare_ties"] | None,
    typer.Option(help="Combine the adapters as PEFT does, instead of adding them one by one."),
]
Density = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Fraction of elements that ties and dare keep.")
]
Seed = Annotated[int | None, typer.Option(help="Random seed; required for dare.")]
QloraBase = Annotated[
    Literal["dequantized", "original"] | None,
    typer.Option(
        help="Merge into the base as the 4-bit model computed with it, or as it is stored "
        "(default: what the adapter was trained on)."
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Shards to rewrite at once (default: one a core, at most 8)."),
]


def merge(
    folders: Folders,
    weights: Weights = None,
    combine: Combine = None,
    density: Density = 0.5,
    seed: Seed = None,
    qlora_base: QloraBase = None,
    processes: Processes = None,
) -> None:
    """Merge adapters into a base, or write the model of a checkpoint, to the new folder OUT.

    A model of any size needs little memory, because it is processed in blocks. If the merge is
    interrupted, the same command continues it. Several processes that run the same command (srun,
    torchrun, two terminals) share the work.
    """
    import_fast("dtrain.merge.merge")  # torch, which is most of what a small merge costs
    from dtrain.core.folder_kind import FolderKind, folder_kind
    from dtrain.merge.merge import default_processes
    from dtrain.merge.merge_inputs import CombineMethod

    processes = processes or default_processes()
    out, first = user_path(folders[-1]), user_path(folders[0])
    if len(folders) == 2 and folder_kind(first) is FolderKind.CHECKPOINT:
        if weights or combine:
            message = "--weights and --combine do not apply to a checkpoint"
            raise UserError(message, where=str(first))
        _merge_checkpoint(first, out, qlora_base, processes)
    elif len(folders) < 3:
        fix = "give BASE ADAPTER... OUT, or CHECKPOINT OUT"
        raise UserError("too few folders, or not a checkpoint", where="dtrain merge", fix=fix)
    else:
        factors = _factors(weights, len(folders) - 2)
        adapters = [user_path(folder) for folder in folders[1:-1]]
        method = CombineMethod(combine, density, _seed(combine, seed)) if combine else None
        _merge_adapters(folders[0], adapters, out, factors, method, qlora_base, processes)
    print(out)


def _merge_adapters(
    address: str,
    folders: Sequence[Path],
    out: Path,
    factors: Sequence[float],
    method: CombineMethod | None,
    qlora_base: str | None,
    processes: int,
) -> None:
    from dtrain.merge.adapter import MergeableAdapter
    from dtrain.merge.chat_files import combined_chat_files, merged_chat_files
    from dtrain.merge.merge import MergeJob
    from dtrain.merge.merge_inputs import adapter_input, combined_input
    from dtrain.merge.provenance import adapter_origin, expected_bases
    from dtrain.serving.model_card import combined_card, measured_stage, merged_card, write_card

    base, origins = _base(address), [adapter_origin(folder) for folder in folders]
    job = MergeJob(
        base,
        out,
        source=str(base),
        processes=processes,
        expected_bases=expected_bases(base, origins),
        files=merged_chat_files(base, combined_chat_files(base, folders)),
    )
    adapters = [MergeableAdapter.open(folder, job.tensors) for folder in folders]
    combined = method is not None
    quantized = _quantized_bases(job.tensors, origins, qlora_base, combined=combined)
    if method is None:
        inputs = [adapter_input(*item) for item in zip(adapters, factors, quantized, strict=True)]
    else:
        inputs = [combined_input(adapters, factors, method, quantized[0])]
    job.merge_adapters(inputs)
    is_plain = method is None and qlora_base is None and set(factors) == {1.0}
    measured = measured_stage(base, folders) if is_plain else None
    if measured is not None:
        write_card(out, merged_card(*measured, out))
    else:
        weighted = dict(zip(folders, factors, strict=True))
        write_card(out, combined_card(address, base, weighted, method.name if method else "", out))


def _merge_checkpoint(folder: Path, out: Path, qlora_base: str | None, processes: int) -> None:
    from dtrain.merge.chat_files import checkpoint_chat_files, merged_chat_files
    from dtrain.merge.from_checkpoint import (
        checkpoint_adapter,
        open_checkpoint,
        stage_base,
        trained_weights,
    )
    from dtrain.merge.merge import MergeJob
    from dtrain.merge.merge_inputs import adapter_input
    from dtrain.merge.provenance import expected_bases
    from dtrain.serving.model_card import merged_card, write_card
    from dtrain.serving.run_models import open_run

    saved = open_checkpoint(folder)
    base = stage_base(saved)
    job = MergeJob(
        base,
        out,
        source=saved.origin.identity,
        processes=processes,
        expected_bases=expected_bases(base, [saved.origin]),
        files=merged_chat_files(base, checkpoint_chat_files(saved.run, saved.stage, base)),
    )
    if saved.origin.traits.trains_base:
        job.replace_weights(trained_weights(saved.checkpoint))
    else:
        quantized = _quantized_base(job.tensors, saved.origin, qlora_base)
        adapter = checkpoint_adapter(saved, job.tensors)
        job.merge_adapters([adapter_input(adapter, quantized_base=quantized)])
    run = open_run(saved.run)
    stage = next(stage for stage in run.recipe.stages if stage.name == saved.stage)
    write_card(out, merged_card(run, stage, out, checkpoint=folder.name))


def _quantized_bases(
    base: BaseTensors,
    origins: Sequence[TrainingOrigin | None],
    qlora_base: str | None,
    *,
    combined: bool,
) -> list[Nf4Base | None]:
    """Return the 4-bit base that goes with each adapter.

    Adapters of one base share it: it is dequantized once, before the first of them.
    """
    quantized = [_quantized_base(base, origin, qlora_base) for origin in origins]
    parents = [None if combined or origin is None else origin.parent for origin in origins]
    for parent in set(parents):
        pairs = zip(quantized, parents, strict=True)
        if len({item is not None for item, its_parent in pairs if its_parent == parent}) > 1:
            raise UserError(
                "some of the adapters were trained over this base in 4 bits, others over it as it "
                "is stored: no base is right for all",
                where="dtrain merge",
                fix="choose one: --qlora-base original, or dequantized",
            )
    if combined:
        return quantized
    is_first = [parent not in parents[:index] for index, parent in enumerate(parents)]
    return [item if first else None for item, first in zip(quantized, is_first, strict=True)]


def _quantized_base(
    base: BaseTensors, origin: TrainingOrigin | None, qlora_base: str | None
) -> Nf4Base | None:
    """Return the 4-bit base, if it is requested or the adapter was trained on it."""
    trained_in_nf4 = origin is not None and origin.base_in_nf4
    if qlora_base == "original" or (qlora_base is None and not trained_in_nf4):
        return None
    import torch

    from dtrain.merge.nf4 import Nf4Base
    from dtrain.models.load import resolve_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(origin.dtype, device) if origin and origin.dtype else None
    return Nf4Base(base, dtype, origin is not None and origin.trusts_remote_code(), device)


def _base(address: str) -> Path:
    """Return a folder as it is; download a hub id, or create a sample."""
    if (user_path(address) / "config.json").is_file():
        return user_path(address)
    from dtrain.models.hub import base_folder

    return base_folder(address)


def _factors(weights: str | None, adapters: int) -> list[float]:
    try:
        factors = [float(text) for text in weights.split(",")] if weights else [1.0] * adapters
        if not all(map(isfinite, factors)):
            raise ValueError(weights)
    except ValueError as error:
        fix = "give numbers such as 0.7,0.3"
        raise UserError(f"not numbers: {weights}", where="--weights", fix=fix) from error
    if len(factors) != adapters:
        raise UserError(f"{len(factors)} weights for {adapters} adapters", where="--weights")
    return factors


def _seed(combine: str, seed: int | None) -> int:
    if combine.startswith("dare") and seed is None:
        fix = "give a seed, such as --seed 0"
        raise UserError(f"{combine} draws at random", where="--combine", fix=fix)
    return seed or 0
