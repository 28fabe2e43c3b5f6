"""A finished model or adapter for other people: its files, checked, and the upload to the hub."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from dtrain.config.schema import Stage
from dtrain.core.addresses import without_folders
from dtrain.core.errors import UserError, first_line
from dtrain.core.files import json_text, read_json, read_sealed, read_text
from dtrain.core.folder_kind import FolderKind, folder_kind
from dtrain.core.hashes import file_hash
from dtrain.core.stage_dir import ADAPTER, ADAPTER_CONFIG, MERGE_MANIFEST, StageDir
from dtrain.models.peft_format import (
    CHAT_TEMPLATE,
    COMBINED,
    GENERATION,
    NEW_TOKENIZER_FILES,
    WEIGHTS,
    adapter_base,
    read_adapter_config,
)
from dtrain.serving.card_usage import PLACEHOLDER
from dtrain.serving.model_card import README, adapter_card, merged_card
from dtrain.serving.run_models import ServedRun, open_run

ADAPTER_FILES = (WEIGHTS, ADAPTER_CONFIG, CHAT_TEMPLATE, GENERATION, COMBINED, *NEW_TOKENIZER_FILES)
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Result:
    """A finished model or adapter.

    Attributes:
        card: the text of its model card; empty if it has none.
    """

    folder: Path
    is_adapter: bool
    card: str


def find_result(address: Path, stage: str | None = None, *, adapter: bool = False) -> Result:
    """The result at an address: of a run, the last stage's model, or what is asked for.

    Raises:
        UserError: there is none, it is not complete, or an adapter's file is not what was written.
    """
    kind = folder_kind(address)
    if kind is FolderKind.RUN:
        return _of_run(open_run(address), stage, adapter)
    if kind not in (FolderKind.MODEL, FolderKind.ADAPTER):
        fix = "give a run folder, or the folder of a model or an adapter"
        raise UserError("is no run, model or adapter", where=str(address), fix=fix)
    if stage is not None or adapter:
        raise UserError("--stage and --adapter choose a part of a run", where=str(address))
    return Result(address, kind is FolderKind.ADAPTER, _card(address))


def _of_run(run: ServedRun, name: str | None, adapter: bool) -> Result:
    names = [stage.name for stage in run.recipe.stages]
    if name is not None and name not in names:
        fix = f"one of {', '.join(names)}"
        raise UserError(f"the run has no stage {name!r}", where=str(run.folder), fix=fix)
    stage = run.recipe.stages[-1 if name is None else names.index(name)]
    record = StageDir(run.folder / stage.name)
    content = read_sealed(record.record) if record.record.is_file() else {}
    if not content.get("complete"):
        message = f"stage {stage.name} is not complete"
        fix = "run the recipe to its end, or choose another --stage"
        raise UserError(message, where=str(record.path), fix=fix)
    if adapter:
        return _adapter_of(run, stage, content.get("files") or {})
    if not run.has_merged(stage):
        fix = "--adapter takes its adapter; `dtrain merge` makes a model of it"
        raise UserError(f"stage {stage.name} has no merged model", where=str(record.path), fix=fix)
    merged = record.merged
    return Result(merged, False, _card(merged) or merged_card(run, stage, merged))


def _adapter_of(run: ServedRun, stage: Stage, hashes: dict[str, str]) -> Result:
    folder = run.adapter(stage)
    if not (folder / ADAPTER_CONFIG).is_file():
        message = f"stage {stage.name} has no adapter"
        raise UserError(message, where=str(folder.parent), fix="leave --adapter out")
    for name, digest in hashes.items():
        path = folder.parent / name
        if name.startswith(f"{ADAPTER}/") and not (path.is_file() and file_hash(path) == digest):
            fix = "run the recipe again: it is rebuilt from the last checkpoint"
            raise UserError("is missing, or not what was written", where=str(path), fix=fix)
    return Result(folder, True, _card(folder) or adapter_card(run, stage))


def _card(folder: Path) -> str:
    return read_text(folder / README) if (folder / README).is_file() else ""


def uploads(result: Result, repo: str) -> dict[str, Path | bytes]:
    """What is uploaded, by name: files, or the content of those that name folders of this machine.

    Raises:
        UserError: the model has no record of its files, so nobody knows whether it is complete.
    """
    if result.is_adapter:
        names = [name for name in ADAPTER_FILES if (result.folder / name).is_file()]
    else:
        manifest = result.folder / MERGE_MANIFEST
        if not manifest.is_file():
            what = f"no {MERGE_MANIFEST}: dtrain did not write it"
            raise UserError(what, where=str(result.folder), fix="upload it with `hf upload`")
        # A record from elsewhere must not make this machine send other files.
        names = [name for name in read_json(manifest)["files"] if Path(name).name == name]
        names.append(MERGE_MANIFEST)
    files: dict[str, Path | bytes] = {name: result.folder / name for name in sorted(names)}
    for name in (ADAPTER_CONFIG, MERGE_MANIFEST, COMBINED):
        if name in files:
            files[name] = _public_record(result.folder / name)
    if result.card:
        files[README] = result.card.replace(PLACEHOLDER, repo).encode()
    return files


def _public_record(path: Path) -> bytes:
    """A JSON file of a result, without the folders of this machine."""
    content = without_folders(read_json(path))
    if path.name == ADAPTER_CONFIG and is_local_base(path.parent):
        content["base_model_name_or_path"] = None
    return json_text(content).encode()


def is_local_base(adapter: Path) -> bool:
    """Whether an adapter names its base by a path, which other machines do not have."""
    named = read_adapter_config(adapter).get("base_model_name_or_path") or ""
    return str(named).startswith((".", "/", "~")) or Path(adapter_base(adapter) or "-").is_dir()


def check_repo(repo: str) -> None:
    """Check the name of a repository.

    Raises:
        UserError: it is not OWNER/NAME.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(first_line(error), where=repo, fix="OWNER/NAME") from error
    if repo.count("/") != 1:
        raise UserError("names no owner", where=repo, fix=f"OWNER/{repo}: your name on the hub")


def check_token() -> None:
    """Check that there is a token for the hub; it is read from the environment or hf's login.

    Raises:
        UserError: there is none.
    """
    if get_token() is None:
        raise UserError("there is no token for the hub", where="HF_TOKEN", fix=LOGIN)


def push(files: dict[str, Path | bytes], repo: str, *, private: bool) -> str:
    """Upload files to a repository of the hub, which is created if it does not exist.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub cannot be reached or refuses, or a repository that must be private is
            public.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            fix = "make it private on the hub, or choose another name"
            raise UserError("exists already, and is public", where=repo, fix=fix)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repo, operations, commit_message="Upload from dtrain")
    except UserError:
        raise
    except HfHubHTTPError as error:
        raise _refusal(error, repo) from error
    except Exception as error:  # the hub's client raises those of its HTTP library
        reason = f"{type(error).__name__}: {first_line(error)}"
        message = f"the upload to {api.endpoint} failed: {reason}"
        fix = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, then run the same command again"
        raise UserError(message, where=repo, fix=fix) from error
    return str(commit.commit_url)


def _refusal(error: HfHubHTTPError, repo: str) -> UserError:
    status = error.response.status_code
    if status == 401:
        return UserError("the hub does not accept the token", where="HF_TOKEN", fix=LOGIN)
    if status == 403:
        fix = "use a token with write access to it"
        return UserError("the token may not write there", where=repo, fix=fix)
    return UserError(f"the hub refuses: {first_line(error)}", where=repo)


def total_bytes(contents: Iterable[Path | bytes]) -> int:
    """The size of files and contents."""
    return sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in contents)
