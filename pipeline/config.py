"""The config tree: the one place where a run is described.

A run is one YAML file plus dotted overrides (`train.epochs=100`); `pipeline.config_load` reads them. Every section is
frozen and strict: an unknown key is an error. What depends on the data (number of classes, lanes) may be left out and
is filled in by `pipeline.resolve`; the filled-in config is saved with the run and reproduces it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig, MixConfig
from pipeline.durations import DurationField, EpochsField


class Section(BaseModel):
    """Base of every part of the tree: frozen, no unknown keys, defaults checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class ModelConfig(Section):
    """Which architecture; see `rookery models`."""

    name: str = Field(description="registered model name")
    num_classes: int | None = Field(None, ge=1, description="null: the classes of the training manifest")
    img_size: int | None = Field(None, ge=1, description="image side in pixels; null: the model's own")
    in_chans: Literal[1, 3] = Field(3, description="image channels")
    drop_path_rate: float | None = Field(None, ge=0, lt=1, description="stochastic depth; null: the model's own")
    options: dict[str, Any] = Field(default_factory=dict, description="other arguments of create_model")

    def overrides(self) -> dict[str, Any]:
        """Keyword arguments for `pipeline.models.create_model`."""
        named = {"num_classes": self.num_classes, "img_size": self.img_size, "drop_path_rate": self.drop_path_rate}
        return {k: v for k, v in named.items() if v is not None} | {"in_chans": self.in_chans} | self.options


class DataConfig(Section):
    """Where the shards are and in which order their samples come; see docs/data_order.md."""

    train: str = Field(description="directory of the training split (holds manifest.json)")
    val: str | None = Field(None, description="directory of the evaluation split; null: no evaluation")
    lanes: int | None = Field(
        None, ge=1, description="parallel streams of an epoch; a world size must divide it; null: from the batch size"
    )
    shuffle: Literal["window", "full", "none"] = Field(
        "window", description="window: shards permuted, samples permuted in windows of a lane; full: one permutation"
    )
    window: int = Field(8192, ge=1, description="samples per shuffle window of a lane")
    repeats: int = Field(1, ge=1, description="repeated augmentation: copies of a sample in one batch")
    workers: int = Field(2, ge=0, description="loader processes per training process; 0 loads in the process itself")
    prefetch: int = Field(4, ge=1, description="batches that each loader process prepares ahead")
    trace: bool = Field(False, description="write the keys of the samples of every step to <run>/trace/")


class ScheduleConfig(Section):
    """Learning rate over a run: linear warm-up, then half a cosine, both counted in samples."""

    warmup: DurationField = Field("0ep", description="length of the linear warm-up from 0")  # type: ignore[assignment]
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end")


class OptimConfig(Section):
    """AdamW and its learning rate."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0, description="learning rate at `lr_batch` samples per global step")
    lr_batch: int | None = Field(
        None, ge=1, description="peak lr = lr * global_batch_size / lr_batch; null: lr is the peak"
    )
    weight_decay: float = Field(0.05, ge=0)
    decay: Literal["all", "matrices"] = Field(
        "all", description="all: every parameter but the model's no_weight_decay(); matrices: 1-D ones excluded as well"
    )
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()

    def peak_lr(self, global_batch_size: int) -> float:
        """Largest learning rate of the run, by the linear rule."""
        return self.lr if self.lr_batch is None else self.lr * global_batch_size / self.lr_batch


class TrainConfig(Section):
    """The training itself."""

    epochs: EpochsField = Field(description="length of the run; the schedule spans it")
    stop_after: DurationField | None = Field(None, description="end earlier than `epochs`, the schedule unchanged")
    global_batch_size: int = Field(ge=1, description="samples per optimizer step, over all processes")
    accumulate: int = Field(1, ge=1, description="micro-batches that each process splits its part of a step into")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="autocast type; weights stay fp32")
    compile: bool = Field(False, description="torch.compile the model")
    activation_checkpointing: bool = Field(False, description="recompute activations in backward, to save memory")
    clip_grad_norm: float | None = Field(None, gt=0, description="clip the global gradient norm")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="exponential moving average of the weights, per step")
    max_bad_steps: int = Field(10, ge=0, description="steps skipped for a NaN or Inf before the run stops")
    deterministic: bool = Field(True, description="deterministic kernels only")
    log_every: DurationField = Field("20steps", description="how often metrics are logged")  # type: ignore[assignment]


class EvalConfig(Section):
    """Evaluation on the whole of `data.val`."""

    every: DurationField = Field("1ep", description="how often; the end is always evaluated")  # type: ignore[assignment]
    batch_size: int = Field(64, ge=1, description="samples per process and forward")
    weights: Literal["model", "ema"] = Field("model", description="which weights are evaluated and exported")


class CheckpointConfig(Section):
    """What is kept of a run's state."""

    every: DurationField = Field("1ep", description="how often; the end is always saved")  # type: ignore[assignment]
    keep_last: int = Field(2, ge=1, description="newest complete checkpoints that stay")


class TrackingConfig(Section):
    """MLflow mirror of the run's metrics.jsonl."""

    mlflow: bool = True
    experiment: str = "rookery"
    uri: str | None = Field(None, description="MLflow server; null: MLFLOW_TRACKING_URI or sqlite:///mlflow.db")
    system_seconds: float = Field(15, gt=0, description="interval of system metrics")


class EngineConfig(Section):
    """How the model is spread over the processes."""

    name: Literal["ddp"] = "ddp"


class RunConfig(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(description="run directory's name")
    out: str = Field("runs", description="parent of the run directory")
    seed: int = Field(0, ge=0, lt=2**31)
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue the newest complete checkpoint of the run directory"
    )
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    eval_transform: EvalTransformConfig = EvalTransformConfig()
    mix: MixConfig = MixConfig()
    train: TrainConfig
    optim: OptimConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    engine: EngineConfig = EngineConfig()

    @field_validator("name", mode="before")
    @classmethod
    def _name_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _conflicts(self) -> RunConfig:
        batch, lanes = self.train.global_batch_size, self.data.lanes
        if lanes is not None and batch % lanes:
            raise ValueError(
                f"data.lanes={lanes} does not divide train.global_batch_size={batch}; "
                f"set data.lanes to a divisor of {batch} (or leave it out)"
            )
        if self.eval.weights == "ema" and self.train.ema_decay is None:
            raise ValueError("eval.weights=ema needs an average to evaluate: set train.ema_decay (0.9999, say)")
        return self
