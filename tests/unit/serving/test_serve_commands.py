"""Output of `dtrain adapters` and `dtrain serve`, parsed by a real shell."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrain.config.load import dump, load_recipe
from dtrain.core.errors import UserError
from dtrain.core.run_dir import BASE_MODEL
from dtrain.pipeline.stage_record import stage_record
from dtrain.rank_main import resolve
from dtrain.serving.adapter_list import format_table, list_adapters, read_adapter
from dtrain.serving.run_models import open_run, served_models
from dtrain.serving.vllm import max_rank, module, refusals, script

Make = Callable[..., Path]
Record = Callable[..., None]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
LAYERS = {Q: (64, 64), DOWN: (64, 128)}
HOSTILE = "a'; echo $(id) \"x, y=z"


@pytest.fixture
def make_run(tmp_path: Path, make_adapter: Make, record_stage: Record) -> Callable[..., Path]:
    """Makes a folder that looks like a finished run of two stages."""

    def make(name: str = "run", *overrides: str, methods: tuple = ("lora", "lora")) -> Path:
        folder = tmp_path / name
        for number, stage in enumerate(("domain", "task")):
            make_adapter(
                folder / stage / "adapter", LAYERS, (64, 12)[number],
                base_model_name_or_path=("/models/llama", "/before/it/was/moved")[number],
            )  # fmt: skip
            record_stage(folder / stage, f"id{number}", f"id{number - 1}", methods[number])
            (folder / stage / "merged").mkdir()
            (folder / stage / "merged" / "merge.json").write_text("{}")
        kinds = [f"stages.{s}.method.kind={m}"
                 for s, m in zip(("domain", "task"), methods, strict=True)]  # fmt: skip
        recipe = load_recipe("tiny", [*kinds, *overrides, "model.base=/models/llama"])
        (folder / "recipe.yaml").write_text(dump(recipe))
        return folder

    return make


def commands(text: str) -> list[list[str]]:
    """The words that vllm would get, as bash reads them."""
    show = 'vllm() { printf "%s\\0" "$@"; printf "\\1"; }\n'
    done = subprocess.run(["bash", "-c", show + text], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [command.split("\0")[:-1] for command in done.stdout.split("\1")[:-1]]


def after(words: list[str], option: str) -> list[str]:
    """The values of an option."""
    start = words.index(option) + 1
    values = words[start:]
    stop = next((n for n, value in enumerate(values) if value.startswith("--")), len(values))
    return values[:stop]


def test_several_adapters_of_one_base_share_a_server(
    make_run: Callable[..., Path], make_adapter: Make, record_stage: Record
) -> None:
    rows = {name: {"sources": [{"path": f"{name}.json"}]} for name in ("legal", "code")}
    several = [f"stages.task.adapters={json.dumps(rows)}", "stages.task.data={}"]
    run = make_run("run", *several, "output.merge=false")
    shutil.rmtree(run / "task")
    for name in rows:
        make_adapter(run / f"task-{name}" / "adapter", LAYERS, 8)
        record_stage(run / f"task-{name}", name, "id0", "lora")
    assert [a.name for a in list_adapters(run)] == ["domain", "legal", "code"]
    *_, together = commands(script(open_run(run)))
    assert together[:2] == ["serve", str(run / "domain" / "merged")]
    modules = [f"{name}={run / f'task-{name}' / 'adapter'}" for name in rows]
    assert after(together, "--lora-modules") == modules
    models = served_models(str(run))
    assert list(models) == [BASE_MODEL, "domain", "legal", "code"]
    stacked = [run / "domain" / "adapter", run / "task-code" / "adapter"]
    assert list(models["code"].adapters) == stacked


def test_commands_serve_the_merged_model_and_each_adapter_on_its_base(
    make_run: Callable[..., Path],
) -> None:
    run = make_run()
    merged, domain, task = commands(script(open_run(run)))
    assert merged[:2] == ["serve", str(run / "task" / "merged")] and "--enable-lora" not in merged
    assert after(merged, "--served-model-name") == ["tiny"]
    assert domain[:2] == ["serve", "/models/llama"] and "--enable-lora" in domain
    assert after(domain, "--lora-modules") == [f"domain={run / 'domain' / 'adapter'}"]
    assert after(domain, "--max-lora-rank") == ["64"]
    assert task[:2] == ["serve", str(run / "domain" / "merged")]  # trained on the merged model
    assert after(task, "--max-lora-rank") == ["16"]  # not 12, which is no choice of vLLM's
    assert all(after(words, "--dtype") == ["float32"] for words in (merged, domain, task))


def test_adapters_of_one_base_share_a_server(
    make_run: Callable[..., Path], make_adapter: Make
) -> None:
    run = make_run()
    make_adapter(run / "both", LAYERS, 76)
    _, shared, _ = commands(script(open_run(run)))
    modules = [f"domain={run / 'domain' / 'adapter'}", f"both={run / 'both'}"]
    assert after(shared, "--lora-modules") == modules
    assert after(shared, "--max-lora-rank") == ["128"] and after(shared, "--max-loras") == ["2"]


def test_hostile_names_remain_one_shell_word(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(HOSTILE, f"name={json.dumps(HOSTILE)}")
    merged, domain, task = commands(script(open_run(run)))
    assert merged[1] == str(tmp_path / HOSTILE / "task" / "merged")
    assert after(merged, "--served-model-name") == [HOSTILE]
    (named,) = after(domain, "--lora-modules")
    # name=path is cut at every '=', and a comma distinguishes JSON from it
    assert json.loads(named) == {"name": "domain", "path": str(run / "domain" / "adapter")}
    assert task[1] == str(run / "domain" / "merged")


def test_a_newline_in_a_name_does_not_end_a_comment(make_run: Callable[..., Path]) -> None:
    run = make_run("a\nvllm injected\nb")
    assert len(commands(script(open_run(run)))) == 3


def test_an_adapter_over_nf4_of_a_base_in_codes_is_not_served(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """vLLM refuses --quantization where the base's config names another one."""
    run, stored = make_run(methods=("qlora", "lora")), tmp_path / "codes"
    stored.mkdir()
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    (stored / "config.json").write_text(json.dumps(config))
    for path in (run / "recipe.yaml", run / "domain" / "adapter" / "adapter_config.json"):
        path.write_text(path.read_text().replace("/models/llama", str(stored)))
    text = script(open_run(run))
    assert "in NF4; vLLM cannot load files in mxfp4 as NF4" in text
    assert "--quantization" not in text and len(commands(text)) == 2


