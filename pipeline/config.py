"""The config tree: the one place where a run is described.

A run is one YAML file plus dotted overrides (`train.epochs=100`); `pipeline.config_load` reads them. Every section is
frozen and strict: an unknown key is an error. What depends on the data (number of classes, lanes) may be left out and
is filled in by `pipeline.resolve`; the filled-in config is saved with the run and reproduces it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config_conflicts import conflicts
from pipeline.config_section import Directory, PlainName, Section
from pipeline.config_task import ClassifyConfig, TaskConfig
from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig, MixConfig
from pipeline.data.cache_room import CacheOptions
from pipeline.durations import Duration, Epochs, Interval


def _empty_for_null(value: Any) -> Any:
    return {} if value is None else value


Decay = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Section):
    """Which architecture; see `rookery models`."""

    name: str = Field(description="registered model name")
    num_classes: int | None = Field(None, ge=1, description="null: the classes of the training manifest")
    img_size: int | None = Field(None, ge=1, le=8192, description="image side in pixels; null: the model's own")
    in_chans: Literal[1, 3] = Field(3, description="image channels")
    drop_path_rate: float | None = Field(None, ge=0, lt=1, description="stochastic depth; null: the model's own")
    init: Directory | None = Field(
        None, description="weights to start from: a run's final/ directory or a .safetensors file; null: random"
    )
    init_head: Literal["keep", "new"] = Field(
        "keep", description="keep: the head of `init` too; new: a random head, for other classes"
    )
    options: Annotated[dict[str, Any], BeforeValidator(_empty_for_null)] = Field(
        default_factory=dict, description="other arguments of the model; null drops those of a base"
    )

    @field_validator("options")
    @classmethod
    def _has_no_field(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key in options:
            if key in cls.model_fields:
                raise ValueError(f"{key} is a key of its own: set model.{key} instead")
        return options

    def overrides(self) -> dict[str, Any]:
        """Keyword arguments for `pipeline.models.create_model`."""
        named = {"num_classes": self.num_classes, "img_size": self.img_size, "drop_path_rate": self.drop_path_rate}
        return {k: v for k, v in named.items() if v is not None} | {"in_chans": self.in_chans} | self.options


class DataConfig(Section):
    """Where the shards are and in which order their samples come; see docs/data_order.md."""

    train: Directory = Field(
        description="directory or address (s3://...) of the training split (holds manifest.json); "
        "task=language: hub:OWNER/NAME, a file or folder, or made:COUNT"
    )
    val: Directory | None = Field(None, description="directory or address of the evaluation split; null: no evaluation")
    cache: Directory | None = Field(
        None,
        description="folder of this node for shards from an address; null: in $SLURM_TMPDIR, $TMPDIR or ~/.cache",
    )
    cache_gb: float | None = Field(
        None, gt=0, description="GB that the cache may hold; null: all but a tenth of its disk"
    )
    lanes: int | None = Field(
        None, ge=1, description="parallel streams of an epoch; a world size must divide it; null: from the batch size"
    )
    shuffle: Literal["window", "full", "none"] = Field(
        "window", description="window: shards permuted, samples permuted in windows of a lane; full: one permutation"
    )
    window: int = Field(8192, ge=1, description="samples per shuffle window of a lane")
    repeats: int = Field(1, ge=1, description="repeated augmentation: copies of each sample, next to each other")
    workers: int = Field(2, ge=0, description="loader processes per training process; 0 loads in the process itself")
    prefetch: int = Field(4, ge=1, description="batches that each loader process prepares ahead")
    augment_by: Literal["compiled", "pillow"] = Field(
        "compiled",
        description="compiled: libjpeg-turbo and compiled loops; pillow: the plain path that they are tested against",
    )
    resident: bool = Field(
        False,
        description="decode each split once, keep it in the memory of every device, and augment there; its pictures "
        "must have one size",
    )
    max_bad_samples: int | None = Field(
        None,
        ge=0,
        description="bad samples of `train` that others stand in for before the run stops; 0: the first one stops it; "
        "null: 0.1 % of the samples, at least 10",
    )
    trace: bool = Field(False, description="write the keys of the samples of every step to <run>/trace/")

    def cache_options(self) -> CacheOptions:
        """The node's cache of what has an address."""
        return CacheOptions(self.cache, self.cache_gb)


