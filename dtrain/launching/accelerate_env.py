"""The engine in the configuration of `accelerate launch`, from the variables that it sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dtrain.config.deepspeed_file import read_stage
from dtrain.config.engines import DEFAULT_ENGINE, ENGINES
from dtrain.core.errors import UserError

_ZERO_KINDS = {
    str(engine.zero_stage): kind for kind, engine in ENGINES.items() if engine.is_deepspeed
}


def launcher_engine(environ: Mapping[str, str]) -> str | None:
    """The engine kind the launcher's file names: ddp, fsdp2, zero2 or zero3; None if it names none.

    torchrun and deepspeed name none. `accelerate launch` without a plugin means ddp.

    Raises:
        UserError: it names an engine that dtrain does not have.
    """
    named = _named(environ)
    return named[0] if named else None


def resolve_engine(recipe_kind: str, environ: Mapping[str, str]) -> str:
    """The engine of this run: the recipe's; for `auto` the launcher's, else ddp.

    Raises:
        UserError: the recipe names one engine and the launcher another.
    """
    named = _named(environ)
    if named is None:
        return DEFAULT_ENGINE if recipe_kind == "auto" else recipe_kind
    kind, source = named
    if recipe_kind not in ("auto", kind):
        message = f"the recipe says {recipe_kind}, but accelerate's file says {kind} ({source})"
        fix = f"engine.kind=auto, or --config_file launch/accelerate/{recipe_kind}.yaml"
        raise UserError(message, where="engine.kind", fix=fix)
    return kind


def _named(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The launcher's engine, and the variable that names it."""
    if _true(environ, "ACCELERATE_USE_DEEPSPEED"):
        return _zero(environ)
    if _true(environ, "ACCELERATE_USE_FSDP"):
        version = environ.get("FSDP_VERSION", "1")
        if version != "2":
            message = f"accelerate's file asks for FSDP version {version} (FSDP_VERSION)"
            raise UserError(
                message, where="accelerate launch", fix="fsdp_config: {fsdp_version: 2}"
            )
        return "fsdp2", "ACCELERATE_USE_FSDP"
    for plugin in ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if _true(environ, plugin):
            message = f"accelerate's file asks for something that dtrain does not have ({plugin})"
            raise UserError(message, where="accelerate launch", fix="a file of launch/accelerate/")
    if "ACCELERATE_MIXED_PRECISION" in environ:  # accelerate always sets it
        return "ddp", "neither ACCELERATE_USE_FSDP nor ACCELERATE_USE_DEEPSPEED is set"
    return None


def _zero(environ: Mapping[str, str]) -> tuple[str, str]:
    variable = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
    stage = environ.get(variable, "")
    if file := environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        variable, stage = f"ACCELERATE_DEEPSPEED_CONFIG_FILE={file}", read_stage(Path(file))
    if stage not in _ZERO_KINDS:
        message = f"accelerate's file asks for ZeRO stage {stage or '?'} ({variable})"
        raise UserError(message, where="accelerate launch", fix="dtrain has zero2 and zero3")
    return _ZERO_KINDS[stage], variable


def _true(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "").lower() in ("1", "true", "yes")
