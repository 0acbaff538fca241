"""The lives of a run, one more each time it is started again: how each ended, and where the seconds went.

Rank 0 writes them to lives.json as they go, for a life may end without a last word: what is known then is when it last
gave a sign, by the times of the files that it wrote.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parallel.measure.record import Goodput, read_record, read_steps, write_json

LIVES = "lives.json"
DONE = "done"
NO_RECORD = "its launcher ended without a record"
# What rank 0 measures of a life. lost: what it did after its last sign, and steps of lives before that it trains again.
MEASURED = ("startup_seconds", "parity_seconds", "save_seconds", "lost_seconds")


def read_lives(folder: Path) -> list[dict[str, Any]] | None:
    """The lives of a run so far, in order, from its folder; None where it has none."""
    with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        lives = _written(folder)
        numbers = [step.get("step") for step in read_steps(folder / "steps.jsonl")[-1:]]
        for life in lives[-1:]:
            first = life["first_step"] if life["first_step"] is not None else float("inf")
            life["last_step"] = next((n for n in numbers if isinstance(n, int) and n >= first), None)
        return lives
    return None


def _written(folder: Path) -> list[dict[str, Any]]:
    lives = json.loads((folder / LIVES).read_text(encoding="utf-8"))
    if not isinstance(lives, list) or not all(isinstance(life, dict) for life in lives):
        raise ValueError(f"{LIVES} is no list of lives")
    return lives


def start_life(folder: Path, *, layout: Mapping[str, int], started: float) -> None:
    """Adds a life that has not come to train yet, after those in the folder. started: seconds since 1970."""
    life: dict[str, Any] = dict.fromkeys(("first_step", "last_step", "resumed_from"))
    life |= {"layout": dict(layout), "time_utc": datetime.now(UTC).isoformat(timespec="seconds"), "ended": None}
    life |= {"started_unix_seconds": started, "ended_unix_seconds": None, **dict.fromkeys(MEASURED, 0.0)}
    write_json(folder / LIVES, [*(read_lives(folder) or []), life])


def begin_training(
    folder: Path,
    *,
    first_step: int,
    layout: Mapping[str, int],
    resumed_from: Mapping[str, Any] | None,
    same_run: bool,
    parity_seconds: float,
) -> None:
    """The last life, or a new one where nobody has started it, comes to train. On rank 0 alone.

    Before a Journal removes the steps that the lives before it had done from first_step on.
    """
    now = time.time()
    lives = read_lives(folder) or []
    if not lives or lives[-1]["first_step"] is not None or lives[-1]["ended"]:
        if not same_run:
            (folder / LIVES).unlink(missing_ok=True)
        start_life(folder, layout=layout, started=now - parity_seconds)
        lives = read_lives(folder) or []
    life = lives[-1]
    lost = [step for step in read_steps(folder / "steps.jsonl") if step["step"] >= first_step]
    life |= {"first_step": first_step, "resumed_from": resumed_from, "parity_seconds": parity_seconds}
    life["startup_seconds"] = now - life["started_unix_seconds"] - parity_seconds
    life["lost_seconds"] = _seconds_of(lost)
    write_json(folder / LIVES, lives)


def add_save(folder: Path, seconds: float) -> None:
    """The last life has waited so long for a save. On rank 0 alone."""
    lives = _written(folder)
    lives[-1]["save_seconds"] += seconds
    write_json(folder / LIVES, lives)


def close_life(folder: Path) -> str | None:
    """Writes how and when the last life ended, and says how; None where that is known already.

    Before another life of the run removes its record.
    """
    lives, ended = closed(folder)
    if ended:
        write_json(folder / LIVES, lives)
    return ended


def closed(folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The lives, the last ended as its record says, or with its last sign; and how, where that was not known before."""
    lives = read_lives(folder) or []
    if not lives or lives[-1].get("ended", DONE):
        return lives, None
    ended, at = NO_RECORD, _last_sign(folder, lives[-1])
    if lives[-1]["last_step"] is not None:
        ended += f" after step {lives[-1]['last_step']}"
    with contextlib.suppress(OSError):
        at = (folder / "record.json").stat().st_mtime
        record = read_record(folder / "record.json")
        ended = how_it_ended(record["status"], record["reason"])
    _end(folder, lives[-1], ended, at)
    return lives, ended


def how_it_ended(status: str, reason: str | None) -> str:
    return DONE if status == "ok" else f"{status}: {(reason or 'no reason given').splitlines()[0]}"


def lived(folder: Path, ended: str) -> tuple[list[dict[str, Any]] | None, Goodput]:
    """The lives of a run, the last of which ends now, and what its seconds were good for. Nothing is written."""
    lives = read_lives(folder)
    if lives and not lives[-1].get("ended", DONE):
        _end(folder, lives[-1], ended, time.time())
    return lives, goodput(lives or [], read_steps(folder / "steps.jsonl"))


def goodput(lives: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> Goodput:
    """See docs/measures.md; null where a life was not measured. steps: those that count, of all lives."""
    if not lives or any(life.get("ended_unix_seconds") is None for life in lives):
        return Goodput()
    ends = [life["ended_unix_seconds"] for life in lives]
    starts = [life["started_unix_seconds"] for life in lives]
    parts = {key: sum(life[key] for life in lives) for key in MEASURED}
    parts["trained_seconds"] = _seconds_of(steps)
    parts["between_lives_seconds"] = sum(max(0.0, next - end) for next, end in zip(starts[1:], ends, strict=False))
    total = ends[-1] - starts[0]
    other = max(0.0, total - sum(parts.values()))
    return Goodput(
        fraction=parts["trained_seconds"] / total if total > 0 else None,
        total_seconds=total,
        other_seconds=other,
        **parts,
    )


def _end(folder: Path, life: dict[str, Any], ended: str, at: float) -> None:
    at = max(at, life["started_unix_seconds"])
    life |= {"ended": ended, "ended_unix_seconds": at}
    if life["first_step"] is None:
        life["startup_seconds"] = at - life["started_unix_seconds"]
    elif ended != DONE:
        life["lost_seconds"] += max(0.0, at - _last_sign(folder, life))


def _last_sign(folder: Path, life: Mapping[str, Any]) -> float:
    """When a life came to train, or when its last step or its last save had ended: seconds since 1970."""
    signs = [life["started_unix_seconds"] + life["startup_seconds"] + life["parity_seconds"]]
    for path in (folder / "steps.jsonl", folder / "checkpoints" / "latest"):
        with contextlib.suppress(OSError):
            signs.append(path.stat().st_mtime)
    return max(signs)


def _seconds_of(steps: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(step.get("seconds") or 0.0 for step in steps))
