"""What dtrain makes of one case: trained right, refused with a reason, or at fault."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import forks
import models
import reference
import runs
import torch
from transformers import AutoConfig

from dtrain.models.meta_model import build_meta_model

# Relative: float32 sums in another order; rounding to bfloat16, of weights when they are merged.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
SECONDS = 240
QLORA = ("stages.domain.method.kind=qlora",)
FULL = ("stages.domain.method={kind: full}", "stages.domain.train.learning_rate=1e-3")


@dataclass
class Row:
    """The outcome of a case.

    Attributes:
        outcome: trains, refused, fault, or unbuilt (transformers cannot build or save the model).
        reason: of a refusal, or why it is not built.
        notes: how it trains, and what of it is refused.
        faults: what is wrong, in words that do not change from run to run.
        measures: the differences, and the details of faults.
    """

    case: str
    outcome: str = "trains"
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def fault(self, name: str, detail: object = "") -> None:
        self.outcome = "fault"
        if name not in self.faults:
            self.faults.append(name)
        if detail != "":
            self.measures[name] = str(detail)

    def close(self, name: str, difference: float, tolerance: float) -> None:
        """Note a difference; one above the tolerance is a fault."""
        self.measures[name] = float(f"{difference:.1e}")
        if not difference <= tolerance:
            self.fault(f"{name} differ")


class Checks:
    """All checks of a case, in a folder of their own."""

    def __init__(self, case: models.Case, folder: Path) -> None:
        self.case, self.folder, self.row = case, folder, Row(case.name)
        self.base, self.tolerance = folder / "base", TOLERANCE[case.dtype]
        self.packing = self.experts = True

    def all(self) -> dict[str, Any]:
        """Make the model, run every check that its outcome leaves sense in."""
        started = time.monotonic()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.base.mkdir(parents=True)
        unbuilt = self.write()
        chain = self.run("chain", ranks=2)
        if runs.NOT_PACKED in chain.refusal:
            self.packing = False
            chain = self.run("alone", ranks=2)
        if chain.needs_no_experts:
            self.experts = False
            chain = self.run("without-experts", ranks=2)
        if not (self.base / "config.json").exists():
            self.row.outcome, self.row.reason = "unbuilt", unbuilt
        elif chain.refusal:
            self.refused(chain)
        elif unbuilt:
            self.row.outcome, self.row.reason = "unbuilt", unbuilt
        elif chain.crash:
            self.row.fault("crash", chain.crash)
        else:
            self.trained(chain)
        self.row.seconds = round(time.monotonic() - started, 1)
        shutil.rmtree(self.folder, ignore_errors=True)
        return asdict(self.row)

    def trained(self, chain: runs.Run) -> None:
        """A chain that ended: is what it made right?"""
        row = self.row
        row.measures["kernels"] = chain.said("kernels:")
        self.attempt("the step alone", lambda: self.step(chain))
        self.attempt("merging", lambda: self.results(chain))
        for engine in ("fsdp2", "zero2", "zero3"):
            self.same_losses(engine, chain, (f"engine.kind={engine}",), ranks=2)
        plain = ("model.kernels=off", "stages.domain.train.micro_batch_size=2")
        self.same_losses("plain kernels, micro-batch 2", chain, plain)
        self.qlora()
        self.full()

    def write(self) -> str:
        """Write the model; return why transformers could not, if so."""
        try:
            forks.call(
                lambda: models.write(self.case, self.base), self.folder / "model.log", SECONDS
            )
        except RuntimeError as error:
            return str(error)
        return ""

    def run(
        self, name: str, overrides: tuple[str, ...] = (), ranks: int = 1, stages: int = 2
    ) -> runs.Run:
        if not self.experts and FULL[0] not in overrides:
            of = ("domain", "task")[:stages]
            overrides = (*overrides, *(f"stages.{x}.{runs.WITHOUT_EXPERTS}" for x in of))
        return runs.run(
            self.base,
            self.folder / name,
            overrides,
            ranks=ranks,
            stages=stages,
            dtype=self.case.dtype,
            attention=self.case.attention,
            packing=self.packing,
        )

    def refused(self, chain: runs.Run) -> None:
        """A refusal is right before the first step; later it has cost a training."""
        self.row.outcome, self.row.reason = "refused", self.without_folder(chain.refusal)
        if chain.records():
            self.row.fault("refused after training", self.row.reason)

    def without_folder(self, text: str) -> str:
        return text.replace(f"{self.folder}/", "").replace("base/config.json: ", "")

    def attempt(self, name: str, check: Callable[[], None]) -> None:
        """Run a check; an exception in it is recorded as a fault."""
        try:
            check()
        except RuntimeError as error:
            self.row.fault(f"{name} fails", error)

    def compute(self, name: str, work: Callable[[], Any]) -> Any:
        return forks.call(work, self.folder / f"{name}.log", SECONDS)

    def step(self, chain: runs.Run, *, name: str = "", quantized: bool = False) -> None:
        """The third step against documents alone in plain transformers and PEFT."""
        noted, adapter = chain.observed(), chain.folder / "domain" / "adapter"

        def differences() -> dict[str, Any]:
            model = reference.adapted(self.base, adapter, self.case.dtype, quantized=quantized)
            facts: dict[str, Any] = {"keys": reference.key_differences(model, adapter)}
            facts["experts"] = reference.unadapted_experts(model)
            ids = noted[0]["steps"][0][0]["ids"][:20]
            facts["later"] = reference.sees_later_tokens(model, ids)
            return facts | reference.step_differences(model, noted)

        facts = self.compute(f"step-{name}", differences)
        row, prefix = self.row, f"{name} " if name else ""
        row.close(f"{prefix}losses and documents alone", facts["losses"], self.tolerance)
        row.close(f"{prefix}gradients and documents alone", facts["gradients"], self.tolerance)
        if name:
            return
        row.notes.append("packed" if facts["packed"] > 1 else "one document a sequence")
        if not self.experts:
            row.notes.append("no adapters on its experts")
        if facts["later"] > 1e-3:
            row.fault("not causal: tokens see later ones", f"{facts['later']:.1e}")
        if facts["keys"]:
            row.fault("adapter names are not PEFT's", facts["keys"][:4])
        if facts["idle"]:
            row.fault("adapters without gradient", facts["idle"])
        if facts["experts"] and self.experts:
            row.fault("experts silently left out", facts["experts"][:2])

    def results(self, chain: runs.Run, *, name: str = "", quantized: bool = False) -> None:
        """Each stage's merged model against its adapter on its base."""
        base = self.base
        for stage in ("domain", "task"):
            folder = chain.folder / stage
            if not (folder / "merged").exists():
                continue

            def difference(base: Path = base, folder: Path = folder) -> float:
                adapted = reference.adapted(
                    base, folder / "adapter", self.case.dtype, quantized=quantized
                )
                plain = reference.plain(folder / "merged", self.case.dtype)
                generator = torch.Generator().manual_seed(0)
                texts = [
                    torch.randint(4, 365, (length,), generator=generator) for length in (7, 45, 100)
                ]
                return reference.output_difference(adapted, plain, texts)

            title = f"{name}{' ' if name else ''}{stage}: merged model and adapter on its base"
            self.row.close(title, self.compute(f"merged-{name}{stage}", difference), self.tolerance)
            base = folder / "merged"

    def same_losses(
        self, name: str, chain: runs.Run, overrides: tuple[str, ...], ranks: int = 1
    ) -> runs.Run:
        """Another way to the same numbers; what it refuses is noted."""
        result = self.run(slug(name), overrides, ranks, stages=1)
        if result.refusal:
            self.row.notes.append(f"{name}: refused: {self.without_folder(result.refusal)}")
            if result.records():
                self.row.fault(f"{name}: refused after training")
        elif result.crash:
            self.row.fault(f"{name}: crash", result.crash)
        else:
            self.row.close(f"{name}: losses", far(chain.losses(), result.losses()), self.tolerance)
        return result

    def qlora(self) -> None:
        """Over NF4: every target is held in it under every engine, or the run is refused."""
        first = self.run("qlora", (*QLORA, "output.merge=true"), stages=1)
        if first.refusal:
            self.row.notes.append(f"qlora: refused: {self.without_folder(first.refusal)}")
        elif first.crash:
            self.row.fault("qlora: crash", first.crash)
        else:
            self.quantized("qlora", first)
            self.attempt("qlora", lambda: self.step(first, name="qlora", quantized=True))
            self.attempt("qlora", lambda: self.results(first, name="qlora", quantized=True))
        for engine in ("fsdp2", "zero3"):
            name = f"qlora {engine}"
            if first.refusal:
                result = self.run(slug(name), (*QLORA, f"engine.kind={engine}"), 2, stages=1)
                if not result.refusal:
                    self.row.fault(f"{name}: runs where ddp refuses", result.crash)
            elif not first.crash:
                result = self.same_losses(name, first, (*QLORA, f"engine.kind={engine}"), ranks=2)
                self.quantized(name, result)

    def quantized(self, name: str, run: runs.Run) -> None:
        kept = tuple(self.kept_in_float32)
        for rank in run.observed():
            layers = rank["layers"].items()
            kinds = {kind for layer, kind in layers if not layer.endswith(kept)}
            if kinds != {"Linear4bit"}:
                self.row.fault(f"{name}: targets that are not NF4", sorted(kinds))

    @cached_property
    def kept_in_float32(self) -> list[str]:
        """Ends of the names of layers that transformers keeps in float32 whatever is asked."""
        config = AutoConfig.from_pretrained(self.base)
        return sorted(build_meta_model(config)._keep_in_fp32_modules or ())

    def full(self) -> None:
        """Every weight trains: losses of three steps against plain torch, documents alone."""
        run = self.run("full", FULL, stages=1)
        if run.refusal:
            self.row.notes.append(f"full: refused: {self.without_folder(run.refusal)}")
            return
        if run.crash:
            self.row.fault("full: crash", run.crash)
            return

        def losses() -> list[float]:
            model = reference.plain(self.base, "float32")
            return reference.full_losses(model, run.observed(), run.records())

        def check() -> None:
            expected = self.compute("full-alone", losses)
            self.row.close(
                "full: losses and plain torch", far(expected, run.losses()), self.tolerance
            )

        self.attempt("full", check)


def far(expected: list[float], actual: list[float]) -> float:
    """Greatest relative difference; infinite where a step is missing."""
    if len(expected) != len(actual) or not expected:
        return float("inf")
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(expected, actual, strict=True))


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")
