"""Every conversion rule of the installed transformers, read and written as transformers does it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dtrain.core.errors import UserError
from dtrain.merge.merge import MergeJob, TrainedWeights, check_mergeable
from dtrain.models.conversion import find_moves
from dtrain.models.meta_model import build_meta_model
from dtrain.models.state_dict_names import match_state_dict
from dtrain.models.stored_tensors import ModelTensors
from dtrain.samples.tiny_llama import quiet_transformers

FILE = "model.safetensors"
# Rules without a model that their types build by default, or one without its config.
UNBUILT = {
    "deepseek_ocr2", "dots3_note_vision_encoder", "ernie4_5_vl_moe", "gradium_phonon_tts",
    "nemo_speechlm", "qwen3_omni_moe", "qwen3_omni_moe_text", "step3p5_vision",
}  # fmt: skip


def converted_types() -> list[str]:
    """Types whose files hold tensors in another layout than the model."""
    mapping = conversion_mapping._build_checkpoint_conversion_mapping()
    return sorted(
        kind
        for kind, rules in mapping.items()
        if kind in CONFIG_MAPPING
        and kind not in UNBUILT
        and any(isinstance(rule, WeightConverter) for rule in rules)
    )


def build(kind: str) -> Any:
    """A small random model; of a type without a language model its encoder."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        try:
            return models.build(models.Case(kind))
        except ValueError:
            model = AutoModel.from_config(models.tiny_config(models.Case(kind))).float().eval()
            models.randomize(model)
            return model


def is_trained(model: Any) -> bool:
    """Whether dtrain takes its type for a language model."""
    try:
        return type(build_meta_model(model.config)) is type(model)
    except UserError:
        return False


@pytest.mark.parametrize("kind", converted_types())
def test_files_of_another_layout_are_read_and_written_as_transformers_does(
    kind: str, tmp_path: Path
) -> None:
    model = build(kind)
    base, changed = save(model, tmp_path / "base"), deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wanted = load_file(save(changed, tmp_path / "changed") / FILE)
    files = ModelTensors(base)
    names = match_state_dict(model, files)
    assert not names.missing and not names.unexpected
    expected, new = model.state_dict(), changed.state_dict()
    for conversion in names.conversions:
        made = conversion.convert(files.read)
        assert all(torch.equal(made[entry], expected[entry]) for entry in made)
        shapes = {name: files[name].shape for name in conversion.names}
        written = find_moves(conversion, shapes).revert({e: new[e] for e in made})
        assert all(torch.equal(written[name], wanted[name]) for name in conversion.names)
    if is_trained(model):
        before = (base / FILE).read_bytes()
        assert merged(base, model, tmp_path / "same").read_bytes() == before
        result = load_file(merged(base, changed, tmp_path / "merged"))
        assert result.keys() == wanted.keys()
        assert all(torch.equal(result[name], wanted[name]) for name in wanted)


def save(model: Any, folder: Path) -> Path:
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


def merged(base: Path, model: Any, out: Path) -> Path:
    """The file that a merge of the model's parameters writes."""
    trained = {name: p.detach() for name, p in model.named_parameters()}
    check_mergeable(base, trained)

    def read(name: str, start: int, stop: int) -> Tensor:
        return trained[name].flatten()[start:stop]

    weights = TrainedWeights({n: tuple(t.shape) for n, t in trained.items()}, read, "trained")
    MergeJob(base, out, source="test").replace_weights(weights)
    return out / FILE
