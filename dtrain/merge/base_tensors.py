"""A base's tensors, and which two of them are one matrix: the embedding and the output head.

The model itself answers that, built on the meta device. A merge that changes the two differently
writes both, and `tie_word_embeddings: false`, so that every loader computes with both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dtrain.config.methods.patterns import match_names
from dtrain.core.errors import UserError
from dtrain.core.files import read_object
from dtrain.core.lazy_import import LazyModule
from dtrain.core.log import warn
from dtrain.core.weight_files import check_complete, warn_incomplete
from dtrain.models.stored_tensors import FLOAT_DTYPES, ModelTensors
from dtrain.planning.architectures import check_not_quantized

# A second to import, and few merges need them.
models: Any = LazyModule("dtrain.models.meta_model")
model_names: Any = LazyModule("dtrain.models.state_dict_names")
conversion: Any = LazyModule("dtrain.models.conversion")
transformers: Any = LazyModule("transformers")
COMPARED_BYTES = 1 << 22
# Those that a merge writes: it computes in float32.
FLOATS = {name: dtype for name, dtype in FLOAT_DTYPES.items() if dtype != torch.float64}


@dataclass(frozen=True)
class TiedPair:
    """The embedding and the output head that are one matrix, by their names in the base's files.

    Attributes:
        missing: the name that has no tensor of its own; None if both are stored.
    """

    embedding: str
    head: str
    missing: str | None

    @property
    def stored(self) -> str:
        """The name that is read from the base; the embedding if both are stored."""
        return self.head if self.missing == self.embedding else self.embedding

    @property
    def names(self) -> tuple[str, str]:
        """Embedding and head."""
        return self.embedding, self.head


class BaseTensors(dict[str, tuple[str, list[int]]]):
    """The dtype and shape of every tensor of a base folder, as the model takes it.

    Attributes:
        files: reads them.
        conversions: of parameters that `stored_name` found in another layout, by name.
        model_error: why the model could not be built that renames parameters; empty if it could,
            or was not needed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.conversions: dict[str, Any] = {}
        self.model_error = ""
        self._moves: dict[Any, Any] = {}
        self.folder, self.files = folder, ModelTensors(folder)
        self |= {name: (tensor.dtype, [*tensor.shape]) for name, tensor in self.files.items()}

    @cached_property
    def tied(self) -> TiedPair | None:
        """The tied pair, if there is one; building the model for this takes a second.

        Raises:
            UserError: the config ties them, but this transformers cannot build the model.
        """
        module_names = _tied_parameters(self._model)
        if module_names is None:
            return None
        embedding, head = (self._file_name(name) for name in module_names)
        if embedding and head:  # transformers does not tie two that differ
            return TiedPair(embedding, head, None) if self._are_equal(embedding, head) else None
        if embedding:
            return TiedPair(embedding, module_names[1], module_names[1])
        return TiedPair(module_names[0], head, module_names[0]) if head else None

    def stored_name(self, name: str) -> str | None:
        """Return a parameter's name in the files: with or without the outermost module, or renamed.

        A parameter that the files have in another layout goes by its own name, with its own shape;
        `conversions` says how the files have it. None if no file has it, if it is an embedding that
        is also the head, or experts of `expert_parts`.
        """
        if name in self.conversions:
            return name
        return self._file_name(name) or self._converted_name(name)

    def _file_name(self, name: str) -> str | None:
        plain = next((n for n in (name, name.partition(".")[2]) if n in self), None)
        if plain and len(self[plain][1]) == 3 and self._is_converted(name):
            return None
        return plain or self._renamed.get(name)

    def _converted_name(self, name: str) -> str | None:
        made = self._matched.converted.get(name) if self._matched else None
        if (
            made is None
            or name in self.expert_parts
            or name in (_tied_parameters(self._model) or ())
        ):
            return None
        dtypes = {self.files[source].dtype for source in made.names}
        if self.why_not_written(name) or len(dtypes) > 1:
            return None
        self[name] = dtypes.pop(), list(made.empty[name].shape)
        self.conversions[name] = made
        return name

    def _is_converted(self, name: str) -> bool:
        """Whether the files have a parameter in another layout, such as with each expert turned."""
        made = self._matched.converted.get(name) if self._matched else None
        return made is not None and (bool(self.why_not_written(name)) or not self._is_equal(made))

    def _is_equal(self, made: Any) -> bool:
        return bool(self.moves(made).is_identity)

    def why_not_written(self, name: str) -> str:
        """Why what trained cannot be written in the layout that the files have; empty if it can."""
        made = self._matched.converted.get(name) if self._matched else None
        try:
            if made:
                self.moves(made)
        except UserError as error:
            return str(error)
        return ""

    def moves(self, made: Any) -> Any:
        """Where a conversion's entries are in the files; layers of one kind are asked once.

        Raises:
            UserError: as `find_moves`.
        """
        shapes = {name: tuple(self.files[name].shape) for name in made.names}
        sizes = [tuple(empty.shape) for empty in made.empty.values()]
        key = id(made.rule), tuple(shapes.values()), tuple(sizes)
        if key not in self._moves:
            self._moves[key] = conversion.find_moves(made, shapes)
        return self._moves[key].renamed(made.entries, shapes)

    @property
    def _renamed(self) -> dict[str, str]:
        """Model's own name → name in the files; empty if the model cannot be built."""
        return self._matched.stored if self._matched else {}

    @cached_property
    def _matched(self) -> Any:
        try:
            model = self._model
        except UserError as error:
            self.model_error = error.message
            return None
        return None if model is None else model_names.match_state_dict(model, self.files)

    @property
    def entries(self) -> dict[str, Any]:
        """Entry of the model → its name in the files, or the conversion that makes it.

        Empty if the model cannot be built.
        """
        return {**self._matched.stored, **self._matched.converted} if self._matched else {}

    @cached_property
    def expert_parts(self) -> dict[str, list[Any]]:
        """Model's own name of a parameter of experts → the tensors that it is stored as."""
        conversions = self._matched.conversions if self._matched else []
        return {k: v for x in conversions for k, v in conversion.expert_parts(x).items()}

    def check_complete(self) -> None:
        """Check that the files have the whole language model that config.json describes.

        Warns if they lack an output head, or if what is outside of it, such as image towers or a
        processor's files, is not whole: training does not load it. Nothing is checked if the
        model cannot be built, or if the config says that it is quantized in another format.

        Raises:
            UserError: they lack a tensor, or have one of another shape. It is a warning if the
                model has code of its own, which may store others than transformers' class.
        """
        raw = read_object(self.folder / "config.json") if self._matched else {}
        if (matched := self._matched) is None or not _is_read(raw):
            return
        entries, output = self._model.state_dict(), self._model.get_output_embeddings()
        modules = self._model.named_modules()
        heads = {f"{n}.{leaf}" for n, m in modules if m is output for leaf in m.state_dict()}
        decoder = {entry for entry in entries if entry.startswith(self._decoder)}
        lost = (heads - decoder).intersection(matched.missing)
        try:
            self._check_fit(matched.among((decoder | heads) - lost))
        except UserError as error:
            if not raw.get("auto_map"):
                raise
            warn(f"{self.folder}: only the model's own code may read it: {error.message}")
            return
        if lost:
            warn(
                f"{self.folder}: has no output head ({', '.join(sorted(lost))}). A model merged "
                "from these files cannot generate text"
            )
        others = matched.among(entries.keys() - decoder - heads)
        warn_incomplete(self.folder, others.missing)
        try:
            self._check_fit(replace(others, missing=[]))
        except UserError as error:
            warn(f"{self.folder}: outside the language model, {error.message}")
        is_multimodal = models.auto_class(self._model.config) is models.AutoModelForMultimodalLM
        if is_multimodal and not any(self.folder.glob("*processor_config.json")):
            warn(
                f"{self.folder}: no processor_config.json or preprocessor_config.json in it, "
                "without which the model reads text alone; download them into it"
            )

    def _check_fit(self, names: Any) -> None:
        """Check that the files have these entries of the model, in its shapes."""
        entries = self._model.state_dict()
        stored = ((x, entries[entry].shape) for entry, x in names.stored.items())
        reshaped = {name for name, shape in stored if self[name][1] != list(shape)}
        check_complete(self.folder, names.missing, (), reshaped)
        conversion.check_conversions(self.folder, names.conversions, self.files)

    @cached_property
    def _decoder(self) -> str:
        """How the names of the model's stack of layers begin; empty if it is the model itself."""
        decoder = self._model.get_decoder()
        return next((f"{n}." for n, m in self._model.named_modules() if n and m is decoder), "")

    def adapted_by(self, config: dict[str, Any]) -> list[str]:
        """The weights of the model that PEFT adapts under a config, as far as it is sure.

        They are parameters named in target_parameters, and linear layers of the language model
        named in target_modules, unless other settings leave some of them out.
        """
        if self._matched is None:
            return []
        names = [name for name, _ in self._model.named_parameters()]
        adapted = match_names(names, config.get("target_parameters") or ())
        modules = config.get("target_modules")
        is_narrowed = config.get("exclude_modules") or config.get("layers_to_transform") is not None
        if isinstance(modules, list) and not is_narrowed:
            layers = [x for x in models.linear_layers(self._model) if x.startswith(self._decoder)]
            adapted += [f"{name}.weight" for name in match_names(layers, modules)]
        return adapted

    def has_transposed_experts(self, parameter: str) -> bool:
        """Whether the model keeps the matrices of a parameter of experts as [in, out]."""
        module = self._model.get_submodule(parameter.rpartition(".")[0])
        return bool(getattr(module, "is_transposed", False))

    def expert_parameters(self, module: str) -> list[str]:
        """Names of the three-dimensional parameters of a module of the model, in its order."""
        model = self._model
        try:
            experts = model.get_submodule(module) if model is not None else None
        except AttributeError:
            return []
        named = experts.named_parameters(recurse=False) if experts is not None else ()
        return [name for name, values in named if values.dim() == 3]

    @cached_property
    def _model(self) -> Any:
        model, self.model_error = _meta_model(self.folder)
        return model

    @cached_property
    def has_transposed_layers(self) -> bool:
        """Whether layers store their matrix as [in, out]; True if the model cannot be built."""
        try:
            model = self._model
        except UserError:
            return True
        return model is None or any(type(m).__name__ == "Conv1D" for m in model.modules())

    def shape_of(self, name: str) -> tuple[str, list[int]]:
        """Return dtype and shape, also for the missing name of a tied pair."""
        is_missing = name not in self and self.tied is not None and name == self.tied.missing
        return self[self.tied.stored if is_missing and self.tied else name]

    def tied_pair_among(self, names: set[str]) -> TiedPair | None:
        """Return the tied pair if one of these names belongs to it.

        Only names outside the numbered layers can, so few models are built for this.
        """
        if not any(is_outside_layers(name) and self._is_matrix(name) for name in names):
            return None
        return self.tied if self.tied and not names.isdisjoint(self.tied.names) else None

    def _is_matrix(self, name: str) -> bool:
        return name not in self or len(self[name][1]) == 2

    def _are_equal(self, first: str, second: str) -> bool:
        a, b = self.files[first], self.files[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        pairs = zip(a.raw(COMPARED_BYTES), b.raw(COMPARED_BYTES), strict=True)
        return all(x == y for x, y in pairs)


def is_outside_layers(name: str) -> bool:
    """Return whether a tensor is in none of the numbered layers, as embedding and head are."""
    return not any(segment.isdigit() for segment in name.split("."))


def _is_read(config: dict[str, Any]) -> bool:
    """Whether a config describes plain weights, or a format of codes that is read."""
    try:
        check_not_quantized(config, "")
    except UserError:
        return False
    return True


def untied_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json for the model with a separate output head.

    Raises:
        UserError: the architecture ties the two regardless of its config.
    """
    config = read_object(folder / "config.json")
    for group in (config, *(v for v in config.values() if isinstance(v, dict))):
        if group is config or "tie_word_embeddings" in group or group is config.get("text_config"):
            group["tie_word_embeddings"] = False
    with TemporaryDirectory() as probe:
        (Path(probe) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if _tied_parameters(_meta_model(Path(probe))[0]) is not None:
            raise UserError(
                f"embedding and output head of a {config.get('model_type')} cannot be untied, but "
                "the adapter changes them differently",
                where=str(folder),
                fix="train with `ensure_weight_tying: true`, or serve base and adapter unmerged",
            )
    return config


def _tied_parameters(model: Any) -> tuple[str, str] | None:
    """Return the model's own names of the embedding and the head that are one parameter.

    Args:
        model: from `_meta_model`.
    """
    output = model.get_output_embeddings() if model is not None else None
    if model is None or output is None:
        return None
    weight = model.get_input_embeddings().weight
    if output.weight is not weight:
        return None
    head = next(name for name, module in model.named_modules() if module is output)
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    embedding = next((name for name in names if name != f"{head}.weight"), None)
    return (embedding, f"{head}.weight") if embedding else None


def _meta_model(folder: Path) -> tuple[Any, str]:
    """Return the model without storage, or None and why, if it cannot be built.

    Raises:
        UserError: it cannot be built, and its config ties embedding and output head.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return models.build_meta_model(config), ""
    except Exception as error:  # custom code, an unknown architecture or setting
        raw = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
        reason = error.message if isinstance(error, UserError) else models.first_line(error)
        if not raw.get("tie_word_embeddings"):
            return None, reason
        raise UserError(
            f"embedding and output head are tied, but which tensors they are is unknown: {reason}",
            where=str(folder / "config.json"),
            fix="untie the base first, or leave embedding and head out of the adapter",
        ) from error
