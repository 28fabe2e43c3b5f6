"""The shipped recipes on the GPUs that they are for, and the table of slurm/README.md.

After an intended change, `python tests/unit/planning/test_plan_recipes.py` prints the new table.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config.load import load_recipe
from dtrain.planning.fit import FITS
from dtrain.planning.gpus import find_gpu
from dtrain.planning.plan import make_plan
from dtrain.planning.workload import Cluster
from dtrain.recipes import shipped

GUIDE = Path(__file__).parents[3] / "slurm" / "README.md"

# Shipped recipe → the smallest cluster that its file names.
CLUSTER_OF = {
    "7b-lora": ("a100-40g", 1, 8),
    "7b-qlora": ("rtx4090-24g", 1, 1),
    "8b-full": ("h100-80g", 1, 8),
    "13b-lora": ("rtx4090-24g", 1, 8),
    "13b-qlora": ("rtx4090-24g", 1, 1),
    "32b-lora": ("l40s-48g", 1, 8),
    "32b-qlora": ("rtx4090-24g", 1, 8),
    "30b-a3b-lora": ("l40s-48g", 1, 8),
    "gpt-oss-20b-lora": ("rtx4090-24g", 1, 8),
    "qwen3.5-35b-a3b-lora": ("l40s-48g", 1, 8),
    "gpt-oss-120b-qlora": ("l40s-48g", 1, 8),
    "glm-4.5-air-qlora": ("l40s-48g", 1, 8),
    "70b-qlora": ("l40s-48g", 2, 8),
    "70b-dpo": ("l40s-48g", 2, 8),
    "70b-lora-zero3": ("h100-80g", 2, 8),
}
SMALL = ("tiny", "quickstart", "quickstart-dpo")  # run on any machine

GPUS = ("rtx4090-24g", "l40s-48g", "h100-80g")
CLUSTERS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8))
SEVEN = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B")
THIRTEEN = ("meta-llama/Llama-2-13b-hf", "Qwen/Qwen2.5-14B")
THIRTY = ("codellama/CodeLlama-34b-hf", "Qwen/Qwen2.5-32B")
SEVENTY = ("meta-llama/Llama-3.1-70B", "Qwen/Qwen2.5-72B")
ROWS = (
    ("7b-lora", SEVEN),
    ("7b-qlora", SEVEN),
    ("8b-full", SEVEN),
    ("13b-lora", THIRTEEN),
    ("13b-qlora", THIRTEEN),
    ("8b-full", THIRTEEN),
    ("32b-lora", THIRTY),
    ("32b-qlora", THIRTY),
    ("8b-full", THIRTY),
    ("gpt-oss-20b-lora", ("openai/gpt-oss-20b",)),
    ("30b-a3b-lora", ("Qwen/Qwen3-30B-A3B",)),
    ("qwen3.5-35b-a3b-lora", ("Qwen/Qwen3.5-35B-A3B",)),
    ("glm-4.5-air-qlora", ("zai-org/GLM-4.5-Air",)),
    ("gpt-oss-120b-qlora", ("openai/gpt-oss-120b",)),
    ("70b-lora-zero3", SEVENTY),
    ("70b-qlora", SEVENTY),
    ("70b-dpo", SEVENTY),
)


def row(name: str, bases: tuple[str, ...]) -> str:
    """A row of the table: where a recipe fits with every one of the bases."""
    cells = [smallest(name, bases, gpu) for gpu in GPUS]
    return f"| `{name}` | {', '.join(base.partition('/')[2] for base in bases)} | " + (
        " | ".join(cells) + " |"
    )


def smallest(name: str, bases: tuple[str, ...], gpu: str) -> str:
    """The first cluster on which all bases fit, as nodes x GPUs."""
    for nodes, gpus in CLUSTERS:
        cluster = Cluster(find_gpu(gpu), nodes, gpus)
        if all(verdict_of(name, base, cluster) == FITS for base in bases):
            return f"{nodes} x {gpus}"
    return "no"


def verdict_of(name: str, base: str, cluster: Cluster) -> str:
    """The plan's verdict with an engine of its choice."""
    keys = [f"model.base={base}", "engine={kind: auto}"]
    return make_plan(load_recipe(name, keys), cluster).verdict


def test_every_shipped_recipe_has_a_cluster() -> None:
    assert set(shipped()) == {*CLUSTER_OF, *SMALL}
    assert {name for name, _ in ROWS} == set(CLUSTER_OF)


@pytest.mark.parametrize("name", CLUSTER_OF)
def test_shipped_recipes_fit_their_cluster(name: str) -> None:
    gpu, nodes, gpus = CLUSTER_OF[name]
    plan = make_plan(load_recipe(name), Cluster(find_gpu(gpu), nodes, gpus))
    assert plan.verdict == FITS, [(x.name, x.fit) for x in plan.stages]


@pytest.mark.parametrize(("name", "bases"), ROWS)
def test_the_table_of_the_guide_is_current(name: str, bases: tuple[str, ...]) -> None:
    assert row(name, bases) in GUIDE.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    print("\n".join(row(name, bases) for name, bases in ROWS))
