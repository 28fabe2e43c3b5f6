"""Find a rank that does not move on, name it, and end the run so that a restart can follow.

Each rank's watching thread writes a small heartbeat file a second: how many marks its main thread
has passed, where it is and its stack. A rank whose own marks stand still for too long looks at
all heartbeats: a file that no longer changes belongs to a stopped process (SIGSTOP, a dead node);
if all of them beat, the rank with the fewest marks is the one that the others wait for. The files
lie in the run folder, so a rank needs no collective, which is what hangs, to look.

Where no limit holds (a start, an evaluation, a save), a rank still looks at its neighbour, and at
nothing but whether that is stopped or dead.
"""

from __future__ import annotations

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

BEAT_SECONDS = 1.0
LEAST_LIMIT_SECONDS = 10.0
NEIGHBOUR_EVERY_SECONDS = 5.0
SILENT_SECONDS = 60.0  # without a heartbeat from another machine; a long call may hold it up
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
    """One rank's heartbeat, and its eye on the others."""

    def __init__(
        self, folder: Path, rank: int, ranks: int, report: Callable[[str], object]
    ) -> None:
        self.folder, self.rank, self.ranks, self.report = folder, rank, ranks, report
        self._marks, self._position, self._patient = 0, "start", True
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
            self._beat()  # who has no heartbeat has ended, for the others
        self._thread.start()

    def stop(self) -> None:
        """End the thread; who has ended is not missed."""
        self._ended.set()
        self._thread.join(STALL_SECONDS)
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

    def limit_seconds(self) -> float | None:
        """How long marks may stand still; None while that is not known."""
        if len(self._step_seconds) < STEPS_TO_KNOW:
            return None
        return max(LEAST_LIMIT_SECONDS, 5 * statistics.median(self._step_seconds))

    def _run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            began = time.monotonic()
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
        if limit is None or self._patient:
            return self._look_at_neighbour()
        return self._look(limit) if stood >= limit else []

    def _look_at_neighbour(self) -> list[dict[str, Any]]:
        """The next rank, if it is stopped or dead."""
        now = time.monotonic()
        if self.ranks == 1 or now - self._looked < NEIGHBOUR_EVERY_SECONDS:
            return []
        self._looked = now
        beat = self._read((self.rank + 1) % self.ranks)
        if not beat["beat"] or (is_here(beat) and state_of(beat) not in DEAD_OR_STOPPED):
            return []
        silent = self._silent_seconds(beat)
        return [beat] if silent > (0 if is_here(beat) else SILENT_SECONDS) else []

    def _silent_seconds(self, beat: dict[str, Any]) -> float:
        """How long this heartbeat was seen unchanged."""
        now, seen = time.monotonic(), self._seen.get(beat["rank"])
        if seen is None or seen[0] != str(beat["beat"]):
            seen = self._seen[beat["rank"]] = (str(beat["beat"]), now)
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
            "patient": self._patient,
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
        stopped = [b for b in beats if self._silent_seconds(b) > LEAST_LIMIT_SECONDS / 2]
        if stopped:
            return stopped
        if any(b["patient"] for b in beats) or now - self._marked < 2 * limit:
            return []
        least = min(b["marks"] for b in beats)
        return [b for b in beats if b["marks"] == least]

    def _read(self, rank: int) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            beat: dict[str, Any] = json.loads(self._path(rank).read_text(encoding="utf-8"))
            return beat
        return {"rank": rank, "beat": 0, "marks": 0, "position": "unknown", "patient": False}

    def _end(self, culprits: list[dict[str, Any]]) -> None:
        lines = []
        for beat in culprits:
            what = "has died" if is_here(beat) and not state_of(beat) else "does not move on"
            lines.append(f"rank {beat['rank']} {what}; last seen at: {beat['position']}")
            lines.append(str(beat.get("stack", "")).rstrip())
            # Its number may be another process's by now: then there is nobody to kill.
            if beat["rank"] != self.rank and is_here(beat) and state_of(beat):
                with suppress(ProcessLookupError, PermissionError):
                    # A stopped process ignores SIGTERM; torchrun would wait for it in vain.
                    os.kill(int(beat["pid"]), signal.SIGKILL)
        self.report("\n".join(lines))
        sys.stdout.flush()
        os._exit(Exit.HANG)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"


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
