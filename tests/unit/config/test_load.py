"""Loading a recipe: values, overrides, and messages that report all errors at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.config.load import dump, load_recipe, with_origins
from dtrain.config.methods import TRAITS
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError, UserErrors
from dtrain.recipes import shipped, summary

METHODS = ", ".join(TRAITS)
GOOD = """\
name: small
model:
  base: some/folder
engine: {kind: zero3}
stages:
  - name: domain
    kind: cpt
    method: {kind: lora, r: 8}
    data:
      sources: [{path: a.txt, format: text}]
    train:
      global_batch_size: 4
      learning_rate: 2e-4
      steps: 10
  - name: task
    kind: sft
    method: {kind: qlora}
    data:
      sources: [{path: b.json, format: alpaca}]
    train: {global_batch_size: 4, epochs: 1}
output: {folder: runs/small}
"""


@pytest.fixture
def write(tmp_path: Path):
    def writer(text: str | bytes) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return writer


def faults(address: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(address, overrides)
    return str(caught.value).replace(address, "FILE")


def test_exponent_notation_is_a_number(write) -> None:
    assert load_recipe(write(GOOD)).stages[0].train.learning_rate == 2e-4


def test_integer_is_accepted_for_a_float(write) -> None:
    assert load_recipe(write(GOOD)).stages[1].train.epochs == 1.0


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe == load_recipe(str(shipped()[name]))
    assert summary(shipped()[name]), "the first line of a recipe says what it is for"


def test_dumped_recipe_loads_equal(write) -> None:
    for address in (write(GOOD), *shipped()):
        recipe = load_recipe(address)
        assert load_recipe(write(dump(recipe))) == recipe


@settings(max_examples=25)
@given(
    name=st.text(min_size=1).filter(lambda t: t.isprintable()),
    rate=st.floats(min_value=1e-300, max_value=3e38),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_value_survives_a_dump(tmp_path_factory, name: str, rate: float, seed: int) -> None:
    path = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    path.write_text(GOOD, encoding="utf-8")
    values = load_recipe(str(path)).model_dump()
    values["name"], values["model"]["base"], values["seed"] = name, name, seed
    values["stages"][0]["train"]["learning_rate"] = rate
    recipe = Recipe.model_validate(values)
    path.write_text(dump(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def test_overrides_by_key_number_and_name(write) -> None:
    recipe = load_recipe(
        write(GOOD),
        [
            "engine.kind=ddp",
            "stages.0.train.steps=3",
            "stages.task.train.learning_rate=5e-5",
            "stages.task.method={kind: full}",
            "launch.processes=2",
            "output.folder=/some/where",
        ],
    )
    assert recipe.engine.kind == "ddp"
    assert recipe.stages[0].train.steps == 3
    assert recipe.stages[1].train.learning_rate == 5e-5
    assert recipe.stages[1].method.kind == "full"
    assert recipe.launch.processes == 2
    assert recipe.output.folder == "/some/where"


def test_errors_of_later_checks_get_the_line_of_their_key(write) -> None:
    places = {
        "stages.domain.method.r": "FILE:8: ",
        "stages.task.data: b.json:3": "FILE:18: ",
        "stages.task.method.target_modules": "FILE:17: ",  # a default: of the group around it
        "model.base": "override model.base=gone: ",
        "some/folder": "",
    }
    address = write(GOOD)
    errors = [UserError("is wrong", where=where, fix="change it") for where in places]
    for error in with_origins(errors, address, ["model.base=gone"]):
        where = error.where.replace(address, "FILE")
        assert where in {origin + key for key, origin in places.items()}
        assert (error.message, error.fix) == ("is wrong", "change it")


def test_a_later_override_wins(write) -> None:
    assert load_recipe(write(GOOD), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override seed: is not of the form key=value"),
        ("=3", "override =3: is not of the form key=value"),
        ("stages.domian.train.steps=3", "did you mean domain?"),
        ("stages.7.train.steps=3", "use one of domain, task, 0, 1"),
        ("name.first=x", "name has no keys: it is 'small'"),
        ("stages.0.train.stepz=3", "stages.0.train.stepz: unknown key\n    → did you mean steps?"),
        ("engine={kind: [", "override engine={kind: [:1: is not valid YAML"),
        ("seed=x", "override seed=x: seed must be a whole number, not 'x'"),
    ],
)
def test_invalid_override_is_named(write, override: str, message: str) -> None:
    assert message in faults(write(GOOD), override)


def test_all_errors_are_reported_at_once_with_their_lines(write) -> None:
    bad = GOOD.replace("base:", "bsae:").replace("r: 8", "r: lots").replace("epochs: 1", "epoch: 1")
    text = faults(write(bad), "engine.kind=fsdp", "nonsense")
    assert "FILE:3: model.bsae: unknown key\n    → did you mean base?" in text
    assert "FILE:2: model.base is missing" in text
    assert "FILE:8: stages.0.method.r must be a whole number, not 'lots'" in text
    assert "FILE:20: stages.1.train.epoch: unknown key\n    → did you mean epochs?" in text
    assert "override engine.kind=fsdp: engine.kind must be one of auto, ddp, fsdp2" in text
    assert "override nonsense: is not of the form" in text


def test_clashes_are_reported_together_with_invalid_values(write) -> None:
    bad = GOOD.replace("r: 8", "r: lots").replace("engine: {", "engine: {shard: 2, ")
    text = faults(write(bad))
    assert "stages.0.method.r must be a whole number" in text
    assert "FILE:4: engine.shard and engine.kind: only fsdp2 can use shard groups" in text


def test_omitted_invalid_value_causes_no_further_clash(write) -> None:
    text = faults(write(GOOD.replace("steps: 10", "steps: ten")))
    assert text == "FILE:14: stages.0.train.steps must be a whole number, not 'ten'"


LONG = "n" * 101


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: lora", "kind: lorra", f"stages.0.method.kind must be one of {METHODS}"),
        ("kind: lora, ", "", f"stages.0.method.kind is missing\n    → one of {METHODS}"),
        ("2e-4", '"2e-4"', "must be a number, not '2e-4'\n    → remove the quotes"),
        ("2e-4", ".inf", "learning_rate must be a finite number, not inf"),
        ("2e-4", "-1", "learning_rate must be more than 0, not -1"),
        ("steps: 10", "steps: 1.5", "steps must be a whole number, not 1.5"),
        ("{kind: zero3}", "{shard: 0}", "engine.shard must be one of all, node or at least 1"),
        ("r: 8", "target_modules: [1]", "stages.0.method.target_modules.0 must be a text, not 1"),
        ("[{path: a.txt, format: text}]", "[]", "sources must be a list with at least one entry"),
        ("name: domain", "name: ../x", "stages.0.name must be letters, digits"),
        ("name: domain", f"name: {LONG}", "stages.0.name must be a text of at most 100 characters"),
        *(
            (
                "engine:",
                f"evaluation: {{{key}: {{{LONG}: {{}}}}}}\nengine:",
                f"evaluation.{key}.{LONG} must be a text of at most 100 characters, not 'nnn",
            )
            for key in ("sets", "generation")
        ),
        ("some/folder", "", "model.base must be a text, not empty"),
        ("some/folder", "x\n  trust_remote_code: yes", "must be true or false, not 'yes'"),
        ("{kind: zero3}", "zero3", "engine must be a group of keys, not 'zero3'"),
        ("r: 8", "r:8", "stages.0.method.r:8: unknown key\n    → write `r: 8`, with a space"),
        ("base: some", "base:some", "→ write `base: some/folder`, with a space"),
        ("kind: cpt", "kind:cpt", "with a space after the colon, in line 7"),
        ("name: small", "name:small", "with a space after the colon, also in the line above"),
        ("r: 8}", "r: 8", "look at the brackets and commas from line 8 on"),
        ("  - name: task", " - name: task", "indent entries of one list or group alike"),
        (
            "{path: a.txt, ",
            "{path: a.txt, columns: {content: text}, ",
            "columns.content: unknown name\n    → dtrain's name stands first: {text: content}",
        ),
        (
            "{path: a.txt, ",
            "{path: a.txt, columns: {texts: content}, ",
            "columns.texts: unknown name\n    → did you mean text?",
        ),
    ],
)
def test_messages_name_the_problem(write, old: str, new: str, message: str) -> None:
    text = faults(write(GOOD.replace(old, new, 1)))
    assert message in text
    assert "pydantic" not in text and "literal[" not in text and "Input" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE: is empty"),
        ("# nothing\n", "FILE: is empty"),
        ("- a\n- b\n", "FILE: is not a group of"),
        (
            "name: x\nmodel:\n\tbase: y\n",
            "FILE:3: indented with a tab\n    → YAML allows only spaces",
        ),
        ("name: x\nname: y\n", "FILE:2: name: duplicate key"),
        ("name: x\n---\nname: y\n", "FILE:2: a second document starts here"),
        ("name: 'x\n", "FILE:2: is not valid YAML"),
        ("name: *x\n", "FILE:1: is not valid YAML: found undefined alias"),
        ("name: &x [*x]\n", "name must be a text"),
        ("[" * 5000, "FILE: is nested too deeply"),
        (b"name: caf\xe9\n", "FILE:1: is not UTF-8 text (byte 0xe9)"),
        (b"\x00\x01", "FILE: is not valid YAML"),
    ],
)
def test_files_that_are_not_recipes_are_refused(write, text: str | bytes, message: str) -> None:
    assert message in faults(write(text))


def test_exponential_yaml_aliases_are_refused(write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "too many values" in faults(write("\n".join(lines)))


def test_yaml_tag_executes_no_code(write) -> None:
    marker = Path(write("")).with_name("mark")
    tag = f"name: !!python/object/apply:os.system ['touch {marker}']\n"
    faults(write(tag))
    assert not marker.exists()


def test_missing_recipe_suggests_the_nearest(tmp_path: Path) -> None:
    assert faults("tinny") == "FILE: there is no such recipe\n    → did you mean tiny?"
    assert "is a folder, not a recipe" in faults(str(tmp_path))
    assert "there is no such recipe" in faults(str(tmp_path / "no.yaml"))


def test_problems_survive_pickling(write) -> None:
    with pytest.raises(UserErrors) as caught:
        load_recipe(write(GOOD), ["seed=x", "name=3"])
    kind, arguments = caught.value.__reduce__()
    assert str(kind(*arguments)) == str(caught.value)


def test_a_general_gate_measures_the_shipped_texts(write) -> None:
    gate = "evaluation={gates: {general: {max_increase: 0.1}}}"
    recipe = load_recipe(write(GOOD), [gate])
    assert recipe.evaluation.sets["general"].sources[0].path == "dtrain:general/heldout.jsonl"
    assert load_recipe(write(dump(recipe))) == recipe
    own = "evaluation.sets.general={kind: cpt, sources: [{path: mine.txt, format: text}]}"
    recipe = load_recipe("tiny", ["evaluation.gates={general: {max_increase: 0.1}}", own])
    assert recipe.evaluation.sets["general"].sources[0].path == "mine.txt"
    assert list(recipe.evaluation.sets) == ["domain", "task", "general"]


@pytest.mark.parametrize("name", ["sets", "generation", "gates"])
def test_evaluations_of_a_wrong_type_are_refused_beside_a_general_gate(name: str, write) -> None:
    values = {"gates": "{general: {max_increase: 0.1}}", name: "3"}
    values = ", ".join(f"{key}: {value}" for key, value in values.items())
    with pytest.raises(UserErrors, match=f"evaluation.{name}"):
        load_recipe(write(GOOD), [f"evaluation={{{values}}}"])


def test_an_empty_table_is_not_said_to_be_a_list() -> None:
    with pytest.raises(UserError, match="must be a list or a group of keys with at least one"):
        load_recipe("tiny", ["model.tokens={add: {}}"])
