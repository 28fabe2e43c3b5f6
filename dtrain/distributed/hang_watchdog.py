"""Find a rank that failed or hangs, name it, and end the run so that a restart can follow.

Each rank's watching thread writes a small heartbeat file a second: how many marks its main thread
has passed, where it is and its stack. A rank whose own marks stand still for too long looks at
all heartbeats: a file that no longer changes belongs to a stopped process (SIGSTOP, a dead node);
if all of them beat, the rank with the fewest marks is the one that the others wait for. The files
lie in the run folder, so a rank needs no collective, which is what hangs, to look.

A rank always looks at its neighbour too, and at nothing but whether that is stopped or dead: no
limit holds in a start, an evaluation, a save, or while a rank compiles.

A rank that fails leaves its status in the run folder. The others may be in a collective that
will never return (NCCL has no closed connection to notice), so their watching threads end them.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dtrain.core.errors import Exit
from dtrain.core.log import say
from dtrain.core.processes import exit_at_once

BEAT_SECONDS = 1.0
LEAST_LIMIT_SECONDS = 10.0
# On a GPU a step that allocates, connects or loads a new kernel takes seconds. Ranks on other
# nodes are seen late: a network file system may show a file as it was up to 60 seconds ago.
LEAST_LIMIT_SECONDS_GPU_OR_NODES = 60.0
NEIGHBOUR_EVERY_SECONDS = 5.0
SILENT_SECONDS = 90.0  # without a heartbeat, of a process that may be alive: 60 and a long call
STALL_SECONDS = 3.0  # for a heartbeat: the file system stands still, and with it the others'
DEAD_OR_STOPPED = ("", "T", "t")
BORN = 19  # place in /proc/PID/stat after the name: starttime
STEPS_TO_KNOW = 3  # the first steps compile, allocate and connect
MEDIAN_OVER_STEPS = 50


def _host() -> str:
    with suppress(OSError):  # two containers may bear one name, and number their processes apart
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {os.getpid()}"  # without /proc every process is far away


HOST = _host()


class Watch:
    """One rank's heartbeat, and its eye on the others.

    Args:
        folder: of the heartbeats, which all ranks see.
        rank: of this process.
        ranks: of the run.
        report: records that this run hangs, and why.
        failure: rank and exit status of the first rank that failed; None while none has.
        least_limit_seconds: a step is never called hanging before twice this time.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        report: Callable[[str], object],
        failure: Callable[[], tuple[int, int] | None] = lambda: None,
        least_limit_seconds: float | None = None,
    ) -> None:
        self.folder, self.rank, self.ranks, self.report = folder, rank, ranks, report
        self._failure = failure
        self._least_limit = least_limit_seconds or LEAST_LIMIT_SECONDS
        self._marks, self._position, self._patient = 0, "start", True
        self._compiling = self._finished = False
        self._known: dict[int, dict[str, Any]] = {}  # the last heartbeat seen of each rank
        self._marked = self._stepped = time.monotonic()
        self._step_seconds: deque[float] = deque(maxlen=MEDIAN_OVER_STEPS)
        self._seen: dict[int, tuple[str, float]] = {}
        self._looked = 0.0
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to beat and to watch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(self.rank).unlink(missing_ok=True)  # of an earlier process
        with suppress(OSError):
            self._beat()
        self._thread.start()

    def stop(self, *, all_is_well: bool = True) -> None:
        """End the thread, and say how to the others.

        Args:
            all_is_well: the run is over for this rank, and the others shall not miss it. If not,
                the heartbeat goes, which also makes room on a full disk for the reason.
        """
        self._ended.set()
        self._thread.join(STALL_SECONDS)
        with suppress(OSError):
            if all_is_well:
                self._finished = True
                self._beat()
            else:
                self._path(self.rank).unlink(missing_ok=True)

    def mark(self, position: str) -> None:
        """The main thread has come to `position`."""
        self._position, self._marked = position, time.monotonic()
        self._marks += 1

    def step(self) -> None:
        """The main thread has finished a step; the median of these sets the limit."""
        now = time.monotonic()
        if not self._patient:
            self._step_seconds.append(now - self._stepped)
        self._stepped, self._patient = now, False

    def rest(self) -> None:
        """Steps are over for now: what follows may take any time."""
        self._patient = True
        self._step_seconds.clear()

    @contextmanager
    def patience(self, position: str) -> Iterator[None]:
        """Something that may take any time while this process lives (a save, a merge)."""
        self.mark(position)
        before, self._patient = self._patient, True
        try:
            yield
        finally:
            self.mark(f"after {position}")
            self._patient, self._stepped = before, self._marked

    def compiling(self, now: bool) -> None:
        """The main thread begins or ends a compilation, which other ranks may not have to do."""
        self._compiling = now
        if not now:
            self.mark(self._position)

    def limit_seconds(self) -> float | None:
        """How long marks may stand still; None while that is not known."""
        if len(self._step_seconds) < STEPS_TO_KNOW:
            return None
        return max(self._least_limit, 5 * statistics.median(self._step_seconds))

    def _run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            began = time.monotonic()
            if (failed := self._failure()) is not None:
                self._end_with(*failed)
            with suppress(OSError):  # a full disk must not look like a hang
                self._beat()
            if time.monotonic() - began > STALL_SECONDS:
                self._seen.clear()
            elif culprits := self._culprits():
                self._end(culprits)

    def _culprits(self) -> list[dict[str, Any]]:
        """Ranks because of which this one does not move on; none while it does."""
        stood, limit = time.monotonic() - self._marked, self.limit_seconds()
        if stood < LEAST_LIMIT_SECONDS / 2:
            self._seen.clear()
            return []
        if culprits := self._look_at_neighbour():
            return culprits
        if limit is None or stood < limit or self._patient or self._compiling:
            return []
        return self._look(limit)

    def _look_at_neighbour(self) -> list[dict[str, Any]]:
        """The next rank, if it is stopped or dead."""
        now = time.monotonic()
        if self.ranks == 1 or now - self._looked < NEIGHBOUR_EVERY_SECONDS:
            return []
        self._looked = now
        beat = self._read((self.rank + 1) % self.ranks)
        return [beat] if self._is_lost(beat) else []

    def _is_lost(self, beat: dict[str, Any]) -> bool:
        """Whether a rank has ended without a word, or is stopped."""
        if beat["finished"] or not beat["beat"]:  # the second has not begun to beat
            return False
        silent = self._silent_seconds(beat)
        if beat["gone"]:  # it failed, and may be about to leave its status
            return silent > 2 * LEAST_LIMIT_SECONDS
        if is_here(beat) and state_of(beat) in DEAD_OR_STOPPED:
            return silent > LEAST_LIMIT_SECONDS / 4  # a debugger may have stopped it for a moment
        return silent > SILENT_SECONDS

    def _silent_seconds(self, beat: dict[str, Any]) -> float:
        """How long this heartbeat was seen unchanged."""
        now, seen = time.monotonic(), self._seen.get(beat["rank"])
        mark = f"{beat['beat']} {beat['gone']}"
        if seen is None or seen[0] != mark:
            seen = self._seen[beat["rank"]] = (mark, now)
        return now - seen[1]

    def _beat(self) -> None:
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.format_stack(frame)[-8:] if frame else []
        beat = {
            "rank": self.rank,
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "host": HOST,
            "beat": time.monotonic_ns(),
            "marks": self._marks,
            "position": self._position,
            "gloo_group": self._patient or self._compiling,
            "finished": self._finished,
            "stack": "".join(stack),
        }
        path = self._path(self.rank)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(beat), encoding="utf-8")
        os.replace(temporary, path)

    def _look(self, limit: float) -> list[dict[str, Any]]:
        """Ranks that are to blame; empty while it is too early to say."""
        beats = [self._read(rank) for rank in range(self.ranks)]
        now = time.monotonic()
        if lost := [b for b in beats if self._is_lost(b)]:
            return lost
        if any(b["gloo_group"] for b in beats) or now - self._marked < 2 * limit:
            return []
        least = min(b["marks"] for b in beats)
        return [b for b in beats if b["marks"] == least]

    def _read(self, rank: int) -> dict[str, Any]:
        """A rank's heartbeat; the last one known, marked as gone, if it is not there any more."""
        for _ in range(2):  # a network file system may fail once for a file that is being replaced
            with suppress(OSError, ValueError):
                beat: dict[str, Any] = json.loads(self._path(rank).read_text(encoding="utf-8"))
                self._known[rank] = beat | {"gone": False}
                return self._known[rank]
        never = {"rank": rank, "beat": 0, "marks": 0, "position": "unknown", "gloo_group": False}
        return self._known.get(rank, never | {"finished": False}) | {"gone": True}

    def _end(self, culprits: list[dict[str, Any]]) -> None:
        lines = []
        for beat in culprits:
            has_ended = beat["gone"] or (is_here(beat) and not state_of(beat))
            what = "has died" if has_ended else "does not move on"
            lines.append(f"rank {beat['rank']} {what}; last seen at: {beat['position']}")
            lines.append(str(beat.get("stack", "")).rstrip())
            # Its number may be another process's by now: then there is nobody to kill.
            if beat["rank"] != self.rank and is_here(beat) and state_of(beat):
                with suppress(ProcessLookupError, PermissionError):
                    # A stopped process ignores SIGTERM; torchrun would wait for it in vain.
                    os.kill(int(beat["pid"]), signal.SIGKILL)
        self.report("\n".join(lines))
        exit_at_once(Exit.HANG)

    def _end_with(self, rank: int, status: int) -> None:
        """Another rank has failed: the collective that this one may be in never returns."""
        say(f"rank {rank} has failed with status {status}; the others end with it")
        exit_at_once(status)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"


def follow_compilations(watch: Watch) -> None:
    """Let torch say when this process compiles; on one rank alone that may take minutes."""
    with suppress(ImportError, AttributeError):  # not public: a version may be without it
        handler = importlib.import_module("torch._dynamo.callback").callback_handler
        handler.register_start_callback(lambda *_: watch.compiling(True))
        handler.register_end_callback(lambda *_: watch.compiling(False))


def is_here(beat: dict[str, Any]) -> bool:
    """Whether a heartbeat comes from this machine, or this container."""
    return bool(beat.get("host") == HOST)


def state_of(beat: dict[str, Any]) -> str:
    """State of a process of this machine, as ps tells it; empty if it is gone."""
    fields = _stat(int(beat["pid"]))
    return fields[0] if fields and fields[BORN] == beat["born"] and fields[0] not in "ZX" else ""


def born(process: int) -> str:
    """When a process was started, in ticks since the machine was; empty if it is gone."""
    fields = _stat(process)
    return fields[BORN] if fields else ""


def _stat(process: int) -> list[str]:
    with suppress(OSError):
        # The name, in brackets, may hold anything.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return []