class ScheduleConfig(Section):
    """Learning rate over a run: linear warm-up, half a cosine, cool-down. Formulas: `pipeline.train.schedule`."""

    warmup: Duration = Field(Duration(0, "ep"), description="length of the linear warm-up")
    warmup_lr: float = Field(0.0, ge=0, description="learning rate it starts from; not scaled with the batch")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end; not scaled with the batch")
    by: Literal["step", "epoch"] = Field(
        "step", description="step: a new rate every step (NesT); epoch: one for each epoch (DeiT, HVT, Refiner)"
    )
    cosine: Literal["after_warmup", "from_start"] = Field(
        "after_warmup",
        description="after_warmup: begins at the peak (NesT); from_start: runs from step 0, under the warm-up (timm)",
    )
    delay: Duration = Field(
        Duration(0, "ep"), description="everything this much later, the first rate holds until then (DeiT, HVT: 1ep)"
    )
    cooldown: Duration = Field(
        Duration(0, "ep"), description="last part of train.epochs, at min_lr (Refiner: 10ep of 310)"
    )


class OptimConfig(Section):
    """AdamW and its learning rate."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0, description="learning rate at `lr_batch` samples per global step")
    lr_batch: int | None = Field(
        None, ge=1, description="peak lr = lr * global_batch_size / lr_batch; null: lr is the peak"
    )
    weight_decay: float = Field(0.05, ge=0, description="decoupled, times the learning rate")
    decay: Literal["all", "matrices"] = Field(
        "all", description="all: every parameter but the model's no_weight_decay(); matrices: 1-D ones excluded as well"
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of a layer over that of the next one, the heads' is `lr`; for fine-tuning: "
        "docs/training.md",
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decay of the averages of gradients and squares")
    eps: float = Field(1e-8, gt=0, description="added to the denominator")
    schedule: ScheduleConfig = ScheduleConfig()

    def peak_lr(self, global_batch_size: int) -> float:
        """Largest learning rate of the run, by the linear rule."""
        return self.lr if self.lr_batch is None else self.lr * global_batch_size / self.lr_batch


class TrainConfig(Section):
    """The training itself."""

    epochs: Epochs = Field(description="length of the run; the schedule spans it")
    stop_after: Epochs | None = Field(None, description="end earlier than `epochs`, the schedule unchanged")
    global_batch_size: int = Field(ge=1, description="samples per optimizer step, over all processes")
    accumulate: int = Field(1, ge=1, description="micro-batches that each process splits its part of a step into")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="autocast type; weights stay fp32")
    compile: bool | Literal["layers"] = Field(
        False,
        description="torch.compile the model, or `layers`: its encoder layers, those alike once, for a quicker start",
    )
    activation_checkpointing: bool | Literal["maps"] = Field(
        False,
        description="recompute activations in backward, to save memory: those of whole layers, or `maps`: only what "
        "refiners make of attention maps",
    )
    clip_grad_norm: float | None = Field(None, gt=0, description="clip the global gradient norm")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="exponential moving average of the weights, per step")
    max_bad_steps: int = Field(10, ge=0, description="steps in a row skipped for a NaN or Inf before the run stops")
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="back to the checkpoint before, and past these samples, when the mean loss of a log window is more "
        "than this many times the median of the 20 before it; null: never",
    )
    max_rollbacks: int = Field(5, ge=0, description="roll-backs before the run stops")
    hang_minutes: float | None = Field(
        10,
        gt=0,
        description="a step, or a batch of an evaluation, that takes longer hangs: start all again; null: never",
    )
    deterministic: bool = Field(True, description="deterministic kernels only")
    log_every: Interval = Field(Duration(20, "steps"), description="how often metrics are logged")


class ObjectiveConfig(Section):
    """What the loss is made of besides the cross-entropy of the classes; see docs/token_labels.md."""

    token_labels: bool = Field(
        False, description="train the class token and every patch token on the label maps of the shards"
    )
    cls_weight: float = Field(1.0, ge=0, description="weight of the class token's cross-entropy")
    dense_weight: float = Field(0.5, ge=0, description="weight of the patch tokens' cross-entropy")
    mix_token: bool = Field(False, description="paste a box of tokens from another sample (MixToken)")
    cos_weight: float = Field(
        0.0, ge=0, description="weight of the mean cosine between consecutive attention maps (Refiner: 0.1)"
    )
    cos_pairs: int = Field(12, ge=1, description="how many pairs of maps are compared, from the first layer on")
    official_roi_order: bool = Field(
        False, description="read label maps at the crop with x and y exchanged, as the official code does"
    )


class EvalConfig(Section):
    """Evaluation on the whole of `data.val`."""

    every: Interval = Field(Duration(1, "ep"), description="how often; the end is always evaluated")
    batch_size: int = Field(64, ge=1, description="samples per process and forward")
    weights: Literal["model", "ema"] = Field("model", description="which weights are evaluated and exported")


class ExplainConfig(Section):
    """Pictures of what the model goes by; see docs/explain.md."""

    images: int = Field(
        0,
        ge=0,
        le=64,
        description="images of `data.val` whose path of GradCAT (NesT) is drawn after every evaluation; 0: none",
    )


class ProfileConfig(Section):
    """A trace of some steps, to see where their time goes; see docs/performance.md."""

    steps: int = Field(0, ge=0, le=1000, description="steps of every start that are traced, to <run>/profile/; 0: none")
    after: Duration = Field(Duration(10, "steps"), description="steps of that start before the first one")
    all_processes: bool = Field(False, description="a trace of every process, not only of the first")


class CheckpointConfig(Section):
    """What is kept of a run's state."""

    every: Interval = Field(Duration(1, "ep"), description="how often; the end is always saved")
    keep_last: int = Field(2, ge=1, description="newest complete checkpoints that stay")
    asynchronous: bool = Field(True, description="write a copy of the state while training goes on")
    compact: bool = Field(
        False,
        description="keep AdamW's moments in bfloat16, two thirds of the size; the run itself goes on from the rounded "
        "ones, so that `every` is part of what is computed; engine.name=ddp",
    )
    part_mb: int | None = Field(
        None, ge=1, description="cut the state into files of so many megabytes at most; engine.name=ddp; null: one file"
    )
    margin_seconds: float = Field(
        300,
        ge=0,
        description="Slurm: save and leave this long before the time limit, a tenth of the job's time at most",
    )


