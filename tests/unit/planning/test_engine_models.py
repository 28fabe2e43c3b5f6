"""Memory, communication, fit and suggestions, compared with the literature."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtrain.config.deepspeed_file import load_ds_config
from dtrain.config.engines import ENGINES
from dtrain.config.load import load_recipe
from dtrain.config.methods import parse_method
from dtrain.core.errors import UserError
from dtrain.planning.activations import TrainerProfile, layer_bytes, saved_bytes
from dtrain.planning.build_workload import build_workload
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.fit import DOES_NOT_FIT, FITS, assess_fit, suggest_changes
from dtrain.planning.gpus import GPUS, find_gpu, gpu_of_device
from dtrain.planning.known_models import find_shape
from dtrain.planning.memory_estimate import MemoryEstimate
from dtrain.planning.parameters import layer_parameters, padded_bytes
from dtrain.planning.plan import make_plan
from dtrain.planning.speed import flops_per_token
from dtrain.planning.workload import (
    BUCKET_ELEMENTS,
    LIVE_ELEMENTS,
    PERSISTENT_ELEMENTS,
    Cluster,
    Workload,
)
from dtrain.planning.zero3_gathers import simulate_gathers

GB = 1e9


def workload(base: str, method: str, engine: str, ranks: int = 8, **more: object) -> Workload:
    shape, _ = find_shape(base)
    defaults = {
        "shape": shape,
        "method": parse_method({"kind": method} | ({} if method == "full" else {"dropout": 0.0})),
        "engine": engine,
        "ranks": ranks,
        "node_ranks": min(8, ranks),
        "shard": 1 if engine in ("ddp", "zero2") else ranks,
        "element_bytes": 2,
        "sequence_length": 2048,
        "micro_batch": 1,
        "accumulation": 4,
        "checkpointing": True,
    }
    return Workload(**(defaults | more))


def peak_memory(job: Workload) -> MemoryEstimate:
    return build_engine_model(job).peak_memory()


def entering_bytes(job: Workload) -> float:
    return build_engine_model(job).entering_bytes()


def received_bytes(job: Workload) -> float:
    return build_engine_model(job).received_bytes()


def test_every_engine_has_a_model() -> None:
    names = [
        type(build_engine_model(workload("meta-llama/Llama-2-7b", "lora", kind))).__name__
        for kind in ENGINES
    ]
    assert names == ["DdpModel", "Fsdp2Model", "Zero2Model", "Zero3Model"]


def test_weights_match_the_literature() -> None:
    # 70B in NF4 with double quantization: 0.516 bytes of each linear weight, the rest in 16 bits.
    assert build_engine_model(
        workload("meta-llama/Llama-2-70b", "qlora", "ddp")
    ).weight_bytes == pytest.approx(37.0 * GB, rel=0.01)
    # ZeRO (arXiv:1910.02054): 2 + 2 + 12 bytes a parameter, and 2 more since gradients are summed
    # in float32; stage 3 on R ranks: a share of each.
    full = workload("meta-llama/Llama-2-7b", "full", "zero3")
    model = build_engine_model(full)
    static = model.weight_bytes + model.gradient_bytes + model.optimizer_bytes
    assert static == pytest.approx(18 * full.shape.parameters / 8)


def test_saved_activations_match_a_trace() -> None:
    """16h + 4q + 4kv + 8f + 4 heads + 8 bytes a token, as traced on a bfloat16 Llama-2-7B."""
    flash = TrainerProfile(attention_copies=False)
    job = workload("meta-llama/Llama-2-7b", "full", "zero2", checkpointing=False)
    assert layer_bytes(job, flash) == 186_504


def test_sharding_reduces_memory() -> None:
    for method in ("full", "lora", "qlora"):
        whole = peak_memory(workload("Qwen/Qwen2.5-7B", method, "ddp")).peak
        halves = peak_memory(workload("Qwen/Qwen2.5-7B", method, "fsdp2", 2)).peak
        eighths = peak_memory(workload("Qwen/Qwen2.5-7B", method, "fsdp2", 8)).peak
        assert whole > halves > eighths


def test_a_single_ddp_rank_accumulates_next_to_its_buckets() -> None:
    """DDP has buckets on one rank too, and gradients that are not sent yet are outside them."""
    for ranks in (1, 8):
        job = workload("Qwen/Qwen2.5-7B", "qlora", "ddp", ranks)
        assert build_engine_model(job).gradient_bytes == 2 * 4 * job.trainable
        assert build_engine_model(replace(job, accumulation=1)).gradient_bytes == 4 * job.trainable


def test_more_ranks_than_rows_are_padded() -> None:
    """FSDP2 gives every rank a row of a matrix: with 1024 ranks 16 rows become 1024."""
    some, many = (workload("Qwen/Qwen2.5-7B", "lora", "fsdp2", ranks) for ranks in (16, 1024))
    h, r = some.shape.hidden, some.method.rank
    up = next(x for x in layer_parameters(some) if (x.rows, x.columns) == (r, h) and x.trains)
    assert (up.row_share(16), up.row_share(1024)) == (h, h)
    wide, narrow = (padded_bytes(layer_parameters(job), job.shard) for job in (many, some))
    padding = sum(4 * (1024 - r) * x.inputs for x in some.adapted)
    assert padding <= wide - narrow < 1.5 * padding  # rows of the base do not divide either
    assert peak_memory(many).gathered - peak_memory(some).gathered >= padding


def test_fsdp2_first_has_its_embeddings_twice() -> None:
    """Once in the buffer that was received, once in the copies."""
    job = workload("Qwen/Qwen2.5-0.5B", "lora", "fsdp2", sequence_length=128)
    peak = peak_memory(job)
    assert peak.moment == "gather"
    assert peak.gathered > 2 * 2 * job.shape.outer_parameters


def test_zero3_keeps_a_small_model_and_gathers_it_once() -> None:
    job = workload("Qwen/Qwen2.5-0.5B", "full", "zero3")
    schedule = simulate_gathers(job)
    inner = [x.elements for x in layer_parameters(job)]
    whole = job.shape.parameters - schedule.persistent
    assert schedule.received == pytest.approx(whole, rel=1e-4)  # padded
    assert max(m.elements for m in schedule.peaks) >= whole
    assert schedule.persistent == pytest.approx(
        job.shape.hidden + job.shape.layers * sum(n for n in inner if n <= PERSISTENT_ELEMENTS)
    )


def test_zero3_gathers_a_large_model_twice_within_its_limits() -> None:
    job = workload("meta-llama/Llama-3.1-70B", "lora", "zero3", 16)
    schedule = simulate_gathers(job)
    twice = 2 * job.shape.layers * job.shape.layer_parameters
    assert schedule.received == pytest.approx(twice + job.shape.outer_parameters, rel=0.05)
    most = max(m.elements for m in schedule.peaks)
    # The live limit, and a layer in the buffer that it arrived in.
    assert LIVE_ELEMENTS < most < LIVE_ELEMENTS + 1.3 * job.shape.layer_parameters
    tight = simulate_gathers(replace(job, live_elements=10**8, prefetch_elements=10**7))
    assert max(m.elements for m in tight.peaks) < most


def test_replicated_qlora_sends_only_adapters() -> None:
    """What goes between nodes depends on the adapter, not on the base or the accumulation."""
    two_nodes = {"ranks": 16, "node_ranks": 8}
    small = workload("Qwen/Qwen2.5-7B", "qlora", "ddp", **two_nodes)
    n = small.trainable
    assert entering_bytes(small) == pytest.approx(2 * 15 / 16 * 4 * n)
    assert entering_bytes(replace(small, accumulation=64)) == entering_bytes(small)
    node = workload("Qwen/Qwen2.5-7B", "qlora", "fsdp2", shard=8, **two_nodes)
    assert entering_bytes(node) == pytest.approx(2 * 1 / 2 * 4 * n)
    assert entering_bytes(replace(node, accumulation=64)) == entering_bytes(node)
    # Over the 4-bit base 74 GB a micro-batch for 70B on 16 ranks, over bfloat16 265 GB.
    wide = workload("meta-llama/Llama-3.1-70B", "qlora", "fsdp2", accumulation=1, **two_nodes)
    assert received_bytes(wide) == pytest.approx(74 * GB, rel=0.05)
    wide = workload("meta-llama/Llama-3.1-70B", "lora", "fsdp2", accumulation=1, **two_nodes)
    assert received_bytes(wide) == pytest.approx(265 * GB, rel=0.05)


@pytest.mark.parametrize(
    ("base", "method", "gpu", "gpus", "fits"),
    [
        ("meta-llama/Llama-2-7b", "qlora", "rtx4090", 1, True),
        ("meta-llama/Llama-2-7b", "lora", "rtx4090", 1, True),
        ("meta-llama/Llama-2-7b", "full", "h100-80g", 1, False),
        ("meta-llama/Llama-2-13b", "lora", "a100-40g", 1, True),
        ("meta-llama/Llama-2-70b", "qlora", "a6000", 1, False),
        ("meta-llama/Llama-2-70b", "qlora", "h100-80g", 1, True),
        ("meta-llama/Llama-2-70b", "lora", "h100-80g", 1, False),
    ],
)
def test_well_known_cases_fit(base: str, method: str, gpu: str, gpus: int, fits: bool) -> None:
    cluster = Cluster(find_gpu(gpu), 1, gpus)
    fit = assess_fit(workload(base, method, "ddp", gpus), cluster)
    assert (fit.verdict == FITS) == fits, fit


def test_suggestions_fit_and_start_with_the_cheapest() -> None:
    cluster = Cluster(find_gpu("a100-40g"), 1, 8)
    large = workload("Qwen/Qwen2.5-7B", "lora", "ddp", micro_batch=16, accumulation=1)
    assert assess_fit(large, cluster).verdict == DOES_NOT_FIT
    changes = suggest_changes(large, cluster)
    assert changes[0].settings == ("train.micro_batch_size=4",)
    for change in changes:
        assert assess_fit(change.workload, change.cluster).verdict == FITS


def test_cheap_changes_are_combined_before_expensive_ones() -> None:
    """Micro-batch, checkpointing, rank and sharding together cost less than larger GPUs."""
    cluster = Cluster(find_gpu("rtx4090"), 1, 2)
    large = replace(
        workload("meta-llama/Llama-2-7b", "lora", "ddp", 2, micro_batch=4, sequence_length=8192),
        checkpointing=False,
    )
    changes = suggest_changes(large, cluster)
    assert len(changes) == 3 and any(len(change.settings) > 1 for change in changes)
    for change in changes:
        assert assess_fit(change.workload, change.cluster).verdict == FITS
        kinds = [setting.split("=")[0] for setting in change.settings]
        assert len(set(kinds)) == len(kinds)  # one value for each key
        assert "--gpu rtx6000ada-48g" not in change.settings


def test_no_combination_has_a_change_too_many() -> None:
    cluster = Cluster(find_gpu("rtx4090"), 1, 8)
    large = workload("meta-llama/Llama-2-70b", "lora", "ddp", micro_batch=4, checkpointing=False)
    changes = suggest_changes(large, cluster)
    assert changes
    sets = [frozenset(change.settings) for change in changes]
    assert not any(one < other for one in sets for other in sets)


def test_a_lower_rank_is_advice_where_the_adapter_is_what_is_large() -> None:
    cluster = Cluster(find_gpu("rtx4090"), 1, 1)
    method = parse_method({"kind": "qlora", "r": 512})
    large = replace(workload("meta-llama/Llama-2-7b", "qlora", "ddp", 1), method=method)
    assert assess_fit(large, cluster).verdict != FITS
    assert suggest_changes(large, cluster)[0].settings == ("method.r=256",)


def test_training_on_answers_may_need_no_logits() -> None:
    """A long sequence may have few targets, so the logits are no lower bound."""
    every = workload("Qwen/Qwen2.5-7B", "qlora", "ddp", sequence_length=16384)
    answers = replace(every, trains_on_all_tokens=False)
    cluster = Cluster(find_gpu("l4"), 1, 8)
    assert peak_memory(every).moment == "loss"
    head = peak_memory(every).working
    assert assess_fit(answers, cluster).lower < assess_fit(every, cluster).lower - head / 2
    assert assess_fit(answers, cluster).budget == assess_fit(every, cluster).budget
    recipe = load_recipe("7b-lora")
    kinds = {
        x.kind: build_workload(recipe, x, every.shape, cluster).trains_on_all_tokens
        for x in recipe.stages
    }
    assert kinds == {"cpt": True, "sft": False}


def test_memory_for_error_correction_is_not_usable() -> None:
    gib = 2**30
    for name in ("a40", "l40", "l40s"):
        assert find_gpu(name).usable_bytes == pytest.approx(44.4 * gib)
    for name in ("a10", "a10g", "l4"):
        assert find_gpu(name).usable_bytes < 22 * gib
    assert gpu_of_device("NVIDIA L40S", int(44.4 * gib)) is GPUS["l40s-48g"]


def test_auto_in_a_deepspeed_file_keeps_the_default_limits(tmp_path) -> None:
    file = tmp_path / "zero3.json"
    zero = '"stage": 3, "reduce_bucket_size": "auto", "stage3_max_live_parameters": 5e8'
    file.write_text(f'{{"zero_optimization": {{{zero}}}}}')
    recipe = load_recipe("7b-lora", [f"engine={{kind: zero3, config: {file}}}"])
    shape, _ = find_shape("Qwen/Qwen2.5-7B")
    job = build_workload(recipe, recipe.stages[0], shape, Cluster(find_gpu("h100-80g"), 1, 8))
    assert (job.bucket_elements, job.live_elements) == (BUCKET_ELEMENTS, 500_000_000)
    assert (job.prefetch_elements, job.reuse_elements) == (3584 * 3584 * 9 // 10, LIVE_ELEMENTS)


def test_gpus_are_found_by_name() -> None:
    assert find_gpu("H100_80GB").name == "h100-80g"
    assert find_gpu("rtx4090").name == "rtx4090-24g"
    with pytest.raises(UserError, match="did you mean a100-40g or a100-80g"):
        find_gpu("a100")
    with pytest.raises(UserError, match="did you mean h100-80g"):
        find_gpu("h10-80g")
    gib = 2**30
    assert gpu_of_device("NVIDIA A100-SXM4-80GB", int(79.2 * gib)) is GPUS["a100-80g"]
    assert gpu_of_device("NVIDIA A10G", int(22.5 * gib)) is GPUS["a10g-24g"]
    assert gpu_of_device("NVIDIA H100 PCIe", int(79.1 * gib)) is GPUS["h100-pcie-80g"]
    assert gpu_of_device("Something", 10 * gib).usable_bytes == pytest.approx(10 * gib)


def test_limits_match_the_shipped_deepspeed_files() -> None:
    for kind, offload in (("zero2", False), ("zero3", False), ("zero3", True)):
        zero = load_ds_config(None, kind, offload)["zero_optimization"]
        assert zero["reduce_bucket_size"] == BUCKET_ELEMENTS
        if kind == "zero2":
            continue
        assert zero["stage3_param_persistence_threshold"] == PERSISTENT_ELEMENTS
        assert zero["stage3_prefetch_bucket_size"] == "auto"
        assert zero["stage3_max_live_parameters"] == LIVE_ELEMENTS
        assert zero["stage3_max_reuse_distance"] == LIVE_ELEMENTS


def test_a_recipe_becomes_a_workload() -> None:
    recipe = load_recipe("70b-qlora")
    shape, _ = find_shape(recipe.model.base)
    cluster = Cluster(find_gpu("h100-80g"), 2, 8)
    job = build_workload(recipe, recipe.stages[0], shape, cluster)
    assert (job.shard, job.ranks, job.accumulation, job.tokens) == (8, 16, 4, 2048)
    assert job.step_tokens == 64 * 2048
    bad = load_recipe("70b-qlora", ["engine.shard=3"])
    with pytest.raises(UserError, match="do not divide into groups of 3"):
        build_workload(bad, bad.stages[0], shape, cluster)


def test_frozen_layers_cost_neither_state_nor_gradients_nor_backward() -> None:
    whole = workload("meta-llama/Llama-2-7b-hf", "full", "fsdp2", checkpointing=False)
    last = replace(whole, method=parse_method({"kind": "full", "trainable_layers": 8}))
    layer = whole.shape.layer_parameters
    assert (last.trainable, whole.trainable) == (8 * layer, whole.shape.parameters)
    assert saved_bytes(last) == pytest.approx(saved_bytes(whole) / 4, rel=0.01)
    # Forward everywhere; gradients of the input, and of weights, in a quarter of the layers.
    assert 1.5 / 3 < flops_per_token(last) / flops_per_token(whole) < 1.6 / 3
    kept, of_whole = peak_memory(last), peak_memory(whole)
    assert kept.optimizer == 8.0 * 8 * layer / 8
    frozen = whole.shape.parameters - 8 * layer  # in 16 bits
    assert kept.weights == pytest.approx((4 * 8 * layer + 2 * frozen) / 8, rel=1e-3)
    assert kept.peak < of_whole.peak / 2


def test_a_reference_costs_a_forward_pass_of_the_base() -> None:
    job = workload("meta-llama/Llama-3.1-70B", "lora", "fsdp2")
    shape = job.shape
    attention = 2 * shape.q * job.sequence_length * shape.layers
    forward = 2 * (shape.linear_elements + shape.vocabulary * shape.hidden) + attention
    with_reference = flops_per_token(replace(job, extra_forwards=1))
    assert with_reference - flops_per_token(job) == forward


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_pass_without_a_gradient_gathers_the_weights_once(engine) -> None:
    job = workload("meta-llama/Llama-3.1-70B", "lora", engine)
    alone, with_passes = (build_engine_model(replace(job, extra_runs=runs)) for runs in (0, 2))
    layers = job.shape.layers * job.shape.layer_parameters
    share = 1 - 1 / job.shard
    once = (with_passes.received_bytes() - alone.received_bytes()) / 2 / job.accumulation
    least, most = (2 * share * n for n in (layers, job.shape.parameters))
    assert 0.999 * least < once < 1.01 * most


def test_a_stored_reference_computes_before_the_first_step_only() -> None:
    def plan(*overrides):
        length = ["stages.preference.train.epochs=null", "stages.preference.train.steps=100"]
        recipe = load_recipe("70b-dpo", [*length, *overrides])
        return make_plan(recipe, Cluster(find_gpu("h100-80g"), 1, 8)).stages[-1]

    each_step, stored = plan(), plan("stages.preference.preference.precompute_reference=true")
    assert (each_step.workload.extra_forwards, each_step.workload.extra_runs) == (1, 1)
    assert (stored.workload.extra_forwards, stored.workload.extra_runs) == (0, 0)
    assert stored.speed.middle > 1.2 * each_step.speed.middle
    assert each_step.minutes_before == 0 < stored.minutes_before
    assert each_step.time.training and stored.time.training  # of one epoch, the work is the same
    assert stored.time.training.middle == pytest.approx(each_step.time.training.middle, rel=0.1)


def test_a_teacher_costs_its_forward_pass_and_its_weights() -> None:
    teacher, _ = find_shape("meta-llama/Llama-3.1-70B")
    for engine, ranks_per_layer in (("ddp", 1), ("fsdp2", 8), ("zero3", 8)):
        alone = workload("meta-llama/Llama-3.1-8B", "lora", engine)
        job = replace(alone, teacher=teacher, distills=True)
        attention = 2 * teacher.q * job.sequence_length * teacher.layers
        forward = 2 * (teacher.linear_elements + teacher.vocabulary * teacher.hidden) + attention
        assert flops_per_token(job) - flops_per_token(alone) == forward
        model, without = build_engine_model(job), build_engine_model(alone)
        layers = teacher.layers * teacher.layer_parameters
        kept = 2 * (layers / ranks_per_layer + teacher.outer_parameters)
        assert model.weight_bytes - without.weight_bytes == pytest.approx(kept, rel=1e-6)
        assert model.peak_memory().peak - without.peak_memory().peak >= kept
        stored = build_engine_model(replace(job, stores_teacher=True))
        assert flops_per_token(stored.workload) == flops_per_token(alone)
        assert stored.weight_bytes == without.weight_bytes
        (teaching,) = stored.teacher_moments()
        assert teaching.peak >= without.weight_bytes + kept
        sent = model.received_bytes() - without.received_bytes()
        assert sent == pytest.approx(job.accumulation * 2 * layers * (1 - 1 / ranks_per_layer))


def test_the_plan_finds_the_teacher_of_a_recipe() -> None:
    group = "{teacher: meta-llama/Llama-3.1-70B}"
    overrides = ["stages.task.kind=distill", f"stages.task.distill={group}"]
    recipe = load_recipe("7b-lora", overrides)
    shape, _ = find_shape("meta-llama/Llama-3.1-8B")
    cluster = Cluster(find_gpu("h100-80g"), 1, 8)
    job = build_workload(recipe, recipe.stages[-1], shape, cluster)
    assert job.teacher is not None and job.teacher.layers == 80 and job.extra_forwards == 0
    own = "{teacher: base, ce_weight: 0.5}"
    recipe = load_recipe("7b-lora", [overrides[0], f"stages.task.distill={own}"])
    job = build_workload(recipe, recipe.stages[-1], shape, cluster)
    assert job.teacher is None and job.extra_forwards == 1 and job.distills
    unknown = "{teacher: someone/unknown}"
    recipe = load_recipe("7b-lora", [overrides[0], f"stages.task.distill={unknown}"])
    with pytest.raises(UserError) as caught:
        build_workload(recipe, recipe.stages[-1], shape, cluster)
    assert caught.value.where == "stages.task.distill.teacher"
