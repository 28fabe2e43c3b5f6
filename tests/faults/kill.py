"""kill -9 at every step or at random moments: the same command resumes to the same weights.

    python tests/faults/kill.py --every-step ENGINE [--seed S] [--forked]
    python tests/faults/kill.py --random N [--engine ENGINE] [--seed S] [--forked]
    python tests/faults/kill.py --restart-time N   # a worker's death to the next step: seconds

Both stages of `tiny`, 15 steps each, packed, with dropout, a checkpoint at every step, 2 ranks. The
results are printed at the end; the exit status is 1 if one of them is wrong.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil
from starts import OVERRIDES, STAGES, STEPS, ForkedStart, Start, final_hash, steps_in

from dtrain.checkpoints import newest_complete

TYPICAL_STEP_SECONDS = 0.1
MAX_RESTART_RATIO = 1.2
INTERVAL = 1  # steps between saves: the most that a kill may cost


def main() -> int:
    """Run what the options ask for; return 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every-step", metavar="ENGINE")
    parser.add_argument("--random", type=int, metavar="N")
    parser.add_argument("--restart-time", type=int, metavar="N")
    parser.add_argument("--engine", default="ddp")
    parser.add_argument("--forked", action="store_true", help="ranks without launcher: quicker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="dtrain-kill-"))
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(arguments.seed)
    engine = arguments.every_step or arguments.engine
    overrides = [*OVERRIDES, f"engine.kind={engine}"]
    if arguments.restart_time:
        return restart_time(folder, overrides, arguments.restart_time)
    expected = undisturbed(folder / "undisturbed", overrides)
    kind = ForkedStart if arguments.forked else Start
    if arguments.every_step:
        return every_step(folder / "run", overrides, expected, draw, kind)
    return at_random(folder, overrides, expected, draw, arguments.random, kind)


def undisturbed(folder: Path, overrides: list[str]) -> str:
    """The hash of an uninterrupted run."""
    start = Start(folder, overrides)
    status = start.end(600)
    assert status == 0, start.log.read_text()
    print(f"undisturbed: {final_hash(folder)[:16]}, {time.monotonic() - start.began:.1f} s")
    return final_hash(folder)


def every_step(
    folder: Path, overrides: list[str], expected: str, draw: random.Random, kind: type[Start]
) -> int:
    """Kill both workers after each of the 30 steps in turn, a moment of up to a step later."""
    statuses, lost = Counter[int | None](), Counter[int]()
    for stage in STAGES:
        for step in range(1, STEPS + 1):
            start = kind(folder, overrides)
            if not start.wait_for(lambda: step in start.steps(stage)):  # noqa: B023
                print(f"step {step} of {stage} was not reached:\n{start.log.read_text()}")
                return 1
            time.sleep(draw.uniform(0, TYPICAL_STEP_SECONDS))
            for worker in start.workers().values():
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
            statuses[start.end()] += 1
            lost[position(folder) - saved(folder)] += 1
    start = kind(folder, overrides)
    status = start.end(600)
    same = status == 0 and final_hash(folder) == expected and max(lost) <= INTERVAL
    kills = sum(statuses.values())
    print(f"{kills} kills, steps lost by a kill {dict(sorted(lost.items()))}, statuses")
    verdict = "hash equal" if same else "WRONG"
    print(f"{dict(statuses)}; final status {status}, {verdict}")
    return 0 if same else 1


def at_random(
    parent: Path,
    overrides: list[str],
    expected: str,
    draw: random.Random,
    kills: int,
    kind: type[Start],
) -> int:
    """Kill a worker, the launcher, or all at once, anywhere; start again until a run ends."""
    counts, lost, bad = Counter[str](), Counter[int](), list[str]()
    done = runs = 0
    slowest = 0.0
    while done < kills or runs == 0:
        folder = parent / f"run-{runs}"
        while True:
            start = kind(folder, overrides)
            victim, moment = draw.choice(VICTIMS[kind]), draw.choice(MOMENTS)
            if done < kills and wait_until(moment, start, draw) and strike(start, victim):
                done += 1
                began = time.monotonic()
                unfinished = bool(list(folder.glob("*/checkpoints/.step-*")))
                status = start.end()
                seconds = time.monotonic() - began
                slowest = max(slowest, seconds)
                counts[f"{victim}, {moment}"] += 1
                counts["left an unfinished save"] += unfinished
                steps = position(folder) - saved(folder)
                lost[steps] += 1
                if status is None:
                    bad.append(f"{victim} at {moment}: did not end by itself")
                if steps > INTERVAL:
                    bad.append(f"{victim} at {moment}: {steps} steps lost")
                print(
                    f"{done}: {victim}, {moment}: status {status} after {seconds:.1f} s, "
                    f"{steps} steps lost",
                    flush=True,
                )
                continue
            status = start.end(600)
            if status != 0 or final_hash(folder) != expected:
                bad.append(f"{folder}: status {status}, see {start.log}")
                break
            print(f"run {runs}: ended by itself, hash equal", flush=True)
            shutil.rmtree(folder)
            break
        runs += 1
    for name, count in sorted(counts.items()):
        print(f"{count:5} {name}")
    print(f"{done} kills in {runs} runs, steps lost by a kill {dict(sorted(lost.items()))}")
    print(f"slowest end after a kill {slowest:.1f} s; {len(bad)} bad: {bad}")
    return 1 if bad else 0


def restart_time(folder: Path, overrides: list[str], pairs: int) -> int:
    """Time a cold start up to its first step, and a restart from the kill to its first step."""
    cold, warm = list[float](), list[float]()
    for number in range(pairs + 1):  # the first makes samples and data, and is not counted
        start = Start(folder / f"restart-{number}", overrides)
        start.wait_for(lambda: start.steps("domain"))  # noqa: B023
        cold.append(time.monotonic() - start.began)
        start.wait_for(lambda: len(start.steps("domain")) > 5)  # noqa: B023
        killed = time.monotonic()
        start.workers()[1].kill()
        start.end()
        again = Start(start.folder, overrides)
        before = set[int]()
        again.wait_for(lambda: new_step(again, before))  # noqa: B023
        warm.append(time.monotonic() - killed)
        again.launcher.kill()
        again.end()
        print(f"cold start {cold[-1]:.2f} s, kill to next step {warm[-1]:.2f} s", flush=True)
    ratio = median(warm[1:]) / median(cold[1:])
    print(f"medians of {pairs}: {median(cold[1:]):.2f} s, {median(warm[1:]):.2f} s: {ratio:.2f}")
    return 0 if ratio <= MAX_RESTART_RATIO else 1


def new_step(start: Start, before: set[int]) -> bool:
    """Whether a start has done a step beyond those that it found in the file."""
    steps = set(start.steps("domain"))
    before.update(steps if not before else ())
    return bool(steps - before)


VICTIMS = {
    Start: ("worker 0", "worker 1", "launcher", "all"),
    ForkedStart: ("worker 0", "worker 1", "all"),
}
MOMENTS = ("any time", "in training", "in training", "in a save", "in a save")


def wait_until(moment: str, start: Start, draw: random.Random) -> bool:
    """Wait for a moment of a start; return False if it ended before."""
    if moment == "any time":
        time.sleep(draw.uniform(0, 12 if type(start) is Start else 4))
    elif moment == "in training":
        first = {stage: len(start.steps(stage)) for stage in STAGES}
        start.wait_for(lambda: any(len(start.steps(s)) > first[s] for s in STAGES))
        time.sleep(draw.uniform(0, 8 * TYPICAL_STEP_SECONDS))
    else:
        start.wait_for(lambda: bool(start.workers()))
        skip = draw.randrange(8)
        seen = set[str]()
        start.wait_for(lambda: len(unfinished_saves(start.folder, seen)) > skip)
        time.sleep(draw.uniform(0, 0.02))
    return not start.is_over()


def unfinished_saves(folder: Path, seen: set[str]) -> set[str]:
    """Names of saves under way, all that were ever seen."""
    seen.update(path.name for path in folder.glob("*/checkpoints/.step-*"))
    return seen


def strike(start: Start, victim: str) -> bool:
    """kill -9; return False if no such process was running."""
    workers = start.workers()
    launcher = [] if isinstance(start, ForkedStart) else [start.launcher]
    chosen = {"launcher": launcher, "all": [*launcher, *workers.values()]}
    targets = chosen.get(victim) or [w for r, w in workers.items() if f"worker {r}" == victim]
    for target in targets:
        with suppress(psutil.NoSuchProcess):
            target.kill()
    return bool(targets)


def position(folder: Path) -> int:
    """Steps in the metrics of both stages."""
    return sum(max(steps_in(folder / stage / "metrics.jsonl"), default=0) for stage in STAGES)


def saved(folder: Path) -> int:
    """Steps in complete checkpoints, over both stages."""
    newest = [newest_complete(folder / stage / "checkpoints")[0] for stage in STAGES]
    return sum(checkpoint.step for checkpoint in newest if checkpoint)


if __name__ == "__main__":
    sys.exit(main())
