"""Speed of generators against each other: rounds in turn, in one process, with the multiply-adds that explain it."""

from __future__ import annotations

import statistics
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.generate.latents import fixed_latents
from pipeline.models.attention import Attention
from pipeline.models.facts import count_params, module_macs
from pipeline.models.generate import Generator, create_generator


def bench_generators(
    names: list[str], batch: int, rounds: int, precision: str, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Images per second of generators, the first of them compared with the others.

    Rounds are interleaved, and a ratio compares figures of one round, so that what else the machine does meets all.

    Args:
        names: of the table.
        batch: images of a forward.
        rounds: timed forwards of each, after one that isn't.
        precision: `fp32` or `bf16`.
        options: of every generator, such as `img_size`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generators = [create_generator(name, **options).to(device).eval() for name in names]
    latents = [fixed_latents(g.latent_dim, 0, np.arange(batch)).to(device) for g in generators]
    seconds: list[list[float]] = [[] for _ in names]
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for number in range(rounds + 1):
            for generator, inputs, taken in zip(generators, latents, seconds, strict=True):
                _wait(device)
                start = perf_counter()
                generator.images(inputs)
                _wait(device)
                took = perf_counter() - start
                if number:
                    taken.append(took)
    rows: list[dict[str, Any]] = []
    for name, generator, taken in zip(names, generators, seconds, strict=True):
        ratios = [other / own for own, other in zip(seconds[0], taken, strict=True)]
        counted = generator_macs(generator)
        rows.append(
            {
                "name": name,
                "params": count_params(generator),
                **counted,
                "images_per_second": _spread([batch / one for one in taken]),
                "times_as_long": _spread(ratios),
                "times_the_macs": counted["macs"] / rows[0]["macs"] if rows else 1.0,
            }
        )
    return rows


def generator_macs(generator: Generator) -> dict[str, int]:
    """Multiply-adds of one image, and those among them that are products of queries, keys and values."""
    products = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal products
        products += 2 * inputs[0].numel() * inputs[0].shape[-2]  # N tokens with N others, twice, in C channels

    hooks = [m.register_forward_hook(count) for m in generator.modules() if isinstance(m, Attention)]
    try:
        macs = module_macs(generator, torch.empty(1, generator.latent_dim, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return {"macs": macs, "attention_macs": products}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
