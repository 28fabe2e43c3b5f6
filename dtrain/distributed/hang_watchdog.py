"""Find a rank that failed or hangs, report it, and end the run so that it can be restarted.

On each rank a thread writes a small heartbeat file once a second: how many marks the main thread
has passed, its position and its stack. A rank whose own marks have not advanced for too long reads
all heartbeats: a file that no longer changes belongs to a stopped process (SIGSTOP, a dead node);
if all of them change, the rank with the fewest marks is the one that the others wait for. The
files are in the run folder, so this needs no collective, which is what hangs.

Each rank also checks its neighbor, but only for being stopped or dead: no time limit applies
during startup, an evaluation, a save, or while a rank compiles.

A rank that fails leaves its exit status in the run folder. The others may be in a collective that
never returns (NCCL has no closed connection to notice), so their watchdog threads end them.
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
from dtrain.core.ownership import check_own_folder
from dtrain.core.processes import exit_at_once

BEAT_SECONDS = 1.0
MIN_LIMIT_SECONDS = 10.0
# On a GPU a step that allocates, connects or loads a new kernel takes seconds. Heartbeats of other
# nodes arrive late: a network file system may show a file as it was up to 60 seconds ago.
MIN_LIMIT_SECONDS_GPU_OR_NODES = 60.0
NEIGHBOR_CHECK_SECONDS = 5.0
SILENT_SECONDS = 90.0  # without a heartbeat, for a process that may be alive: 60 and a long call
STALL_SECONDS = 3.0  # to write a heartbeat: the file system stalls, for the other ranks too
DEAD_OR_STOPPED = ("", "T", "t")
START_TIME_FIELD = 19  # index in /proc/PID/stat after the name
STEPS_FOR_LIMIT = 3  # the first steps compile, allocate and connect
MEDIAN_OVER_STEPS = 50


def _host() -> str:
    with suppress(OSError):  # two containers may have the same name but separate process ids
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {os.getpid()}"  # without /proc every process counts as remote


HOST = _host()


class HangWatchdog:
    """Writes this rank's heartbeat and watches those of the others.

    Args:
        folder: of the heartbeats, visible to all ranks.
        rank: of this process.
        ranks: number of ranks.
        report: called with the reason before this process ends because of a hang.
        failure: returns rank and exit status of the first rank that failed; None if none has.
        min_limit_seconds: a step counts as hanging after twice this time at the earliest.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        report: Callable[[str], object],
        failure: Callable[[], tuple[int, int] | None] = lambda: None,
        min_limit_seconds: float | None = None,
    ) -> None:
        self.folder, self.rank, self.ranks, self.report = folder, rank, ranks, report
        self._failure = failure
        self._min_limit = min_limit_seconds or MIN_LIMIT_SECONDS
        self._position_count, self._position, self._patient = 0, "start", True
        self._compiling = self._finished = False
        self._known: dict[int, dict[str, Any]] = {}  # the last heartbeat seen of each rank
        self._reached_at = self._stepped = time.monotonic()
        self._step_seconds: deque[float] = deque(maxlen=MEDIAN_OVER_STEPS)
        self._seen: dict[int, tuple[str, float]] = {}
        self._neighbor_checked = 0.0
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="hang-watchdog", daemon=True)

    def start(self) -> None:
        """Start the heartbeat and the watch."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_own_folder(self.folder)
        self._path(self.rank).unlink(missing_ok=True)  # of an earlier process
        with suppress(OSError):
            self._beat()
        self._thread.start()

    def stop(self, *, finished: bool = True) -> None:
        """Stop the thread and record for the other ranks how this one ended.

        Args:
            finished: this rank's run is over, and the others must not miss it. If not, the
                heartbeat file is removed, which also frees space on a full disk for the reason.
        """
        self._ended.set()
        self._thread.join(STALL_SECONDS)
        with suppress(OSError):
            if finished:
                self._finished = True
                self._beat()
            else:
                self._path(self.rank).unlink(missing_ok=True)

    def record_position(self, position: str) -> None:
        """Record that the main thread has reached `position`."""
        self._position, self._reached_at = position, time.monotonic()
        self._position_count += 1

    def step(self) -> None:
        """Record a finished step; the median duration sets the time limit."""
        now = time.monotonic()
        if not self._patient:
            self._step_seconds.append(now - self._stepped)
        self._stepped, self._patient = now, False

    def rest(self) -> None:
        """Lift the time limit: steps are over for now."""
        self._patient = True
        self._step_seconds.clear()

    @contextmanager
    def patience(self, position: str) -> Iterator[None]:
        """Lift the time limit during an operation, such as a save, that may take any time."""
        self.record_position(position)
        before, self._patient = self._patient, True
        try:
            yield
        finally:
            self.record_position(f"after {position}")
            self._patient, self._stepped = before, self._reached_at

    def compiling(self, now: bool) -> None:
        """Record that a compilation begins or ends, which may happen on this rank only."""
        self._compiling = now
        if not now:
            self.record_position(self._position)

    def limit_seconds(self) -> float | None:
        """How long the marks may not advance; None while there are too few steps to know."""
        if len(self._step_seconds) < STEPS_FOR_LIMIT:
            return None
        return max(self._min_limit, 5 * statistics.median(self._step_seconds))

    def _run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            started = time.monotonic()
            if (failed := self._failure()) is not None:
                self._end_with(*failed)
            with suppress(OSError):  # a full disk is not a hang
                self._beat()
            if time.monotonic() - started > STALL_SECONDS:
                self._seen.clear()
            elif culprits := self._culprits():
                self._end(culprits)

    def _culprits(self) -> list[dict[str, Any]]:
        """Ranks that block this one; empty while it advances."""
        stuck, limit = time.monotonic() - self._reached_at, self.limit_seconds()
        if stuck < MIN_LIMIT_SECONDS / 2:
            self._seen.clear()
            return []
        if culprits := self._check_neighbor():
            return culprits
        if limit is None or stuck < limit or self._patient or self._compiling:
            return []
        return self._find_culprits(limit)

    def _check_neighbor(self) -> list[dict[str, Any]]:
        """The next rank, if it is stopped or dead."""
        now = time.monotonic()
        if self.ranks == 1 or now - self._neighbor_checked < NEIGHBOR_CHECK_SECONDS:
            return []
        self._neighbor_checked = now
        beat = self._read((self.rank + 1) % self.ranks)
        return [beat] if self._is_lost(beat) else []

    def _is_lost(self, beat: dict[str, Any]) -> bool:
        """Whether a rank has died without leaving its status, or is stopped."""
        if beat["finished"] or not beat["beat"]:  # without "beat" it has not started yet
            return False
        silent = self._silent_seconds(beat)
        if beat["gone"]:  # it failed, and may wait for the first rank's status, then write its own
            return silent > 3 * MIN_LIMIT_SECONDS
        if is_on_this_host(beat) and process_state(beat) in DEAD_OR_STOPPED:
            return silent > MIN_LIMIT_SECONDS / 4  # a debugger may stop it for a moment
        return silent > SILENT_SECONDS

    def _silent_seconds(self, beat: dict[str, Any]) -> float:
        """How long this heartbeat has not changed."""
        now, seen = time.monotonic(), self._seen.get(beat["rank"])
        version = f"{beat['beat']} {beat['gone']}"
        if seen is None or seen[0] != version:
            seen = self._seen[beat["rank"]] = (version, now)
        return now - seen[1]

    def _beat(self) -> None:
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.format_stack(frame)[-8:] if frame else []
        beat = {
            "rank": self.rank,
            "pid": os.getpid(),
            "start_time": process_start_time(os.getpid()),
            "host": HOST,
            "beat": time.monotonic_ns(),
            "positions": self._position_count,
            "position": self._position,
            "patient": self._patient or self._compiling,
            "finished": self._finished,
            "stack": "".join(stack),
        }
        path = self._path(self.rank)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(beat), encoding="utf-8")
        os.replace(temporary, path)

    def _find_culprits(self, limit: float) -> list[dict[str, Any]]:
        """Ranks that cause the hang; empty while it is too early to say."""
        beats = [self._read(rank) for rank in range(self.ranks)]
        now = time.monotonic()
        if lost := [b for b in beats if self._is_lost(b)]:
            return lost
        if any(b["patient"] for b in beats) or now - self._reached_at < 2 * limit:
            return []
        least = min(b["positions"] for b in beats)
        return [b for b in beats if b["positions"] == least]

    def _read(self, rank: int) -> dict[str, Any]:
        """A rank's heartbeat; if the file is missing, the last one read, with "gone" set."""
        for _ in range(2):  # a network file system may fail once while a file is replaced
            with suppress(OSError, ValueError):
                beat: dict[str, Any] = json.loads(self._path(rank).read_text(encoding="utf-8"))
                self._known[rank] = beat | {"gone": False}
                return self._known[rank]
        unknown = {"rank": rank, "beat": 0, "positions": 0, "position": "unknown", "patient": False}
        return self._known.get(rank, unknown | {"finished": False}) | {"gone": True}

    def _end(self, culprits: list[dict[str, Any]]) -> None:
        lines = []
        for beat in culprits:
            has_ended = beat["gone"] or (is_on_this_host(beat) and not process_state(beat))
            state = "has died" if has_ended else "does not advance"
            lines.append(f"rank {beat['rank']} {state}; last seen at: {beat['position']}")
            lines.append(str(beat.get("stack", "")).rstrip())
            # Its process id may have been reused: then there is nothing to kill.
            if beat["rank"] != self.rank and is_on_this_host(beat) and process_state(beat):
                with suppress(ProcessLookupError, PermissionError):
                    # A stopped process ignores SIGTERM, and torchrun would wait for it forever.
                    os.kill(int(beat["pid"]), signal.SIGKILL)
        self.report("\n".join(lines))
        exit_at_once(Exit.HANG)

    def _end_with(self, rank: int, status: int) -> None:
        """End with another rank's failure: a collective with it would never return."""
        say(f"rank {rank} has failed with status {status}; the others end with it")
        exit_at_once(status)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"


def follow_compilations(watchdog: HangWatchdog) -> None:
    """Have torch report compilations, which may take minutes on one rank alone."""
    with suppress(ImportError, AttributeError):  # not a public API: a torch version may lack it
        handler = importlib.import_module("torch._dynamo.callback").callback_handler
        handler.register_start_callback(lambda *_: watchdog.compiling(True))
        handler.register_end_callback(lambda *_: watchdog.compiling(False))


def is_on_this_host(beat: dict[str, Any]) -> bool:
    """Whether a heartbeat comes from this machine, or this container."""
    return bool(beat.get("host") == HOST)


def process_state(beat: dict[str, Any]) -> str:
    """State of a heartbeat's process as in ps; empty if it is gone. Only for this machine."""
    fields = _stat(int(beat["pid"]))
    return (
        fields[0]
        if fields and fields[START_TIME_FIELD] == beat["start_time"] and fields[0] not in "ZX"
        else ""
    )


def process_start_time(process: int) -> str:
    """Start time of a process in ticks since the machine booted; empty if it is gone."""
    fields = _stat(process)
    return fields[START_TIME_FIELD] if fields else ""


def _stat(process: int) -> list[str]:
    with suppress(OSError):
        # The name, in parentheses, may contain anything.
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()
    return []
