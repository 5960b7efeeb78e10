"""Bytes that a training step moves, operation by operation and compiled: counted without a GPU, on the idle one.

    bench/idle_gpu.sh python bench/traffic.py [--only NAME,...] [--out bench/results/traffic.json]

--only takes the groups that have these models, and writes no file unless --out says where.

Forward and backward under autocast to bf16 with float32 weights, as the engines do it: casts count, and what
autocast keeps in float32. Loss and optimizer are left out. `eager` is every operation that PyTorch starts; `compiled`
every kernel that torch.compile makes of them, and every product, convolution and attention that it leaves to libraries.
All read their inputs from memory and write their outputs to it, once each: a bound for programs that nothing slows down
but memory and tensor cores, and that find nothing in the cache. Kernels are taken to read all of a buffer of which they
may need a slice, and a sum in two passes is two kernels, so the count is unfair to `compiled` if to anyone. Custom
kernels (+triton) are counted by what they are given and give. `rookery bench model --count` is the same for a model in
half precision throughout, on any machine.
"""

from __future__ import annotations

import gc
import json
import shlex
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch._inductor import compile_fx, config, ir, scheduler
from torch._inductor.fx_utils import count_flops_fx
from torch._inductor.virtualized import V

from bench.idle_gpu.chosen import chosen
from launch.bench_model.contender import contender
from launch.bench_model.count import OperationCounter, count
from launch.bench_model.measure import tell
from launch.bench_model.peaks import PEAKS
from pipeline.models import num_drop_paths, set_drop_path_noise
from pipeline.tracking.environment import key_versions

DEVICE = torch.device("cuda")
BATCH = 64

# The first of a group is what the others are compared with.
GROUPS = [
    *(("timm:nest_" + size + "_jx", "nest_" + size, "nest_" + size + "+triton") for size in ("tiny", "small", "base")),
    ("nest_tiny_cifar", "nest_tiny_cifar+triton"),
    ("deit_small", "hvt_s_1", "hvt_s_1+triton"),
    ("timm:vit_small_patch16_224", "timm:swin_tiny_patch4_window7_224"),
    ("refiner_vit_s", "refiner_vit_s+triton", "refiner_vit_s_linear", "refiner_vit_s_linear+triton"),
]
WAYS = ("eager", "compiled")


class Kernel(NamedTuple):
    """What one operation or kernel does: floating-point operations, bytes that it reads and writes, and its name."""

    flops: int
    moved: int
    name: str


