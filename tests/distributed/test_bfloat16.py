"""In bfloat16 every engine computes in bfloat16, and sums its gradients in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]
METHODS = {
    "lora": "{kind: lora, r: 16, alpha: 32, dropout: 0.0}",
    "qlora": "{kind: qlora, r: 16, alpha: 32, dropout: 0.0}",
    "full": "{kind: full}",
}


def losses_and_norms(run) -> list[tuple[float, float]]:
    return [(r["loss"], r["grad_norm"]) for r in run.records("domain") if "loss" in r]


@pytest.fixture
def trained(start_ranks):
    """The losses and gradient norms of tiny's first stage under an engine, on two ranks."""

    def train(engine: str, method: str, dtype: str) -> list[tuple[float, float]]:
        settings = [f"stages.{stage}.method={METHODS[method]}" for stage in ("domain", "task")]
        settings += ["stages.domain.train.steps=4", "stages.task.train.steps=1"]
        settings += [f"engine.kind={engine}", f"model.dtype={dtype}", "output.merge=false"]
        run = start_ranks(*settings, folder=f"{engine}-{method}-{dtype}", evaluates=False)
        run.wait(0)
        return losses_and_norms(run)

    return train


@pytest.mark.parametrize("method", METHODS)
def test_engines_agree_in_bfloat16(trained, method) -> None:
    exact = trained("ddp", method, "float32")
    runs = {engine: trained(engine, method, "bfloat16") for engine in ENGINES}
    for engine, steps in runs.items():
        for (loss, _), (exact_loss, _) in zip(steps, exact, strict=True):
            assert loss == pytest.approx(exact_loss, abs=2e-2), (engine, steps, exact)
        # An engine that computes in float32 after all would give the very same first loss.
        assert abs(steps[0][0] - exact[0][0]) > 1e-5, (engine, steps, exact)
    # Before the first update all hold the same weights: gradients differ by their sums alone,
    # and sums in bfloat16 are off by 2e-4. ddp keeps norms and embeddings in float32.
    norms = {engine: steps[0][1] for engine, steps in runs.items()}
    sharded = [norms[engine] for engine in ENGINES[1:]]
    assert sharded == pytest.approx([norms["fsdp2"]] * 3, rel=1e-5), norms
    assert norms["ddp"] == pytest.approx(norms["fsdp2"], rel=1e-3), norms
