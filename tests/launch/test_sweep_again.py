"""A sweep that goes on after a kill, without a cluster: what of its trials counts, and what is decided already."""

from __future__ import annotations

import errno
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from launch.sweep.config import load_sweep
from launch.sweep.records import Records
from launch.sweep.search import OptunaSearch
from launch.sweep.trial import held_port
from pipeline.errors import Unreachable
from tests.launch.test_sweep import FakeTrial, write

# --- what Optuna proposes


@pytest.mark.parametrize("kills", [[1], [2, 3], [4], [6, 9]], ids=str)
def test_optuna_proposes_the_same_after_a_restart(kills: list[int], tmp_path: Path) -> None:
    """Three trials are drawn, the others follow from their results."""
    space = {
        "optim.lr": {"loguniform": [1e-5, 1e-1]},
        "seed": {"randint": [0, 9]},
        "model.name": {"choice": ["a", "b"]},
    }
    searcher = {"kind": "optuna", "startup": 3, "seed": 5}

    def propose(folder: Path, *counts: int) -> list[dict[str, Any]]:
        folder.mkdir()
        config = load_sweep(write(folder, space=space, trials=11, metric="loss", searcher=searcher))
        records = Records(config)
        for count in counts:
            records = Records(config)
            search = OptunaSearch(config, records, lambda record: {}, lambda error: True)
            for i in range(count):
                search.suggest(str(i))
                values = records.all()[i].values
                search.on_trial_complete(str(i), {"loss": abs(values["optim.lr"] - 1e-3) + 0.1 * values["seed"]})
            records.save()
        return [record.values for record in records.all()]

    expected = propose(tmp_path / "whole", 11)
    assert len({json.dumps(values) for values in expected}) == 11
    assert propose(tmp_path / "killed", *kills, 11) == expected


@pytest.mark.parametrize(
    ("failures", "running", "outages", "answers"),
    [
        (0, [False], 1, [True]),
        (2, [False] * 3, 3, [False, False, True]),
        (1, [True, True, True, False], 4, [False, False, False, True]),
    ],
)
def test_an_outage_ends_a_sweep_once_nothing_runs(
    failures: int, running: list[bool], outages: int, answers: list[bool], tmp_path: Path, capsys: Any
) -> None:
    from launch.sweep.driver import Watch
    from launch.sweep.table import Progress

    config = load_sweep(write(tmp_path, failures=failures))
    records = Records(config)
    trial = FakeTrial(records.add({"optim.lr": 1e-3}).name, {})
    records.save()
    watch = Watch(config, records, Progress(records, {}), nodes=None)  # type: ignore[arg-type]
    found = []
    for runs in running:
        trial.status = "RUNNING" if runs else "TERMINATED"
        watch.on_step_begin(0, [trial])
        found.append(watch.gives_up(Unreachable("the store is gone")))
    assert found == answers and watch.status() == 1
    said = capsys.readouterr().out
    assert said.count("the store is gone; it is tried again") == (1 if outages > 1 else 0)
    assert said.count("no trial runs: the same command goes on") == 1


# --- where the nodes of a trial meet


def test_a_held_port_is_taken_for_all_but_the_store() -> None:
    from torch.distributed import TCPStore

    holders = [held_port() for _ in range(3)]
    ports = {holder.getsockname()[1] for holder in holders}
    assert len(ports) == 3
    for port in ports:
        with socket.socket() as other, pytest.raises(OSError) as error:
            other.bind(("", port))
        assert error.value.errno == errno.EADDRINUSE
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        TCPStore("localhost", port, is_master=False).set("key", "value")
        assert store.get("key") == b"value"
        with socket.socket() as other, pytest.raises(OSError):  # even of those who would share it
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("", port))
            other.listen()
    for holder in holders:
        holder.close()
