"""What the model goes by, drawn after every evaluation: `<run>/explain/step-00000000.png` with GradCAT's paths.

Training must not notice. So the weights are taken as they are for saving, on every engine alike, and put into a model
of rank 0's own; the model in training gets no hook and no gradient, and no generator of random numbers moves.
"""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from pipeline.data.augment.transforms import build_eval_transform
from pipeline.data.loader import load_sample
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.explain.draw import contact_sheet
from pipeline.explain.methods import Options, Subject, explain
from pipeline.explain.pictures import Picture, prepared
from pipeline.resolve import Resolved, build_model
from pipeline.tracking.files import write_aside
from pipeline.tracking.run_dir import EXPLAIN_NAME
from pipeline.train.distributed import World
from pipeline.train.engines import Engine
from pipeline.train.no_room import no_picture

log = logging.getLogger("rookery")

_COLUMNS = 4


class Explainer:
    """Draws `explain.images` samples of `data.val`, the same every time, spread evenly over the split."""

    def __init__(self, run: Resolved, world: World) -> None:
        self.run, self.world = run, world
        self.folder = Path(run.config.out, run.config.name, EXPLAIN_NAME)
        self._pictures: list[Picture] = []

    def draw(self, step: int, engine: Engine) -> None:
        """Draw the weights that the run evaluates; collective, rank 0 writes. A failure is told and costs nothing."""
        if not self.run.config.explain.images:
            return
        weights = engine.full_weights(self.run.config.eval.weights)
        if not self.world.is_main:
            return
        try:
            self._write(self._subject(weights), step)
            return
        except (UserError, OSError) as error:
            fault = str(error)
        except (torch.OutOfMemoryError, MemoryError) as error:
            fault = f"{no_picture(error)}; fewer explain.images take less"
        # Only now is nothing of the drawing left that holds memory: until here the error did.
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("no explanation of step %d: %s; training goes on", step, fault)

    def _subject(self, weights: dict[str, torch.Tensor]) -> Subject:
        config = self.run.config
        assert config.model.img_size is not None, "resolve fills in the image size"
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn on the CPU, and thrown away here
            model = build_model(config, "cpu")
        model.load_state_dict(weights)
        transform = build_eval_transform(
            config.eval_transform, config.augment, config.model.img_size, config.model.in_chans
        )
        return Subject(model.to(self.world.device).eval(), config.model.name, self.run.train.classes, transform)

    def _write(self, subject: Subject, step: int) -> None:
        if not self._pictures:
            self._pictures = self._read(subject)
        explained = explain(subject, self._pictures, "gradcat", Options())
        sheet = contact_sheet([(one.lines(), one.panel) for one in explained if one.panel is not None], _COLUMNS)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} can't be written ({error.strerror})") from error
        write_aside(self.folder / f"step-{step:08d}.png", lambda file: sheet.save(file, "PNG"))

    def _read(self, subject: Subject) -> list[Picture]:
        config, classes = self.run.config, self.run.train.classes
        assert config.data.val is not None, "checked with the config"
        shards = ShardSet(config.data.val, config.data.cache_options())
        chosen = np.unique(np.linspace(0, len(shards) - 1, config.explain.images).astype(int)).tolist()
        with closing(shards):
            samples = [load_sample(shards, sample, config.model.in_chans) for sample in chosen]
        return [prepared(f"{classes[s.label]}: {s.key}", s.picture, subject.transform) for s in samples]
