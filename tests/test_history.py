"""Runs over time: what is a series, where it drops, and the exit code that says so."""

import random
from pathlib import Path

import pytest
from results import GPU, complete_record, months

from launch.cli import main
from launch.history import cluster_of, find_drops, low_stretches, series_of
from parallel.measure.record import write_record


def test_one_planted_regression_among_many_runs_is_found_and_nothing_else() -> None:
    [drop] = find_drops(months().items())
    cluster, devices, strategy, shape = drop.series
    assert (cluster, devices, strategy) == (f"beta, {GPU}", "64", "fsdp")
    assert "4 layers, d_model 32" in shape and shape.endswith("× 64")
    assert drop.run == "beta/week-007/64/fsdp" and drop.lasts and drop.unit == "MFU"
    assert drop.share == pytest.approx(0.18, abs=0.02)
    assert (drop.commit or "").startswith("0000007c") and (drop.commit_before or "").startswith("0000006c")
    assert find_drops(months(drop=None).items()) == []


def test_a_series_is_a_cluster_a_number_of_devices_a_strategy_a_model_and_a_batch() -> None:
    record = complete_record("fsdp", dp_shard=4)
    others = [complete_record("fsdp", dp_shard=2), complete_record("ddp", dp_shard=4)]
    others += [complete_record("fsdp", sequences=16, dp_shard=4), complete_record("fsdp", dp_shard=4)]
    others[-1]["environment"]["cluster"] = "alpha"
    others.append(complete_record("fsdp", dp_shard=4))
    others[-1]["recipe"]["model"]["n_layers"] = 5
    others.append(complete_record("fsdp", dp_shard=4))
    others[-1]["recipe"]["engine"] = {"name": "deepspeed"}
    assert len({series_of(each) for each in (record, *others)}) == 7
    assert cluster_of(record) == "Test CPU, 2 cores" and cluster_of(others[3]) == "alpha, Test CPU"


def test_a_drop_is_beyond_the_spread_of_the_runs_before_it() -> None:
    steady, wide = [100.0, 101, 99, 100, 101], [100.0, 120, 80, 110, 90]
    assert [(low.first, low.values, low.lasts) for low in low_stretches([*steady, 82])] == [(5, [82], True)]
    assert low_stretches([*wide, 75]) == []
    assert low_stretches([*steady, 98]) == []  # less than 3 %
    assert low_stretches([100.0, 100, 100, 82]) == []  # three runs have no spread to speak of
    [low] = low_stretches([*steady, 82, 81, 100])
    assert not low.lasts and low.before == 4 and low.usual == pytest.approx(100.2)
    again = [(low.first, low.before) for low in low_stretches([*steady, 82, 100, 81])]
    assert again == [(5, 4), (7, 6)]


def test_what_stays_low_becomes_the_usual() -> None:
    chance = random.Random(1)
    values = [chance.gauss(100, 1) for _ in range(20)] + [chance.gauss(80, 1) for _ in range(30)]
    [low] = low_stretches(values)
    assert (low.first, len(low.values), low.lasts) == (20, 10, False)
    assert [low.first for low in low_stretches([*values, 60.0])] == [20, 50]


def test_noise_alone_is_rarely_taken_for_a_drop() -> None:
    chance = random.Random(2)
    alarms = sum(bool(low_stretches([chance.gauss(1, 0.02) for _ in range(10)])) for _ in range(500))
    assert alarms < 0.06 * 500


def test_runs_that_failed_or_were_not_run_are_in_no_series() -> None:
    found = months(clusters=("alpha",), devices=(64,), drop=None)
    low = found["alpha/week-009/64/fsdp"]
    low["flops"]["mfu"] *= 0.5
    assert [drop.run for drop in find_drops(found.items())] == ["alpha/week-009/64/fsdp"]
    for change in ({"status": "failed"}, {"kind": "dry-run"}):
        assert find_drops({**found, "alpha/week-009/64/fsdp": low | change}.items()) == []
    low["environment"]["time_utc"] = "yesterday"
    assert find_drops(found.items()) == []


def test_without_mfu_it_is_the_tokens_per_second() -> None:
    found = months(clusters=("alpha",), devices=(64,), drop=("alpha", 64, "hsdp", 5, 0.2))
    for record in found.values():
        record["flops"]["mfu"] = None
    [drop] = find_drops(found.items())
    assert (drop.unit, drop.run) == ("tokens/s", "alpha/week-005/64/hsdp")


def test_lab_report_fails_on_a_regression_that_lasts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = months(clusters=("alpha", "beta"), devices=(64,))
    for folder, record in found.items():
        (tmp_path / folder).mkdir(parents=True)
        write_record(tmp_path / folder / "record.json", record)
    assert main(["report", str(tmp_path), "--fail-on-regression", "10"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"lab: fsdp on 64 devices of beta, {GPU} (") and err.count("\n") == 1
    assert "lower, since 0000007ccccc of 2026-02-23, as usual until 0000006ccccc" in err
    assert main(["report", str(tmp_path), "--fail-on-regression", "25"]) == 0
    assert main(["report", str(tmp_path)]) == 0
    made_good = complete_record("fsdp", 0.42 / 0.376, sequences=64, dp_shard=64)
    made_good |= {key: found["beta/week-009/64/fsdp"][key] for key in ("environment", "labels")}
    made_good["environment"]["time_utc"] = "2026-06-01T12:00:00+00:00"
    (tmp_path / "beta" / "later").mkdir()
    write_record(tmp_path / "beta" / "later" / "record.json", made_good)
    assert main(["report", str(tmp_path), "--fail-on-regression", "10"]) == 0
    assert "made good since" in capsys.readouterr().err