def main() -> None:
    """Count all groups, and write them."""
    wanted, out = chosen("traffic", GROUPS)
    rows: list[dict[str, Any]] = []
    for group in GROUPS:
        if wanted and not wanted & set(group):
            continue
        counted = {(name, way): described(program(name, way), gflop(name)) for name in group for way in WAYS}
        for (name, way), row in counted.items():
            first = counted[group[0], way]["images_per_second_at_most"]
            times = {gpu: row["images_per_second_at_most"][gpu] / first[gpu] for gpu in PEAKS}
            rows.append({"name": name, "way": way, **row, "times_the_first": times})
            tell(f"{name} {way}: {row['megabytes']:.0f} MB an image, {row['images_per_second_at_most']['h200']:,.0f}")
    report = {
        "command": shlex.join(["bench/idle_gpu.sh", "python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "precision": "bf16",
        "batch": BATCH,
        "versions": key_versions(),
        "models": rows,
    }
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


def gflop(name: str) -> float:
    """Of a training step and an image: three times the forward pass, whatever is computed again."""
    made = contender(name.removesuffix("+triton"), None)  # what its kernels compute is the same
    return 3 * count(made.build, made.side, BATCH, train=False).flops / 1e9


def described(kernels: list[Kernel], gflop: float) -> dict[str, Any]:
    """Figures of one image, and what moves most."""
    by_name: dict[str, int] = {}
    for kernel in kernels:
        by_name[kernel.name] = by_name.get(kernel.name, 0) + kernel.moved
    most = sorted(by_name.items(), key=lambda entry: -entry[1])[:12]
    rates = {
        gpu: BATCH / sum(max(k.flops / 1e12 / peak.half, k.moved / 1e12 / peak.bandwidth) for k in kernels)
        for gpu, peak in PEAKS.items()
    }
    return {
        "kernels": sum(kernel.moved > 0 for kernel in kernels),
        "gflop": gflop,
        "megabytes": sum(kernel.moved for kernel in kernels) / BATCH / 1e6,
        "images_per_second_at_most": rates,
        "mfu_at_most": {gpu: rates[gpu] * gflop / 1e3 / peak.half for gpu, peak in PEAKS.items()},
        "megabytes_by_kernel": {name: moved / BATCH / 1e6 for name, moved in most},
    }


def program(name: str, way: str) -> list[Kernel]:
    """What a training step of a model does, in order."""
    gc.collect()
    torch.cuda.empty_cache()
    made = contender(name, None)
    torch.manual_seed(0)
    model = made.build().to(DEVICE).train()
    images = torch.randn(BATCH, 3, made.side, made.side, device=DEVICE)
    set_drop_path_noise(model, torch.rand(BATCH, num_drop_paths(model), device=DEVICE))
    return {"eager": eager, "compiled": compiled}[way](model, images)


def eager(model: nn.Module, *inputs: Tensor) -> list[Kernel]:
    """The operations of a model's forward and backward pass under autocast to bf16."""
    with OperationCounter() as counter:
        with torch.autocast("cuda", torch.bfloat16):
            output = model(*inputs)
        output.backward(torch.empty_like(output))
    return [Kernel(*numbers, name) for numbers, name in zip(counter.operations, counter.names, strict=True)]


class _Counted(Exception):
    """A program is known as far as it has to be."""


def compiled(model: nn.Module, *inputs: Tensor) -> list[Kernel]:
    """What torch.compile makes of a model's forward and backward pass under autocast to bf16. Nothing of it runs."""
    kernels: list[Kernel] = []

    def note(nodes: list[Any]) -> list[Any]:
        counted: set[Any] = set()  # several nodes may stand for one call of a library
        for node in nodes:
            kernels.append(Kernel(_flops(node, counted), node.get_read_write_buffers_sizes(), _name(node)))
        _tell_strides()
        raise _Counted

    def plan(graph: torch.fx.GraphModule, examples: Any, **options: Any) -> Callable[..., Any]:
        before = len(kernels)
        try:
            compile_fx.compile_fx_inner(graph, examples, **options)
        except Exception:  # as which `_Counted` comes depends on the release
            if len(kernels) == before:
                raise
        return _nothing(graph)

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        return compile_fx.compile_fx(graph, examples, inner_compile=plan)

    torch._dynamo.reset()
    # No cache: what it holds would not be planned again.
    with config.patch(force_disable_caches=True, _post_fusion_custom_pass=note):
        whole = torch.compile(model, backend=backend, fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16):
            output = whole(*inputs)
        output.backward(torch.empty_like(output))
    return kernels


def _tell_strides() -> None:
    """How the results lie in memory, which a backward pass is planned by: the compiler would tell when it is done."""
    context = TracingContext.try_get()
    if context is None or context.output_strides is None:
        return
    for result in V.graph.graph_outputs:
        is_tensor = isinstance(result, ir.IRNode) and result.has_tensor_output()
        strides = tuple(int(stride) for stride in result.get_layout().stride) if is_tensor else None
        context.output_strides.append(strides)


def _flops(node: scheduler.BaseSchedulerNode, counted: set[Any]) -> int:
    if not isinstance(node, scheduler.ExternKernelSchedulerNode) or node.node is None:
        return 0
    calls = [call for call in node.node.get_origins() if call not in counted]
    counted.update(calls)
    return sum(count_flops_fx(call) or 0 for call in calls)


def _name(node: scheduler.BaseSchedulerNode) -> str:
    """The library's function, or the operations that a kernel is fused of."""
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        assert isinstance(node.node, ir.ExternKernel | ir.MultiOutput)
        overload = getattr(node.node, "op_overload", None)
        return str(overload or getattr(node.node, "python_kernel_name", None) or type(node.node).__name__)
    origins = {str(call.target) for part in node.get_nodes() if part.node for call in part.node.get_origins()}
    return " ".join(sorted({name.removeprefix("aten.").removeprefix("prims.").partition(".")[0] for name in origins}))


def _nothing(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    """A program that gives results of the right kind and size."""
    results = next(node for node in graph.graph.nodes if node.op == "output").args[0]

    def run(given: list[Any]) -> list[Any]:
        given.clear()  # so they are handed over
        return [_like(result.meta["val"]) if isinstance(result, torch.fx.Node) else result for result in results]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


if __name__ == "__main__":
    main()
