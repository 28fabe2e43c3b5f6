"""Links that somebody planted: nothing is written through them, and nothing behind them removed."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import dtrain
from dtrain.augmentation.request_pool import Journal
from dtrain.core.errors import UserError
from dtrain.core.files import atomic_folder, remove_entry
from dtrain.core.locks import FolderLock, ShardLocks
from dtrain.core.ownership import Untrusted, make_private_folder, open_in_place
from dtrain.core.run_dir import IN_PLACE, RunDir
from dtrain.distributed.hang_watchdog import HangWatchdog
from dtrain.merge.resumable_dir import ResumableDir, making_folder
from dtrain.monitoring.starts import record_start
from dtrain.pipeline.stage_record import StageRecord
from dtrain.serving.generate import Answers

CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
# Opens a file for writing under a name that another user could know (mode x never opens one).
WRITERS = re.compile(
    r"""\bopen\([^()]*,\s*"[rwa]b?\+?b?"|\.touch\(|\.write_(text|bytes)\(|\bos\.open\(|copyfile\("""
)
READS = re.compile(
    r"""\bopen\([^()]*,\s*"r[bt]?"|\bopen\(handle\b"""
    r"""|\bos\.open\(\w+, os\.O_RDONLY( \| os\.O_(DIRECTORY|CLOEXEC))*\)"""
)
ALLOWED = {
    "api.py": "a temporary folder",
    "checkpoints/shard_file.py": "O_EXCL",
    "core/files.py": "random names",
    "core/output.py": "/dev/null",
    "core/ownership.py": "open_in_place itself",
    "distributed/hang_watchdog.py": "a folder that was checked",
    "distributed/rendezvous.py": "torchrun's temporary folder",
    "distributed/tensor_utils.py": "/proc",
    "engines/shared_gather.py": "a file in memory",
    "launching/node_probe.py": "a folder with a random name",
    "merge/base_tensors.py": "a temporary folder",
    "merge/combine_adapters.py": "a folder with a random name",
    "merge/merge.py": "a folder that ResumableDir has checked",
    "methods/added.py": "a folder with a random name",
    "models/added_tokens.py": "a folder with a random name",
    "models/vocabulary.py": "a folder with a random name",
    "pipeline/extract.py": "a folder with a random name",
    "samples/general.py": "the cache",
    "samples/python_docs.py": "the cache",
    "samples/smollm2.py": "the cache",
    "serving/generator.py": "a temporary folder",
    "supervisor.py": "the run folder, which was checked",
}


def test_every_writer_uses_open_in_place() -> None:
    root = Path(dtrain.__file__).parent
    found = {}
    for path in root.rglob("*.py"):
        for line in path.read_text().split("\n"):
            code = READS.sub("", line.partition("#")[0])
            if WRITERS.search(code) and "open_in_place(" not in line:
                found.setdefault(str(path.relative_to(root)), line.strip())
    assert {name: line for name, line in found.items() if name not in ALLOWED} == {}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A file that nobody wants to lose, in a folder of its own."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis").write_text("years")
    return folder


def plant(kind: str, target: Path, at: Path) -> None:
    """A link at a path."""
    at.parent.mkdir(parents=True, exist_ok=True)
    (os.symlink if kind == "symlink" else os.link)(target, at)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "dangling", "pipe", "stranger"])
def test_only_a_file_of_this_user_is_opened(tmp_path: Path, home: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to(home / "new")
    elif kind == "stranger":
        if os.getuid() != 0:
            pytest.skip("needs root")
        path.write_text("x")
        os.chown(path, 65534, 65534)
    else:
        plant(kind, home / "thesis", path)
    with pytest.raises(Untrusted):
        open_in_place(path, CREATE)
    assert (home / "thesis").read_text() == "years" and len(list(home.iterdir())) == 1


def open_journal(folder: Path) -> None:
    Journal(folder / "journal", {"row": int})


def open_answers(folder: Path) -> None:
    Answers.open(folder / "journal", folder / "prompts", "x")


def start_run(folder: Path) -> None:
    RunDir(folder).lock()


def begin_start(folder: Path) -> None:
    record_start(RunDir(folder), nodes=1, ranks=1, device="cpu")


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
@pytest.mark.parametrize(
    ("name", "opened"),
    [
        (".lock", lambda folder: FolderLock(folder).acquire()),
        (".claims", lambda folder: ShardLocks(folder / ".claims")),
        (".lock", start_run),
        ("starts.jsonl", begin_start),
        ("journal", open_journal),
        ("journal", open_answers),
    ],
)
def test_planted_file_is_refused(
    tmp_path: Path, home: Path, name: str, opened: Callable[[Path], object], kind: str
) -> None:
    plant(kind, home / "thesis", tmp_path / "run" / name)
    with pytest.raises(UserError, match="is a link"):
        opened(tmp_path / "run")
    assert (home / "thesis").read_text() == "years"


@pytest.mark.parametrize("name", [*IN_PLACE, "slurm/job.log"])
def test_run_folder_with_planted_links_is_refused(tmp_path: Path, home: Path, name: str) -> None:
    plant("symlink", home, tmp_path / "run" / name)
    with pytest.raises(Untrusted, match="is a link"):
        RunDir(tmp_path / "run").lock()


@pytest.mark.parametrize("name", ["", "checkpoints", "adapter", "merged"])
def test_a_stage_is_not_trained_through_a_link(tmp_path: Path, home: Path, name: str) -> None:
    plant("symlink", home, tmp_path / "run" / "task" / name)
    with pytest.raises(Untrusted, match="is a link"):
        StageRecord(tmp_path / "run" / "task", {}).begin(set())
    assert len(list(home.iterdir())) == 1


def test_heartbeats_are_not_written_through_a_link(tmp_path: Path, home: Path) -> None:
    plant("symlink", home, tmp_path / ".watch")
    with pytest.raises(Untrusted):
        HangWatchdog(tmp_path / ".watch", 0, 1, report=print).start()
    assert len(list(home.iterdir())) == 1


def test_merge_through_a_planted_folder_deletes_nothing(tmp_path: Path, home: Path) -> None:
    """Packed by a stranger and unpacked by this user, with the right plan."""
    out, plan = tmp_path / "out", {"base": "a"}
    ResumableDir(out, plan).close()
    folder = making_folder(out)
    (folder / "model").rmdir()
    plant("symlink", home, folder / "model")
    work = ResumableDir(out, plan)
    (work.target / "weights").write_text("new")
    work.publish(["weights"])
    work.close()
    assert (home / "thesis").read_text() == "years" and len(list(home.iterdir())) == 1
    assert (out / "weights").read_text() == "new" and not out.is_symlink()


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_merge_does_not_write_through_planted_files(tmp_path: Path, home: Path, kind: str) -> None:
    out, plan = tmp_path / "out", {"base": "a"}
    ResumableDir(out, plan).close()
    plant(kind, home / "thesis", making_folder(out) / "model/config.json")
    work = ResumableDir(out, plan)
    (work.target / "config.json").write_text("{}")
    work.close()
    assert (home / "thesis").read_text() == "years"


def test_folder_that_another_user_prepared_is_refused(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root")
    folder = making_folder(tmp_path / "out")
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    with pytest.raises(Untrusted, match="belongs to user 65534"):
        ResumableDir(tmp_path / "out", {})
    with pytest.raises(Untrusted, match="belongs to user 65534"):
        make_private_folder(folder)
    os.chown(folder, 0, 0)
    tmp_path.chmod(0o777)  # and no sticky bit: the folder could be replaced in the meantime
    with pytest.raises(Untrusted, match="anyone may replace"):
        ResumableDir(tmp_path / "out", {})


def test_folder_of_pickles_is_closed_to_others(tmp_path: Path) -> None:
    folder = make_private_folder(tmp_path / "a/b")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert make_private_folder(folder).stat().st_mode & 0o777 == 0o700


def test_removing_a_link_leaves_what_it_leads_to(tmp_path: Path, home: Path) -> None:
    plant("symlink", home, tmp_path / ".merged.abcdefgh")
    remove_entry(tmp_path / ".merged.abcdefgh")
    remove_entry(home)
    assert not home.exists() and not (tmp_path / ".merged.abcdefgh").is_symlink()


@pytest.mark.parametrize(
    ("parent", "folder", "file"), [(0o755, 0o750, 0o640), (0o705, 0o700, 0o600)]
)
def test_results_are_the_groups_to_read_where_their_parent_is(
    tmp_path: Path, parent: int, folder: int, file: int
) -> None:
    """Under umask 000 all of this was writable for everyone."""
    tmp_path.chmod(parent)
    before = os.umask(0)
    try:
        with atomic_folder(tmp_path / "made") as made:
            (made / "inner").mkdir()
            (made / "inner" / "weights").write_text("")
        making = ResumableDir(tmp_path / "merged", {})
        (making.target / "weights").write_text("")
        making.publish(["weights"])
        making.close()
    finally:
        os.umask(before)
    for name in ("made", "made/inner", "merged"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == folder
    for name in ("made/inner/weights", "merged/weights"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == file


def test_lock_and_run_folders_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        RunDir(tmp_path / "run").lock().release()
        ShardLocks(tmp_path / "shards" / "locks").close()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in tmp_path.rglob("*")} == {0}
