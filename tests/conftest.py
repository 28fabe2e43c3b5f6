"""What every test needs: no network, no display, as many threads as a shared machine bears."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from dtrain.core import hash_cache

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
for _name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):  # the help would be colored in a pipe
    os.environ.pop(_name, None)

# The same examples every time, and no time limit on a busy machine.
settings.register_profile("dtrain", deadline=None, derandomize=True, database=None)
settings.load_profile("dtrain")
gc.disable()  # until all is imported


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collections of garbage do not visit what was imported: else each of them takes a second."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _hashes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hashes of files that are gone tomorrow do not stay in the user's cache."""
    folder: Path = tmp_path_factory.mktemp("hashes")
    hash_cache._folder = lambda: folder  # type: ignore[assignment]


def _as_before() -> Iterator[None]:
    """Leave the kernels' compiled loops, which the whole process uses or not, as they were."""
    name = "dtrain.models.kernels.native"
    native = sys.modules.get(name)
    was_on = native is not None and native.is_enabled()
    yield
    if (native := sys.modules.get(name)) is not None and native.is_enabled() != was_on:
        native.set_enabled(on=was_on)


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """A command that a test calls in this process makes what later tests write private."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


_loops_of_a_file = pytest.fixture(scope="module", autouse=True)(_as_before)
_loops_of_a_test = pytest.fixture(autouse=True)(_as_before)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """write_rows(name, rows) → path of a JSON lines file."""

    def write(name: str, rows: list[Any]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], str]:
    """SHA-256 of the adapters and models of a run folder."""

    def digest(folder: Path) -> str:
        hasher = hashlib.sha256()
        for path in sorted(folder.glob("*/[am]*/*.safetensors")):
            hasher.update(str(path.relative_to(folder)).encode() + path.read_bytes())
        return hasher.hexdigest()

    return digest


TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA4 = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512,
          "num_kv_shared_layers": 0, "global_head_dim": 16}  # fmt: skip
DEEPSEEK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
            "qk_nope_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "apertus": TEXT,
    "bart": {"vocab_size": 512, "d_model": 64, "decoder_layers": 2, "decoder_ffn_dim": 128,
             "decoder_attention_heads": 4, "max_position_embeddings": 256},
    "dbrx": {"vocab_size": 512, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
             "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v3": TEXT | DEEPSEEK,
    "doge": TEXT,
    "falcon": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2,
               "num_attention_heads": 4},
    "gemma3": {"text_config": TEXT, "vision_config": IMAGES, "mm_tokens_per_image": 4},
    "gemma3n_text": TEXT | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512,
                            "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0],
                            "laurel_rank": 8},
    "gemma4": {"text_config": TEXT | GEMMA4, "audio_config": None,
               "vision_config": IMAGES | {"num_key_value_heads": 2, "head_dim": 16,
                                          "global_head_dim": 16}},
    "gemma4_text": TEXT | GEMMA4,
    "gpt2": {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "granitemoehybrid": TEXT | {"layer_types": ["attention", "attention"],
                                "shared_intermediate_size": 64},
    "hrm_text": TEXT,
    "jamba": TEXT | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4,
                     "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8,
                     "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "jetmoe": TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16,
                      "num_key_value_heads": 2},
    "llama": TEXT,
    "longcat_flash": TEXT | DEEPSEEK | {"num_layers": 2, "num_hidden_layers": 4, "moe_topk": 2,
                                        "expert_ffn_hidden_size": 32, "zero_expert_num": 2,
                                        "ffn_hidden_size": 64, "num_key_value_heads": 4,
                                        "head_dim": 8},
    "mamba": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "mistral3": {"text_config": TEXT | {"model_type": "mistral"},
                 "vision_config": IMAGES | {"model_type": "pixtral", "head_dim": 16}},
    "qwen4_exp_text": TEXT | {
        "layer_types": ["linear_attention", "indexed_attention"], "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "indexer_n_heads": 4,
        "shared_expert_intermediate_size": 32, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 8, "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8},
    "qwen2_5_vl": {"text_config": TEXT | {"rope_parameters": {
                       "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
                   "vision_config": {"hidden_size": 32, "intermediate_size": 64, "depth": 1,
                                     "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
                                     "fullatt_block_indexes": [0]}},
    "llama4": {"text_config": TEXT | {"num_local_experts": 4}, "vision_config": IMAGES},
    "qwen3": TEXT,
    "qwen3_vl_moe": {"text_config": TEXT | {"num_experts": 4, "moe_intermediate_size": 24,
                         "num_experts_per_tok": 2, "rope_parameters": {
                             "rope_type": "default", "rope_theta": 10000.0,
                             "mrope_section": [2, 3, 3]}},
                     "vision_config": {"hidden_size": 32, "intermediate_size": 64, "depth": 1,
                                       "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
                                       "num_position_embeddings": 16,
                                       "deepstack_visual_indexes": [0]}},
}  # fmt: skip


@pytest.fixture
def save_small() -> Callable[..., Any]:
    """Write a small random model of any type of transformers, and give it back.

    Without a folder it gives the config alone; `text` changes the text config of a wrapper.
    Every weight and buffer that is stored is changed: none is what the model begins with.
    """
    import torch
    from transformers import AutoConfig

    from dtrain.models.meta_model import auto_class

    def save(
        kind: str, folder: Path | None, text: dict[str, Any] | None = None, **changes: Any
    ) -> Any:
        settings = SMALL[kind] | changes
        if text:
            settings["text_config"] = settings["text_config"] | text
        config = AutoConfig.for_model(kind, **settings)
        if folder is None:
            return config
        torch.manual_seed(0)
        model = auto_class(config).from_config(config, dtype=torch.float32)
        stored, generator = model.state_dict(keep_vars=True), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in {id(t): t for t in stored.values()}.values():
                if tensor.is_floating_point():
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensor.add_(noise, alpha=0.05)
        model.save_pretrained(folder)
        return model.eval()

    return save


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system of some size, such as "4m"; the test is skipped where root is missing."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / "small"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