def test_nf4_template_and_remote_code_are_in_the_command(make_run: Callable[..., Path]) -> None:
    options = ("model.trust_remote_code=true", "stages.task.data.template=my chat.jinja")
    run = make_run("run", *options, "model.dtype=auto", methods=("qlora", "lora"))
    text = script(open_run(run))
    merged, domain, task = commands(text)
    assert (
        after(domain, "--quantization") == ["bitsandbytes"]
        and "Trained over this base in NF4" in text
    )
    assert "--quantization" not in task and "--quantization" not in merged
    for words in (merged, domain, task):
        assert after(words, "--chat-template") == [str(Path.cwd() / "my chat.jinja")]
        assert "--trust-remote-code" in words and after(words, "--dtype") == ["bfloat16"]
    text = script(open_run(make_run("other", "stages.task.data.template=instruction")))
    assert "### Instruction:" in text and len(commands(text)) == 3


def test_vllm_gets_a_template_without_its_byte_order_mark(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    template = tmp_path / "a.jinja"
    template.write_text("\ufeff{{ 1 }}", encoding="utf-8")
    run = make_run("run", f"stages.task.data.template={template}")
    for words in commands(script(open_run(run))):
        (path,) = after(words, "--chat-template")
        assert Path(path).read_text(encoding="utf-8") == "{{ 1 }}"


def test_relative_template_is_found_from_any_folder(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the stage is the same one wherever it was started from."""
    run, stages = make_run(), []
    for template in ("my chat.jinja", str(tmp_path / "my chat.jinja")):
        monkeypatch.chdir(tmp_path)
        recipe = resolve(load_recipe("tiny", [f"stages.task.data.template={template}"]))
        (run / "recipe.yaml").write_text(dump(recipe))
        monkeypatch.chdir("/")
        _, _, task = commands(script(open_run(run)))
        assert after(task, "--chat-template") == [str(tmp_path / "my chat.jinja")]
        inputs: Any = SimpleNamespace(
            stages={"task": SimpleNamespace(fingerprint="of the data")},
            sets={},
            tokenizer_fingerprint="t",
        )
        stages.append(stage_record(run, recipe, recipe.stages[1], inputs, "parent").identity)
    assert stages[0] == stages[1]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "biases"),
        ({"rank_pattern": {"q_proj": 16}}, "ranks by pattern"),
        ({"alpha_pattern": {"q_proj": 16}}, "alphas by pattern"),
        ({"peft_type": "IA3"}, "IA3 is not LoRA"),
    ],
    ids=str,
)
def test_adapters_that_vllm_refuses_are_reported_and_omitted(
    config: dict, problem: str, make_run: Callable[..., Path], make_adapter: Make
) -> None:
    run = make_run()
    make_adapter(run / "odd", LAYERS, 8, **config)
    (reason,) = refusals(read_adapter(run / "odd"))
    assert problem in reason
    text = script(open_run(run))
    assert f"# odd: {reason}" in text
    assert after(commands(text)[1], "--lora-modules") == [f"domain={run / 'domain' / 'adapter'}"]
    shutil.rmtree(run / "domain" / "adapter")
    text = script(open_run(run))
    assert len(commands(text)) == 2 and "None of them can be served so" in text


def test_an_adapter_without_a_merged_model_points_to_chat(
    make_run: Callable[..., Path], make_adapter: Make
) -> None:
    run = make_run("run", "stages.task.method={kind: bottleneck}", "output.merge=false")
    for name in ("merged", "adapter"):
        shutil.rmtree(run / "task" / name)
    make_adapter(run / "task" / "adapter", LAYERS, 8, peft_type="IA3", base_model_name_or_path="b")
    text = script(open_run(run))
    assert "None of them can be served so: use dtrain chat or dtrain generate." in text
    assert "serve the merged model" not in text


def test_an_adapter_that_was_not_merged_points_to_the_merge(
    make_run: Callable[..., Path], make_adapter: Make
) -> None:
    run = make_run("run", "output.merge=false")
    odd = {"peft_type": "IA3", "base_model_name_or_path": "b"}
    for name in ("domain", "task"):
        shutil.rmtree(run / name / "adapter")
        make_adapter(run / name / "adapter", LAYERS, 8, **odd)
        assert "None of them can be served so: serve the merged model." in script(open_run(run))
    shutil.rmtree(run / "task" / "merged")
    text = script(open_run(run))
    task = text[text.index("# Adapters of one base (task)") :]
    assert (
        f"merge {run / 'domain' / 'merged'} {run / 'task' / 'adapter'} OUT`, and serve OUT" in task
    )
    assert "serve the merged model" not in task


def test_max_lora_rank_covers_every_adapter(tmp_path: Path, make_adapter: Make) -> None:
    assert [max_rank([r]) for r in (1, 2, 8, 9, 65, 300, 512, 513)] == [
        1, 8, 8, 16, 128, 320, 512, None,
    ]  # fmt: skip
    huge = read_adapter(make_adapter(tmp_path / "huge", {Q: (600, 600)}, 513))
    assert refusals(huge) == ["rank 513: the greatest that is served is 512"]
    assert module("a", Path("/x y")) == "a=/x y"


def test_adapter_list_describes_each_adapter(
    make_run: Callable[..., Path], make_adapter: Make
) -> None:
    run = make_run(methods=("qlora", "lora"))
    domain, task = list_adapters(run)
    assert (domain.name, domain.method, domain.origin.kind) == ("domain", "qlora", "cpt")
    assert domain.ranks == [64] and domain.targets == ["down_proj", "q_proj"]
    assert domain.parameters == 64 * (64 + 64 + 64 + 128)
    assert task.base == str(run / "domain" / "merged") and domain.base == "/models/llama"
    head, first, _ = format_table([domain, task]).splitlines()
    assert head.split()[0] == "adapter" and first.endswith("/models/llama (in NF4)")
    assert "20.5k" in first and "down_proj,q_proj" in first
    narrow = format_table([domain, task], 60).splitlines()
    assert narrow[2].strip() == "down_proj, q_proj" and "of /models/llama (in NF4)" in narrow[3]
    assert all(len(line) <= 60 or " " not in line.strip() for line in narrow)
    alone = list_adapters(run / "task" / "adapter")
    assert [a.name for a in alone] == ["task"]
    assert {a.name for a in list_adapters(run / "task")} == {"task"}
    below = [a.name for a in list_adapters(run.parent)]  # runs in any folder, stages in order
    assert below == [f"{run.name}/domain", f"{run.name}/task"]


def test_moved_run_lists_its_current_paths(make_run: Callable[..., Path], tmp_path: Path) -> None:
    moved = make_run().rename(tmp_path / "moved")
    assert list_adapters(moved)[1].base == str(moved / "domain" / "merged")
    assert served_models(str(moved))["task"].adapters[0] == moved / "domain" / "adapter"


def test_adapter_list_shows_base_dependencies(make_run: Callable[..., Path]) -> None:
    models = served_models(str(make_run(methods=("qlora", "lora"))))
    assert list(models) == [BASE_MODEL, "domain", "task"]
    assert models["task"].base == "/models/llama" and models["task"].quantized
    assert len(models["task"].adapters) == 2
    run = make_run("second", methods=("lora", "qlora"))
    over_merged = served_models(str(run))["task"]
    assert over_merged.base == str(run / "domain" / "merged") and over_merged.quantized
    assert over_merged.adapters == (run / "task" / "adapter",)


def test_stage_results_use_the_chat_settings_of_the_recipe(make_run: Callable[..., Path]) -> None:
    run = make_run("run", "stages.task.data.template=instruction")
    (merged,) = served_models(str(run / "task" / "merged")).values()
    assert (merged.template, merged.adapters) == ("instruction", ())
    base, adapter = served_models(str(run / "domain" / "adapter")).values()
    assert base.template == adapter.template == "instruction"
    assert adapter.adapters == (run / "domain" / "adapter",) and adapter.base == base.base


def test_retrained_adapter_has_another_fingerprint(
    make_run: Callable[..., Path], make_adapter: Make, record_stage: Record
) -> None:
    run = make_run()
    make_adapter(run / "both", LAYERS, 76)
    before = {name: choice.fingerprint for name, choice in served_models(str(run)).items()}
    record_stage(run / "task", "trained anew", "id0", "lora")
    (run / "task" / "merged" / "merge.json").write_text('{"result": "another model"}')
    after_it = {name: choice.fingerprint for name, choice in served_models(str(run)).items()}
    assert {name for name in before if before[name] != after_it[name]} == {"task"}
    assert before[BASE_MODEL] == "" and len(before["both"]) == 12
    assert served_models(str(run / "task" / "merged"))[BASE_MODEL].fingerprint == "another mode"


def test_user_errors_are_printed(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    (run / "task" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        list_adapters(run)
    (run / "task" / "adapter" / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="is not the config of an adapter"):
        list_adapters(run)
    with pytest.raises(UserError, match="there is no such folder"):
        list_adapters(tmp_path / "gone")
    with pytest.raises(UserError, match="is not a run folder"):
        open_run(tmp_path)


IMPORTS = """
import sys
from dtrain.cli import main
status = main()
heavy = {"torch", "transformers", "peft", "numpy"} & set(sys.modules)
sys.exit(status or (9 if heavy else 0))
"""


def test_a_login_node_lists_and_prints_without_torch(
    make_run: Callable[..., Path], environment: dict[str, str]
) -> None:
    run = make_run()

    def dtrain(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", IMPORTS, *arguments], env=environment,
                              capture_output=True, text=True, timeout=60)  # fmt: skip

    listed, served = dtrain("adapters", str(run), "--json"), dtrain("serve", str(run))
    assert (listed.returncode, served.returncode) == (0, 0), listed.stderr + served.stderr
    assert [a["trainable_parameters"] for a in json.loads(listed.stdout)] == [20480, 3840]
    assert served.stdout == script(open_run(run))


def test_adapter_stop_string_and_template_are_in_the_command(make_run: Callable[..., Path]) -> None:
    run = make_run("run", "stages.task.data.template=instruction")
    for folder in (run / "task" / "adapter", run / "task" / "merged"):
        (folder / "chat_template.jinja").write_text("a template")
        known = {"eos_token_id": [1, 2], "stop_strings": ["###\nUser:"]}
        (folder / "generation_config.json").write_text(json.dumps(known))
    text = script(open_run(run))
    merged, _, task = commands(text)
    assert after(task, "--chat-template") == [str(run / "task" / "adapter" / "chat_template.jinja")]
    assert after(task, "--generation-config") == [str(run / "task" / "adapter")]
    assert "--chat-template" not in merged and "--generation-config" not in merged
    assert text.count('send {"stop": ["###\\nUser:"]} with each request') == 2
