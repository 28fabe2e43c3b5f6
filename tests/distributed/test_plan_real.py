"""The plan's tensors and bytes, against real ranks under every engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.config.deepspeed_file import load_ds_config
from dtrain.config.load import load_recipe
from dtrain.planning.build_workload import build_workload
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.gpus import find_gpu
from dtrain.planning.known_models import find_config, find_shape
from dtrain.planning.simulated_peak import simulate_step
from dtrain.planning.workload import Cluster

SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
LORA = "{kind: lora, r: 8, dropout: 0.05}"
DORA = "{kind: dora, r: 8, dropout: 0.0}"
WHOLE = "{kind: lora, r: 8, dropout: 0.05, modules_to_save: [embed_tokens, lm_head, norm]}"
QLORA = "{kind: qlora, r: 8, dropout: 0.0}"
LAST_LAYERS = "{kind: full, trainable_layers: 2}"
# DeepSpeed's sizes, reduced as much as this model is smaller than those of the shipped files.
SMALL = {
    "reduce_bucket_size": 1_000_000,
    "stage3_prefetch_bucket_size": 250_000,
    "stage3_param_persistence_threshold": 1_000,
    "stage3_max_live_parameters": 3_000_000,
    "stage3_max_reuse_distance": 3_000_000,
}
CASES = [
    ("ddp", LORA, False),
    ("ddp", "{kind: full}", True),
    ("ddp", LAST_LAYERS, False),
    ("fsdp2", LAST_LAYERS, True),
    ("fsdp2", DORA, False),
    ("ddp", WHOLE, False),
    ("fsdp2", LORA, True),
    ("fsdp2", WHOLE, False),
    ("fsdp2", "{kind: full}", False),
    ("fsdp2", QLORA, False),
    ("zero2", LORA, False),
    ("zero2", QLORA, True),
    ("zero3", LORA, False),
    ("zero2", "{kind: full}", True),
    ("zero3", "{kind: full}", False),
    ("zero3", QLORA, True),
]
WITH_SMALL_SIZES = CASES[-3:]
SIMULATED = [("ddp", LORA, False), ("fsdp2", LORA, True)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A random Llama of 6.5M parameters."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def overrides(base: Path, engine: str, method: str, checkpointing: bool) -> list[str]:
    sizes = []
    if (engine, method, checkpointing) in WITH_SMALL_SIZES:
        settings = load_ds_config(None, engine, False)
        zero = settings["zero_optimization"]
        zero |= {key: value for key, value in SMALL.items() if key in zero}
        config_file = base / f"{engine}.json"
        config_file.write_text(json.dumps(settings))
        sizes = [f"engine.config={config_file}"]
    return [
        *sizes,
        f"model.base={base}",
        "device=cpu",
        f"engine.kind={engine}",
        f"model.gradient_checkpointing={str(checkpointing).lower()}",
        f"stages.domain.method={method}",
        "stages.domain.data.sequence_length=256",
        "stages.domain.train.global_batch_size=4",
    ]


def test_plan_matches_memory_and_traffic_of_real_ranks(start, base: Path) -> None:
    words = [word for case in CASES for word in ("+", *overrides(base, *case))][1:]
    lines = start(2, "plan_worker", words).splitlines()
    facts = [json.loads(x.removeprefix("FACTS ")) for x in lines if x.startswith("FACTS ")]
    shape, _ = find_shape(str(base))
    cluster = Cluster(find_gpu("h100-80g"), 1, 2)
    for case, real in zip(CASES, facts, strict=True):
        recipe = load_recipe("tiny", overrides(base, *case))
        workload = build_workload(recipe, recipe.stages[0], shape, cluster)
        model, peak = build_engine_model(workload), max(real["phases"].values())
        plan = model.peak_memory()
        assert plan.peak == pytest.approx(peak, rel=0.03), case
        # DeepSpeed's buckets are larger than this model, and would hide an error in the rest.
        assert plan.peak - plan.buffers == pytest.approx(peak - plan.buffers, rel=0.03), case
        sent = sum(real["received"].values())
        assert model.received_bytes() == pytest.approx(sent, rel=0.01), case
        if case in SIMULATED:
            config, _ = find_config(str(base))
            exact = simulate_step(recipe, "domain", workload, config, lambda done: None)
            assert exact.layers == (3, 4, 5), "what follows for six layers is what is compared"
            assert exact.peak.total == pytest.approx(peak, rel=0.005), case
