"""Run on the idle GPU by `test_traffic.py`: what the counts are of programs that can be counted by hand, as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.traffic import DEVICE, compiled, described, eager, gflop, program
from pipeline.models import create_model

ROWS = 256


class Gated(nn.Module):
    """A parameter for every element of the input, and nothing that has to be a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(ROWS, 64))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(2 * self.gate)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def counted(model: nn.Module) -> dict[str, Any]:
    found = {}
    for way, count in (("eager", eager), ("compiled", compiled)):
        found[way] = [list(kernel) for kernel in count(model.to(DEVICE), torch.zeros(ROWS, 64, device=DEVICE))]
    return found


if __name__ == "__main__":
    found: dict[str, Any] = {"gated": counted(Gated()), "two layers": counted(TwoLayers())}
    found["nest_tiny"] = described(program("nest_tiny", "compiled"), gflop("nest_tiny"))
    small = create_model("refiner_vit_s", img_size=64, depth=2, num_classes=5).to(DEVICE).train()
    found["refiner"] = [kernel.name for kernel in compiled(small, torch.zeros(4, 3, 64, 64, device=DEVICE))]
    print(json.dumps(found))
