"""One model at work: a training step or a forward pass on made pictures, its memory, and a clock around steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.bench_model.contender import Contender
from pipeline.models import num_drop_paths, set_drop_path_noise

Phase = Literal["train", "infer"]
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASSES = 1000
_BATCHES = 2


class Runner:
    """A model in one phase, on its device.

    Training is forward, cross-entropy, backward and AdamW, under autocast with float32 weights, as the engines do it;
    this package's models get their stochastic depth handed, as from the loop. Inference is a forward pass, autocast.

    Args:
        contender: what to build.
        phase: `train` or `infer`.
        batch: images of a step.
        precision: `fp32`, `bf16` or `fp16`.
        compiled: whether through torch.compile.
        device: to work on.

    Attributes:
        resting: bytes of GPU memory that the device held before the model came.
    """

    def __init__(
        self, contender: Contender, phase: Phase, batch: int, precision: str, compiled: bool, device: torch.device
    ) -> None:
        self.contender, self.phase, self.batch, self.device = contender, phase, batch, device
        self.resting = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self._dtype = DTYPES[precision]
        torch.manual_seed(0)
        self.model = contender.build().to(device).train(phase == "train")
        self._classes = int(getattr(self.model, "num_classes", CLASSES))  # timm's models have it too
        self._call: Callable[[Tensor], Tensor] = torch.compile(self.model) if compiled else self.model
        if phase == "train":
            fused = device.type == "cuda"
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05, fused=fused)
            self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._drop_paths = num_drop_paths(self.model)  # of ours; timm's draw themselves
        self._data: list[tuple[Tensor, Tensor, Tensor]] = []

    def draw(self) -> None:
        """New batches; the old ones are given back first."""
        self._data.clear()
        side = self.contender.side
        for _ in range(_BATCHES):
            images = torch.randn(self.batch, 3, side, side, device=self.device)
            labels = torch.randint(self._classes, (self.batch,), device=self.device)
            self._data.append((images, labels, torch.rand(self.batch, self._drop_paths, device=self.device)))

    def free(self) -> None:
        """Give the batches back, and the memory that the allocator keeps for later."""
        self._data.clear()
        set_drop_path_noise(self.model, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def step(self, number: int) -> None:
        """Train one step, or see one batch."""
        images, labels, noise = self._data[number % _BATCHES]
        if self.phase == "infer":
            with torch.inference_mode(), self._autocast():
                self._call(images)
            return
        set_drop_path_noise(self.model, noise)
        with self._autocast():
            loss = F.cross_entropy(self._call(images), labels)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def first(self) -> float:
        """Seconds of the first step by the clock: with what is compiled for it, and found out about kernels."""
        began = time.perf_counter()
        self.step(0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def timed(self, steps: int) -> float:
        """Seconds of some steps: between two events on a GPU, else by the clock."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            self._run(steps)
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        self._run(steps)
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1000

    def peak_bytes(self, steps: int) -> int | None:
        """Most GPU memory of this model while it does some steps, with weights, moments and batches; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self._run(steps)
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.resting

    def _run(self, steps: int) -> None:
        for number in range(steps):
            self.step(number)

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, self._dtype)


def fits(contender: Contender, phase: Phase, batch: int, precision: str, device: torch.device) -> bool:
    """Whether two steps leave a tenth of the GPU's memory free, and PyTorch has kernels for tensors of that size.

    Not compiled, which needs more memory and no minutes of compilation for every size.
    """
    runner: Runner | None = None
    try:
        torch.cuda.empty_cache()
        runner = Runner(contender, phase, batch, precision, False, device)
        runner.draw()
        used = runner.resting + (runner.peak_bytes(2) or 0)
        return used <= 0.9 * torch.cuda.get_device_properties(device).total_memory
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:
        # PyTorch's depthwise convolutions don't count beyond 2^31 values, which a Refiner of 1,600 pictures has.
        if "canUse32BitIndexMath" not in str(error):
            raise
        return False
    finally:
        if runner is not None:
            runner.free()
