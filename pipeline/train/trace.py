"""A record of the samples that a run really trained on, for those who want to check the order rather than trust it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import torch

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.train.distributed import World
from pipeline.train.tasks.base import Source


class SampleTrace:
    """Appends `{"step": s, "keys": [...]}` lines to `<run>/trace/<session>-rank<r>.jsonl`; without a file, nothing.

    Every start of the run (a session) writes files of its own; where two of them hold a step, the later one's counts,
    since the weights of the earlier one were lost.
    """

    def __init__(self, file: TextIO | None, source: Source) -> None:
        self._file, self._source = file, source

    def add(self, step: int, samples: torch.Tensor) -> None:
        """Record the samples (b,) that this process trained on in a step.

        Raises:
            UserError: no space.
        """
        if self._file is not None:
            try:
                self._file.write(json.dumps({"step": step, "keys": self._source.keys(samples.tolist())}) + "\n")
                self._file.flush()
            except OSError as error:
                # A trace with holes would prove nothing.
                raise UserError(
                    f"{self._file.name} can't be written: {error.strerror}; free space, or set data.trace=false"
                ) from error


def open_trace(config: RunConfig, source: Source, world: World, stack: ExitStack) -> SampleTrace:
    """This process's trace of a run, closed by `stack`; collective."""
    if not config.data.trace:
        return SampleTrace(None, source)
    folder = Path(config.out, config.name, "trace")

    def next_session() -> int:
        folder.mkdir(exist_ok=True)
        return 1 + max((int(path.name.split("-")[0]) for path in folder.glob("*.jsonl")), default=0)

    session = world.on_main(next_session)
    path = folder / f"{session:04d}-rank{world.rank}.jsonl"
    return SampleTrace(stack.enter_context(open(path, "x", encoding="utf-8")), source)


def read_trace(run_dir: Path) -> dict[int, list[str]]:
    """Keys per step over all processes, sorted; of several sessions the last one that reached the step."""
    latest: dict[int, tuple[int, list[str]]] = {}
    for path in sorted((run_dir / "trace").glob("*.jsonl")):
        session = int(path.name.split("-")[0])
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # the line that a kill cut short
            known = latest.get(line["step"])
            others = known[1] if known is not None and known[0] == session else []
            latest[line["step"]] = (session, others + line["keys"])
    return {step: sorted(keys) for step, (_, keys) in sorted(latest.items())}
