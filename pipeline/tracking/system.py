"""Samples what the machine is doing while a run trains: processor, memory, GPUs, disk, network."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

_log = logging.getLogger(__name__)


class SystemSampler:
    """A background thread that hands a dict of figures to `callback` every `interval` seconds.

    One sample costs a millisecond or two of the thread's time. A callback that raises ends the sampling with a warning;
    it never reaches the training.

    Args:
        callback: gets `cpu_percent` (whole machine), `process_cpu_percent` (this process and its children, 100 per
            core), `process_rss_bytes` (same processes; shared pages count in each), `memory_percent` (machine),
            `disk_read_bytes_per_s`, `disk_write_bytes_per_s`, `net_sent_bytes_per_s`, `net_recv_bytes_per_s` (machine),
            and per GPU that this process may use `gpu<i>_percent`, `gpu<i>_memory_bytes`, `gpu<i>_watts` where the
            NVIDIA management library's Python module is installed; else `gpu<i>_memory_bytes` of this process alone.
        interval: seconds between samples; the first comes after one interval.
    """

    def __init__(self, callback: Callable[[dict[str, float]], None], interval: float = 15.0) -> None:
        self._callback = callback
        self._interval = interval
        self._stop = threading.Event()
        self._probe = SystemProbe()
        self._thread = threading.Thread(target=self._run, name="system-sampler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop and wait for the thread; calling it again does nothing."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._callback(self._probe.sample())
            except Exception as error:
                _log.warning("system metrics end here: %s: %s", type(error).__name__, error)
                return


class SystemProbe:
    """Takes single samples; rates are over the time since the sample before (or since construction)."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._gpu_handles: list[Any] | None = None
        psutil.cpu_percent()
        self._time = time.monotonic()
        self._counters = _machine_counters()
        self._cpu_seconds = self._usage()[1]

    def sample(self) -> dict[str, float]:
        """The figures that `SystemSampler` describes."""
        now = time.monotonic()
        elapsed = max(now - self._time, 1e-9)
        counters = _machine_counters()
        rss, cpu_seconds = self._usage()
        figures = {
            "cpu_percent": psutil.cpu_percent(),
            # A child that ended takes its seconds out of the sum.
            "process_cpu_percent": max(0.0, 100 * (cpu_seconds - self._cpu_seconds) / elapsed),
            "process_rss_bytes": float(rss),
            "memory_percent": psutil.virtual_memory().percent,
        }
        figures |= {f"{k}_per_s": max(0.0, (v - self._counters.get(k, v)) / elapsed) for k, v in counters.items()}
        self._time, self._counters, self._cpu_seconds = now, counters, cpu_seconds
        return figures | self._gpus()

    def _usage(self) -> tuple[int, float]:
        """Resident bytes and processor seconds of this process and all below it."""
        rss, seconds = 0, 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    rss += process.memory_info().rss
                    seconds += times.user + times.system
            except psutil.Error:
                continue
        return rss, seconds

    def _gpus(self) -> dict[str, float]:
        import torch

        # Asking earlier would create a CUDA context from this thread.
        if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
            return {}
        if self._gpu_handles is None:
            self._gpu_handles = _gpu_handles()
        figures: dict[str, float] = {}
        for i, handle in enumerate(self._gpu_handles):
            figures |= {f"gpu{i}_{name}": value for name, value in _gpu_figures(handle).items()}
        if not self._gpu_handles:
            device = torch.cuda.current_device()
            figures[f"gpu{device}_memory_bytes"] = float(torch.cuda.memory_reserved(device))
        return figures


def _machine_counters() -> dict[str, float]:
    counters: dict[str, float] = {}
    disk, net = psutil.disk_io_counters(), psutil.net_io_counters()
    if disk is not None:
        counters |= {"disk_read_bytes": disk.read_bytes, "disk_write_bytes": disk.write_bytes}
    if net is not None:
        counters |= {"net_sent_bytes": net.bytes_sent, "net_recv_bytes": net.bytes_recv}
    return counters


def _gpu_handles() -> list[Any]:
    """Management handles of the GPUs that torch sees, in its order; empty without the `pynvml` module."""
    import torch

    try:
        import pynvml

        pynvml.nvmlInit()
        uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
        return [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
    except Exception:
        # No module, no driver access, or a partition that the library does not list: figures of torch serve instead.
        return []


def _gpu_figures(handle: Any) -> dict[str, float]:
    import pynvml

    figures: dict[str, float] = {}
    for name, read in {
        "percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used,
        "watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }.items():
        try:
            figures[name] = float(read())
        except pynvml.NVMLError:
            continue
    return figures
