"""Run directories with known figures, written at once: what `rookery compare` reads of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.tracking.files import json_line, write_json

START = 1_000_000.0
SIZES = {"nest_tiny": (17_057_608, 5_807_152_128), "nest_small": (38_351_176, 10_322_992_128)}
IMAGENET = {"path": "shards/imagenet/train", "fingerprint": "f00d", "samples": 1_281_167, "classes": 1000}


def write_run(
    path: Path,
    top1: list[float],
    *,
    seed: int = 0,
    model: str = "nest_tiny",
    settings: dict[str, Any] | None = None,
    status: str | None = "finished",
    dataset: dict[str, Any] = IMAGENET,
    processes: int = 8,
) -> Path:
    """A run with an evaluation (`top1`) and a training line after every epoch of 100 steps of 1,024 images and 360 s.

    Args:
        settings: more config keys, dotted.
        status: how the session ended; None for a kill.
    """
    path.mkdir(parents=True)
    config: dict[str, Any] = {"name": path.name, "seed": seed, "model": {"name": model}, "train": {"epochs": "300ep"}}
    for key, value in (settings or {}).items():
        section, name = key.split(".")
        config.setdefault(section, {})[name] = value
    params, macs = SIZES[model]
    (path / "config.yaml").write_text(json.dumps(config))
    facts = {"model_params": params, "model_macs": macs, "total_steps": 100 * len(top1), "total_epochs": len(top1)}
    write_json(path / "facts.json", facts | {"datasets": {"train": dataset}})
    lines = []
    for epoch, value in enumerate(top1, start=1):
        place = {"step": 100 * epoch, "samples": 102_400 * epoch, "epoch": float(epoch), "time": START + 360 * epoch}
        speed = 2800.0 + 10 * (epoch % 3)
        train = {"loss": 7.0 * (1 - value), "lr": 1e-3, "images_per_second": speed, "memory_gb": 20.0 + seed}
        lines.append({"kind": "train", **place, **train})
        lines.append({"kind": "eval", **place, "top1": value, "top5": min(1.0, value + 0.15), "loss": 2 - value})
    (path / "metrics.jsonl").write_bytes(b"".join(map(json_line, lines)))
    sessions: list[dict[str, Any]] = [{"event": "start", "time": START, "world_size": processes}]
    if status is not None:
        sessions.append({"event": "end", "time": START + 360 * len(top1), "status": status})
    (path / "sessions.jsonl").write_bytes(b"".join(map(json_line, sessions)))
    return path


def rising(last: float, epochs: int) -> list[float]:
    """Accuracies that rise fast, then slowly, to `last`."""
    return [round(last * (1 - 0.9 * (1 - epoch / epochs) ** 3), 6) for epoch in range(1, epochs + 1)]
