"""Locks: exclusive, released by death, kept across exec, and never written through a link."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dtrain.core.errors import UserError
from dtrain.core.hash_cache import cached_hash
from dtrain.core.hashes import file_hash
from dtrain.core.locks import FolderLock, ShardLocks
from dtrain.core.run_dir import RunDir

HOLD = """
import sys
from pathlib import Path
from dtrain.core.hash_cache import cached_hash
from dtrain.core.hashes import file_hash
from dtrain.core.locks import FolderLock, ShardLocks
from dtrain.core.run_dir import RunDir
path = Path(sys.argv[1])
if path.is_dir():
    lock = FolderLock(path)
    assert lock.acquire()
else:
    locks = ShardLocks(path)
    assert locks.acquire(3) and locks.acquire(4, shared=True)
print("locked", flush=True)
sys.stdin.read()
"""
EXEC = """
import os, sys
from pathlib import Path
from dtrain.core.locks import FolderLock
lock = FolderLock(Path(sys.argv[1]))
assert lock.acquire()
if sys.argv[2] == "keep":
    lock.keep_after_exec()
os.execv(sys.executable, [sys.executable, "-c", "print('locked', flush=True); input()"])
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `code` until it is killed, once it has said that it holds its lock."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_killed_process_releases_its_folder_lock(tmp_path: Path) -> None:
    process, lock = start(HOLD, tmp_path), FolderLock(tmp_path)
    assert not lock.acquire()
    assert lock.holder() == f"process {process.pid} on {os.uname().nodename}"
    process.kill()
    process.wait()
    assert lock.acquire()
    lock.release()
    lock.release()


@pytest.mark.parametrize(("mode", "is_free"), [("keep", False), ("drop", True)])
def test_lock_survives_exec_only_if_asked(tmp_path: Path, mode: str, is_free: bool) -> None:
    process = start(EXEC, tmp_path, mode)
    assert FolderLock(tmp_path).acquire() == is_free
    process.kill()
    process.wait()


def test_killed_process_releases_its_shards(tmp_path: Path) -> None:
    path = tmp_path / "locks"
    path.touch()
    process, locks = start(HOLD, path), ShardLocks(path)
    assert not locks.acquire(3) and not locks.acquire(4)
    assert locks.acquire(4, shared=True) and locks.acquire(5)
    process.kill()
    process.wait()
    assert locks.acquire(3, wait=True)
    assert locks.is_current()
    path.unlink()
    assert not locks.is_current()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_symlink_at_the_lock_path_is_refused_and_its_target_is_untouched(
    tmp_path: Path, link
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "run").mkdir()
    link(precious, tmp_path / "run/.lock")
    with pytest.raises(UserError, match="is a link"):
        FolderLock(tmp_path / "run").acquire()
    with pytest.raises(UserError, match="is a link"):
        ShardLocks(tmp_path / "run/.lock")
    assert precious.read_text() == "mine"


def test_pipe_at_the_lock_path_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match="not a regular file"):
        FolderLock(tmp_path).acquire()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_lock_file_of_another_user_can_be_locked() -> None:
    """A cache that two users share: the second one cannot write to the first one's file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / ".lock").write_text("process 1 on elsewhere\n")
        (folder / ".lock").chmod(0o644)
        become_nobody = "import os\nos.setuid(65534)\npath = Path"
        process = start(HOLD.replace("path = Path", become_nobody), folder)
        lock = FolderLock(folder)
        assert not lock.acquire()
        assert lock.holder() == "process 1 on elsewhere"
        process.kill()
        process.wait()
        assert lock.acquire()


def test_holder_is_found_while_it_closes_other_files(tmp_path: Path, monkeypatch) -> None:
    """A file that is closed between the listing and the look at it has no path any more."""
    samefile, calls = Path.samefile, []

    def fail_once(path: Path, other: Path) -> bool:
        calls.append(path)
        if len(calls) == 1:
            raise FileNotFoundError(path)
        return samefile(path, other)

    monkeypatch.setattr(Path, "samefile", fail_once)
    with FolderLock(tmp_path) as lock:
        assert lock.holder_here() == os.getpid()


def test_holder_with_control_characters_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("\x1b]0;title\x07")
    assert FolderLock(tmp_path).holder() == "another process"


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_file_system_without_locks_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A merge after hours of training would be the first to lock in the other way."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(f"fcntl.{call}", fail)
    with pytest.raises(UserError, match=r"no file locks\n.*output\.folder"):
        RunDir(tmp_path / "run").lock()
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"no file locks\n.*DTRAIN_CACHE"):
        FolderLock(tmp_path).acquire() if call == "flock" else ShardLocks(tmp_path / "x").acquire(0)
    file = tmp_path / "model"
    file.write_text("weights")
    assert cached_hash(file) == file_hash(file)


def test_start_leaves_no_other_file_than_the_lock(tmp_path: Path) -> None:
    RunDir(tmp_path).lock().release()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