class TrackingConfig(Section):
    """MLflow mirror of the run's metrics.jsonl."""

    mlflow: bool = Field(True, description="mirror to MLflow at all")
    experiment: str = Field("rookery", description="MLflow experiment of the run")
    uri: str | None = Field(None, description="MLflow server; null: MLFLOW_TRACKING_URI or sqlite:///mlflow.db")
    system_seconds: float = Field(15, gt=0, description="interval of system metrics")
    recipe: str | None = Field(None, description="tag: where the run comes from; null: the path of its file")
    sweep: PlainName | None = Field(None, description="name of the MLflow run that this one becomes a child of")
    register_model: PlainName | None = Field(
        None,
        description="MLflow model that the best weights of the finished run become a version of",
    )


class EngineConfig(Section):
    """How the model is spread over the processes."""

    name: Literal["ddp", "fsdp", "deepspeed"] = Field(
        "ddp", description="what each one shards and costs: docs/engines.md"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="deepspeed: 1 shards the optimizer's state, 2 gradients as well, 3 weights as well, 0 nothing"
    )
    offload_optimizer: bool = Field(False, description="deepspeed: optimizer's state and step on the CPU (stage 1-3)")


class RunConfig(Section):
    """A whole run."""

    name: PlainName = Field(description="name of the run directory")
    out: Directory = Field("runs", description="parent of the run directory")
    seed: int = Field(0, ge=0, lt=2**31, description="of weights, data order and augmentation")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue the newest complete checkpoint of the run directory"
    )
    task: TaskConfig = ClassifyConfig()
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    eval_transform: EvalTransformConfig = EvalTransformConfig()
    mix: MixConfig = MixConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig
    optim: OptimConfig
    eval: EvalConfig = EvalConfig()
    explain: ExplainConfig = ExplainConfig()
    profile: ProfileConfig = ProfileConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    engine: EngineConfig = EngineConfig()

    @field_validator("name", mode="before")
    @classmethod
    def _name_may_be_a_number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = list(conflicts(self))
        if found:
            raise ValueError("\n".join(found))
        return self
