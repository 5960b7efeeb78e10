"""System figures: plausible against what the machine says, and a thread that stops and never raises."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from pipeline.tracking.system import SystemProbe, SystemSampler
from tests.tracking.conftest import wait_for

_BUSY_CHILD = """
import time
block = bytearray(200 << 20)
print("ready", flush=True)
while True:
    pass
"""


def test_figures_are_those_of_the_process_tree() -> None:
    own = psutil.Process().memory_info().rss
    child = subprocess.Popen([sys.executable, "-c", _BUSY_CHILD], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline()
        probe = SystemProbe()
        used = psutil.Process(child.pid).cpu_times()
        started = time.monotonic()
        time.sleep(0.5)
        figures = probe.sample()
        elapsed = time.monotonic() - started
        then = psutil.Process(child.pid).cpu_times()
    finally:
        child.kill()
        child.communicate()
    assert figures["process_rss_bytes"] > 0.9 * own + (200 << 20)
    busy = 100 * (then.user + then.system - used.user - used.system) / elapsed
    assert figures["process_cpu_percent"] == pytest.approx(busy, abs=25)
    assert 0 < figures["cpu_percent"] <= 100 and 0 < figures["memory_percent"] < 100


def test_rates_are_bytes_per_second() -> None:
    before = psutil.net_io_counters()
    probe = SystemProbe()
    time.sleep(0.2)
    figures = probe.sample()
    after = psutil.net_io_counters()
    assert 0 <= figures["net_sent_bytes_per_s"] <= (after.bytes_sent - before.bytes_sent) / 0.2
    for name in ("disk_read_bytes_per_s", "disk_write_bytes_per_s", "net_recv_bytes_per_s"):
        assert figures[name] >= 0


def test_the_sampler_comes_at_its_interval_and_stops() -> None:
    samples: list[dict[str, float]] = []
    sampler = SystemSampler(samples.append, interval=0.05)
    wait_for(lambda: len(samples) >= 3, 10, "three samples")
    sampler.close()
    count = len(samples)
    time.sleep(0.2)
    assert len(samples) == count
    assert "system-sampler" not in [thread.name for thread in threading.enumerate()]


def test_a_failing_callback_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: dict[str, float]) -> None:
        raise OSError("no space")

    with caplog.at_level(logging.WARNING):
        sampler = SystemSampler(fail, interval=0.01)
        wait_for(lambda: caplog.records, 10, "the warning")
        sampler.close()
    assert [record.getMessage() for record in caplog.records] == ["system metrics end here: OSError: no space"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_figures() -> None:
    block = torch.ones(1 << 28, device="cuda")
    figures = SystemProbe().sample()
    assert block.nbytes <= figures["gpu0_memory_bytes"] <= torch.cuda.get_device_properties(0).total_memory
    if "gpu0_watts" in figures:
        assert 0 <= figures["gpu0_percent"] <= 100 and 10 < figures["gpu0_watts"] < 2000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_gpu_is_asked_for_before_it_is_used() -> None:
    code = (
        "import torch; from pipeline.tracking.system import SystemProbe; SystemProbe().sample(); "
        "print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
