"""The cache of this user: shared folders, read-only ones, and none at all."""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.core import cache_paths, hash_cache
from dtrain.core.cache_paths import cache_folder, compile_folder, computed_folder
from dtrain.core.errors import UserError
from dtrain.core.hash_cache import cached_hash
from dtrain.core.hashes import file_hash
from dtrain.core.os_errors import explain, explained_os_errors

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


def as_user(user: int, work: Callable[[], None]) -> bool:
    """Whether `work` succeeds in a process of another user."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that every user can write to, in folders that all can open."""
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent.stat().st_uid == os.geteuid():
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    monkeypatch.setenv("DTRAIN_CACHE", str(folder))
    monkeypatch.setattr(hash_cache, "_folder", lambda: cache_folder() / "hashes")
    monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", 0)
    return folder


@as_root
def test_two_users_in_one_folder_have_a_cache_each(shared: Path) -> None:
    model = shared.parent / "model"
    model.write_text("weights")
    model.chmod(0o644)
    cached_hash(model)

    def second() -> None:
        assert cached_hash(model) == file_hash(model)
        assert hash_cache.lookup_hash(model)

    assert as_user(NOBODY, second) and as_user(NOBODY, second)
    own = shared / f"user-{NOBODY}"
    assert own.stat().st_uid == NOBODY and list(own.glob("hashes/*.json"))
    assert (shared / "hashes").stat().st_uid == 0


@as_root
def test_folder_that_this_user_cannot_write_to_is_read(shared: Path) -> None:
    model, other = shared.parent / "model", shared.parent / "other"
    stage = shared.parent / "run" / "task"
    model.write_text("weights")
    other.write_text("of another model")
    other.chmod(0o644)
    cached_hash(model)
    assert computed_folder("methods", stage) == shared / "methods"
    for path in (shared, *shared.rglob("*")):
        path.chmod(0o755)

    def reader() -> None:
        assert cache_folder() == shared
        assert hash_cache.lookup_hash(model) == cached_hash(model)
        assert cached_hash(other) == file_hash(other)  # neither locked nor kept
        assert compile_folder() != shared
        assert computed_folder("methods", stage) == stage / ".cache" / "methods"

    assert as_user(NOBODY, reader)


def test_user_without_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "DTRAIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_entry(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    with pytest.raises(UserError, match=r"no home folder.*\n.*set DTRAIN_CACHE"):
        cache_folder()
    assert not cache_paths.is_in_cache("/anywhere")


@pytest.mark.parametrize(
    ("number", "where", "expected"),
    [
        (errno.EROFS, "cache/stores/x", "set DTRAIN_CACHE"),
        (errno.EACCES, "cache/samples", "set DTRAIN_CACHE"),
        (errno.EACCES, "run/recipe.yaml", "choose another folder"),
        (errno.ENOSPC, "run/x", "free some space"),
        (errno.EDQUOT, None, "free some space"),
        (errno.EFBIG, "run/x", "ulimit -f"),
        (errno.ENOLCK, "cache/.lock", "DTRAIN_CACHE"),
        (errno.ENOSYS, "run/.locks", "output.folder"),
    ],
)
def test_what_the_system_refuses_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str | None, expected: str
) -> None:
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    path = where and str(tmp_path / where)
    with pytest.raises(UserError, match=expected) as error, explained_os_errors():
        raise OSError(number, os.strerror(number), path)
    assert error.value.where.startswith(path or "")


def test_other_errors_stay_as_they_are() -> None:
    for error in (OSError(errno.EIO, "I/O error"), ValueError("code: 28"), OSError("plain")):
        assert explain(error) is None
