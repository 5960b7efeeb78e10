"""Recipes: inheritance, overrides, names, what is written back, and what a mistake is told."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launch import cli
from pipeline.config import RunConfig
from pipeline.config_load import dump_config, load_config, parse_tree
from pipeline.config_schema import config_keys, file_schema
from pipeline.durations import Duration
from pipeline.errors import UserError
from pipeline.trees import flatten
from tests.conftest import missing

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("sweep", "ray"))
RECIPES = [path for path in FILES if not path.name.startswith("_")]
DEMO = CONFIGS / "demo.yaml"

SMALL = """\
model:
  name: nest_tiny
data:
  train: shards/train
train:
  epochs: 10
  global_batch_size: 64
optim:
  lr: 1e-3
"""


def recipe_id(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def write(folder: Path, **files: str) -> dict[str, Path]:
    paths = {}
    for name, text in files.items():
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(text)
    return paths


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# --- what a recipe becomes


@pytest.mark.parametrize("path", RECIPES, ids=recipe_id)
def test_recipe_is_written_back_and_read_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("path", RECIPES, ids=recipe_id)
def test_recipe_is_named_after_its_family_and_file(path: Path) -> None:
    folder, _, stem = recipe_id(path).removesuffix(".yaml").rpartition("/")
    assert load_config(path).name == (f"{folder}_{stem}" if folder else stem)


@pytest.mark.parametrize("path", [p for p in FILES if p not in RECIPES], ids=recipe_id)
def test_base_is_no_run(path: Path) -> None:
    assert "model is missing; it needs model.name" in mistake(path) or "model.name is missing" in mistake(path)


RANDOM_VALUES: dict[str, Callable[[random.Random], Any]] = {
    "name": lambda r: r.choice(["a", "7", "1e5", "0x1F", "null", "2024-01-01", "on", "x.y-z_1"]),
    "seed": lambda r: r.randrange(2**31),
    "out": lambda r: r.choice(["runs", "/scratch/my runs", "a: b", "#x", "é", " padded "]),
    "model.img_size": lambda r: r.choice([None, 32, 224]),
    "model.options": lambda r: {"a": [1, 2.5, None, "1e-3", "yes", "007"], "b": {"c": 10 ** r.randint(-20, 20)}},
    "data.val": lambda r: r.choice([None, "shards/val"]),
    "data.shuffle": lambda r: r.choice(["window", "full", "none"]),
    "train.epochs": lambda r: r.choice([90, 0.1, 1 / 3, "1000steps", "7e6samples"]),
    "train.stop_after": lambda r: r.choice([None, 1e-7, "3steps"]),
    "train.ema_decay": lambda r: 1 - 10 ** -r.uniform(1, 9),
    "optim.lr": lambda r: 10 ** r.uniform(-12, 3),
    "optim.betas": lambda r: [r.random(), r.random()],
    "optim.eps": lambda r: 10 ** r.uniform(-15, 0),
    "augment.crop": lambda r: r.choice(["none", {"kind": "pad", "padding": 3}, {"scale": [0.1, r.uniform(0.1, 1)]}]),
    "augment.normalize": lambda r: r.choice(["half", "imagenet", {"mean": [r.random()] * 3, "std": [0.1] * 3}]),
    "augment.color_jitter": lambda r: r.choice([None, {}, {"prob": r.random()}]),
    "mix.mixup_alpha": lambda r: r.random(),
}


def test_random_config_is_written_back_and_read_equal(small: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    copy = tmp_path / "copy.yaml"
    for _ in range(60):
        keys = draw.sample(sorted(RANDOM_VALUES), draw.randint(1, len(RANDOM_VALUES)))
        tree = yaml.safe_load(SMALL) | {"name": "x"}
        for key in keys:
            *parents, leaf = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = RANDOM_VALUES[key](draw)
        config = parse_tree(tree, "random")
        copy.write_text(dump_config(config))
        assert load_config(copy) == config
        assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_flatten() -> None:
    tree = {"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": {}, "g": None}
    assert flatten(tree) == {"a.b": 1, "a.c.d": [1, {"e": 2}], "f": {}, "g": None}


def test_files_name_their_schema_for_editors() -> None:
    for path in FILES:
        first = path.read_text().splitlines()[0]
        schema = first.removeprefix("# yaml-language-server: $schema=")
        assert schema != first and (path.parent / schema).resolve() == CONFIGS / "schema.json", path


def test_exported_schema_is_up_to_date() -> None:
    printed = CliRunner().invoke(cli._commands, ["config", "--schema"]).stdout
    assert (CONFIGS / "schema.json").read_text() == printed, "run: rookery config --schema > configs/schema.json"
    assert json.loads(printed) == file_schema()


def test_schema_accepts_the_recipes_and_refuses_typos() -> None:
    try:
        import jsonschema
    except ImportError:
        missing("the exported schema is not tried on the recipes: install jsonschema")
    validator = jsonschema.Draft202012Validator(file_schema())
    validator.check_schema(file_schema())
    for path in FILES:
        assert [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))] == [], path
    refused = ["train: {epoch: 3}", "train: {epochs: soon}", "augment: {crop: rcc}", "augment: {crop: {paddin: 3}}"]
    for text in refused:
        assert not validator.is_valid(yaml.safe_load(text)), text


# --- inheritance and overrides


def test_base_is_merged_key_by_key_over_several_levels(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", root=SMALL + "name: root\nmix: {mixup_alpha: 0.8, prob: 0.5}\n")
    paths = write(tmp_path, middle="base: deep/root.yaml\nname: middle\nmix: {prob: 1.0}\n", top="base: middle.yaml\n")
    config = load_config(paths["top"])
    assert (config.mix.mixup_alpha, config.mix.prob) == (0.8, 1.0)
    # A name belongs to one recipe: two that share it would share a run directory.
    assert config.name == "top" and load_config(paths["middle"]).name == "middle"


def test_section_of_another_kind_starts_anew(tmp_path: Path) -> None:
    base = SMALL + "augment: {crop: {kind: pad, padding: 7}}\n"
    paths = write(tmp_path, base=base, top="base: base.yaml\naugment: {crop: {kind: rrc, scale: [0.5, 1]}}\n")
    assert load_config(paths["top"]).augment.crop.model_dump() == {
        "kind": "rrc", "scale": (0.5, 1.0), "ratio": (3 / 4, 4 / 3), "sampler": "area",
    }  # fmt: skip
    assert load_config(paths["base"], ["augment.crop.fill=reflect"]).augment.crop.model_dump() == {
        "kind": "pad", "padding": 7, "fill": "reflect",
    }  # fmt: skip
    kind, scale = "augment.crop.kind=rrc", "augment.crop.scale=[0.5, 1]"
    for overrides in ([kind, scale], [scale, kind]):
        assert load_config(paths["base"], overrides) == load_config(
            paths["top"], ["name=base", f"tracking.recipe={paths['base']}"]
        )


def test_section_set_to_null_starts_anew(tmp_path: Path) -> None:
    paths = write(
        tmp_path,
        options=SMALL.replace("model:\n", "model:\n  options: {depths: 1, gelu: erf}\n"),
        dropped="base: options.yaml\nmodel: {options: null}\n",
        filled="base: dropped.yaml\nmodel: {options: {stages: 2}}\n",
    )
    assert load_config(paths["dropped"]).model.options == {}
    assert load_config(paths["filled"]).model.options == {"stages": 2}
    overrides = ["model.options=null", "model.options.stages=2", "model.options.pool_dims=2"]
    assert load_config(paths["options"], overrides).model.options == {"stages": 2, "pool_dims": 2}
    assert load_config(paths["options"], ["model.options.gelu=tanh"]).model.options == {"depths": 1, "gelu": "tanh"}
    assert load_config(paths["options"], overrides[:1]).model.options == {}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs=100", "train.epochs", "100ep"),
        ("train.epochs=7steps", "train.epochs", "7steps"),
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("optim.lr=1E2", "optim.lr", 100.0),
        ("optim.betas=[0.8, 0.99]", "optim.betas", [0.8, 0.99]),
        ("data.val=", "data.val", None),
        ("data.val=null", "data.val", None),
        ("data.val=s3://bucket/a=b", "data.val", "s3://bucket/a=b"),
        ("data.val=~/shards", "data.val", str(Path.home() / "shards")),
        ("mix={prob: 0.5, mixup_alpha: 1}", "mix.mixup_alpha", 1.0),
        ("name=007", "name", "007"),
        ("name=1e5", "name", "1e5"),
        ("model.options.patch_size=2", "model.options.patch_size", 2),
        ("model.options.x.y=1e-3", "model.options.x.y", 1e-3),
        ("augment.rand_augment.magnitude=7", "augment.rand_augment.magnitude", 7.0),
        ("augment.crop=center", "augment.crop.kind", "center"),
    ],
)
def test_override(small: Path, override: str, key: str, value: Any) -> None:
    assert flatten(load_config(small, [override]).model_dump(mode="json"))[key] == value


def test_later_override_wins_and_sections_are_merged(small: Path) -> None:
    config = load_config(small, ["mix.prob=0.1", "mix={mixup_alpha: 0.3, prob: 0.2}", "mix.prob=0.4"])
    assert (config.mix.prob, config.mix.mixup_alpha) == (0.4, 0.3)
    assert load_config(DEMO, ["model.options=null"]).model.options == {}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("configs/nest/tiny.yaml", "nest_tiny"),
        ("configs/tiny.yaml", "tiny"),
        ("configs/a/b/tiny.yaml", "tiny"),
        ("mine/my run (2).yaml", "my-run-2-"),
    ],
)
def test_name_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, name: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(SMALL)
    assert load_config(path).name == name
    monkeypatch.chdir(path.parent)
    assert load_config(path.name).name == name
    assert load_config(path, ["name=other"]).name == "other"


# --- mistakes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        # unknown and misplaced keys
        ("epochs=100", "override: unknown key epochs; did you mean train.epochs?"),
        ("train.lr=1", "override: unknown key train.lr; did you mean optim.lr?"),
        ("train.epoch=1", "override: unknown key train.epoch; did you mean train.epochs?"),
        ("batch-size=3", "unknown key batch-size; did you mean eval.batch_size or train.global_batch_size?"),
        ("modle.name=x", "override: unknown key modle; did you mean model?"),
        ("optimizer.lr=1", "unknown key optimizer; did you mean optim?"),
        ("scheduler=cosine", "unknown key scheduler; did you mean optim.schedule?"),
        ("drop_path=0.1", "unknown key drop_path; did you mean model.drop_path_rate?"),
        ("smoothing=0.1", "unknown key smoothing; did you mean mix.label_smoothing?"),
        ("mixup=0.8", "unknown key mixup; did you mean mix or mix.mixup_alpha?"),
        ("wd=0.1", "unknown key wd; did you mean optim.weight_decay?"),
        ("zzzqqq=1", "unknown key zzzqqq; `rookery config` lists every key"),
        ("augment.crop={kind: pad, paddin: 3}", "unknown key augment.crop.paddin; did you mean augment.crop.padding?"),
        ("augment.crop={kind: rrc, padding: 3}", "override: augment.crop.padding: not a key of augment.crop.kind=rrc"),
        ("augment.normalize={mean: [0], std: [1], x: 1}", "override: unknown key augment.normalize.x;"),
        # no override at all
        ("train", "override 'train': write key=value, such as train.epochs=100"),
        ("=5", "override '=5': write key=value"),
        ("train..epochs=5", "override 'train..epochs=5': write key=value"),
        ("data.train=@x", "not valid YAML: found character '@' that cannot start any token; put the text in quotes"),
        ("data.train=[a", "override 'data.train=[a': not valid YAML: expected ',' or ']'"),
        ("data.train={{x}}", "a key must be plain text, without brackets or braces"),
        # sections and values in each other's place
        ("train=5", "override: train=5: train is a section; its keys are epochs, stop_after,"),
        ("model=nest_tiny", "model=nest_tiny: model is a section; did you mean model.name=nest_tiny?"),
        ("mix=null", "mix is empty; leave it out or give it some of its keys: mixup_alpha,"),
        ("augment.crop=[1]", "augment.crop=[1]: augment.crop is a section; its keys are kind, scale, ratio,"),
        ("optim.lr.x=1", 'optim.lr: should be a valid number'),
        # values
        ("optim.lr=abc", "override: optim.lr=abc: should be a valid number"),
        ("train.compile=layer", "override: train.compile=layer: should be true, false or 'layers'"),
        ("train.activation_checkpointing=3.5", "train.activation_checkpointing=3.5: should be true, false or 'maps'"),
        ("optim.lr=.inf", "should be a finite number"),
        ("optim.lr=0", "optim.lr=0: should be greater than 0"),
        ("optim.layer_decay=0", "override: optim.layer_decay=0: should be greater than 0"),
        ("optim.layer_decay=1.01", "override: optim.layer_decay=1.01: should be less than or equal to 1"),
        ("optim.layer_decay=.nan", "optim.layer_decay=NaN: should be a finite number"),
        ("optim.layer_decay=true", "optim.layer_decay=true: should be a number, not a flag"),
        ("layer_decay=0.75", "unknown key layer_decay; did you mean optim.layer_decay or optim.decay?"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: too few values"),
        ("optim.betas=0.9", "override: optim.betas=0.9: should be 2 numbers, such as [0.9, 0.999]"),
        ("augment.normalize={mean: 1, std: [1]}", "augment.normalize.mean=1: should be several numbers, such as [0.5"),
        ("optim.betas=[0.9, 1]", "optim.betas[1]=1: should be less than 1"),
        ("train.precision=bf61", "train.precision=bf61: should be 'fp32', 'bf16' or 'fp16'"),
        ("train.epochs=0", "train.epochs=0: must be longer than 0"),
        ("train.epochs=-3", "train.epochs=-3: no duration; write a number and a unit"),
        ("checkpoint.every=5", "checkpoint.every=5: no duration; write a number and a unit, such as 300ep"),
        ("name=a b", "name=a b: a name has letters, digits, '.', '_' and '-'"),
        ("name=", 'name="": a name has'),
        ("name=-x", "name=-x: a name has"),
        ("augment.crop=rcc", "augment.crop.kind=rcc: should be one of 'rrc', 'pad', 'center', 'none'"),
        ("augment.crop={scale: [2, 1]}", "override: augment.crop: scale must be [low, high] with low <= high"),
        ("augment.normalize=imagnet", "augment.normalize=imagnet: should be 'imagenet', 'cifar10', 'cifar100' or"),
        ("augment.normalize={mean: [0.5]}", "augment.normalize.std is missing; add it to the config or pass"),
        ("model.options={num_classes: 3}", "num_classes is a key of its own: set model.num_classes instead"),
        ("model.options={1: 2}", "the key 1 is no text in YAML; put it in quotes"),
        ("data.train=", "data.train is empty (null): should be a valid string"),
        ("train.epochs=", "override: train.epochs is empty (null): no duration; write a number and a unit, such as"),
        # conflicts
        ("data.lanes=5", "data.lanes=5 does not divide train.global_batch_size=64; set data.lanes to a divisor of 64"),
        ("eval.weights=ema", "eval.weights=ema needs an average to evaluate: set train.ema_decay"),
        ("optim.schedule.min_lr=1", "optim.schedule.min_lr=1 is above the peak learning rate 0.001; lower it"),
        ("optim.schedule.warmup_lr=1", "optim.schedule.warmup_lr=1 is above the peak learning rate 0.001; lower it"),
        ("optim.schedule.by=sample", "optim.schedule.by=sample: should be 'step' or 'epoch'"),
        ("optim.schedule.delay=1", "optim.schedule.delay=1: no duration; write a number and a unit, such as 300ep"),
        ("model.init_head=new", "model.init_head=new goes with weights to start from: set model.init, or leave"),
        ("engine.offload_optimizer=true", "engine.offload_optimizer=true goes with engine.name=deepspeed and"),
        ("model.in_chans=1", "augment.normalize has 3 channels but the model takes 1: set augment.normalize to half"),
    ],
)  # fmt: skip
def test_mistake_in_one_line(small: Path, override: str, said: str) -> None:
    message = mistake(small, override)
    assert said in message
    # YAML's own messages show the place below; all others are one line that starts with where the mistake stands.
    assert "not valid YAML" in message or "\n" not in message
    assert message.startswith(("override", str(small)))


@pytest.mark.parametrize("override", ["optim={lr: fast}", "optim.lr=fast", "augment={affine: {degrees: fast}}"])
def test_a_mistake_in_an_override_is_not_the_files(override: str) -> None:
    assert mistake(DEMO, override).startswith("override: ")


def test_mistakes_come_all_at_once_with_their_places(tmp_path: Path) -> None:
    base = SMALL + "tracking:\n  # a comment\n  mlflwo: false\n"
    paths = write(tmp_path, base=base, top="base: base.yaml\nseed: -1\noptim:\n  lr: fast\n")
    assert mistake(paths["top"], "eval.every=3", "mix={prob: 2}").splitlines() == [
        f"{paths['top']}: 5 mistakes",
        f"  {paths['top']}:2: seed=-1: should be greater than or equal to 0",
        "  override: mix.prob=2: should be less than or equal to 1",
        f"  {paths['top']}:4: optim.lr=fast: should be a valid number, unable to parse string as a number",
        "  override: eval.every=3: no duration; write a number and a unit, such as 300ep, 1000steps or 50000samples",
        f"  {paths['base']}:12: unknown key tracking.mlflwo; did you mean tracking.mlflow?",
    ]
    assert mistake(paths["base"], "tracking={mlflow: true}", "data.lanes=7", "eval.weights=ema").count("\n") == 0
    lines = mistake(write(tmp_path, ok=SMALL)["ok"], "data.lanes=7", "eval.weights=ema").splitlines()
    assert len(lines) == 3 and "data.lanes=7" in lines[1] and "eval.weights=ema" in lines[2]


def test_missing_keys_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path, empty="train: {epochs: 3}\n")["empty"]
    assert mistake(path).splitlines() == [
        f"{path}: 4 mistakes",
        f"  {path}: model is missing; it needs model.name",
        f"  {path}: data is missing; it needs data.train",
        f"  {path}:1: train.global_batch_size is missing; add it to the config or pass train.global_batch_size=VALUE",
        f"  {path}: optim is missing; it needs optim.lr",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  epochs: 1\n  epochs: 2\n", ":3: train.epochs stands twice, first on line 2; keep one"),
        ("a: 1\n'a': 2\n", ":2: a stands twice, first on line 1"),
        ("a: {b: 1, c: 2, b: 3}\n", ":1: a.b stands twice, first on line 1"),
        ("seed: 1\ntrain: epochs: 3\n", ":2: not valid YAML: mapping values are not allowed here"),
        ("train:\n\tepochs: 3\n", ":2: not valid YAML: found character '\\t' that cannot start any token; indent with"),
        ("a: [1, 2\nb: 3\n", ":2: not valid YAML: expected ',' or ']'"),
        ("a: *nowhere\n", ":1: not valid YAML: found undefined alias"),
        ("a: !!python/object:os.system {}\n", ":1: not valid YAML: could not determine a constructor"),
        ("a: \x07\n", ": not valid YAML: "),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML: but found another document"),
        ("name: {{name}}\n", ":1: a key must be plain text"),
        ("? [a, b]\n: 1\n", ":1: a key must be plain text"),
        ("a: &a\n  b: *a\n", ":2: nested too deep"),
        ("- a\n- b\n", ": a config is a mapping of keys to values, this file holds list"),
        ("", ": a config is a mapping of keys to values, this file holds NoneType"),
        ("base: [a.yaml]\n", ":1: `base:` must be the path of one YAML file"),
        ("base: gone.yaml\n", "gone.yaml: no such config (named as `base:` in "),
        ("base: bad.yaml\n", "bad.yaml: `base:` leads back to itself (bad.yaml)"),
        (SMALL + "on: 1\n", ":10: the key on is no text in YAML; put it in quotes"),
        (SMALL + "mix:\n", ":10: mix is empty; leave it out or give it some of its keys"),
        (SMALL + "name: yes\n", ":10: name=true: should be a valid string"),
        (SMALL + "seed: yes\n", ":10: seed=true: should be a number, not a flag"),
        (SMALL + "checkpoint: {part_mb: true}\n", ":10: checkpoint.part_mb=true: should be a number, not a flag"),
        (SMALL + "mix: {mixup_alpha: off}\n", ":10: mix.mixup_alpha=false: should be a number, not a flag"),
        (SMALL + "augment: {affine: {scale: [0.9, on]}}\n", ":10: augment.affine.scale[1]=true: should be a number"),
    ],
)  # fmt: skip
def test_bad_file(tmp_path: Path, text: str, said: str) -> None:
    message = mistake(write(tmp_path, bad=text)["bad"])
    assert str(tmp_path) in message and said in message


def test_yaml_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = SMALL + "mix: &mix {prob: 0.5, mixup_alpha: 1}\nmodel: {name: x, options: {<<: *mix, prob: 1}}\n"
    config = load_config(write(tmp_path, a=text.replace("model:\n  name: nest_tiny\n", ""))["a"])
    assert config.model.options == {"prob": 1, "mixup_alpha": 1}


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert "did you mean " + str(CONFIGS / "nest/tiny_cifar10.yaml") in mistake(CONFIGS / "tiny_cifar10.yaml")
    assert "no such config; did you mean " + str(DEMO) in mistake(CONFIGS / "dmo.yaml")
    assert mistake(tmp_path / "x" / "y.yaml") == f"{tmp_path}/x/y.yaml: no such config"
    assert mistake(Path("train.epochs=3"), "demo.yaml") == (
        "train.epochs=3: no such config; the recipe comes first, then key=value"
    )
    assert mistake(CONFIGS) == f"{CONFIGS}: a folder; name one of the recipes in it: demo.yaml"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "can't read this config" in mistake(tmp_path / "binary.yaml")


# --- the command


def test_command_prints_what_a_recipe_becomes(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli._commands, ["config", str(DEMO), "train.epochs=3"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(result.stdout)
    assert load_config(copy) == load_config(DEMO, ["train.epochs=3"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.name=nest_tny", "unknown model 'nest_tny', did you mean"),
        ("model.options={depth: 3}", "model.options=null before your own"),
        ("model.img_size=30", "30"),
    ],
)
def test_command_looks_at_the_model_and_not_at_the_data(override: str, said: str) -> None:
    fine = CliRunner().invoke(cli._commands, ["config", str(DEMO), "data.train=nowhere"])
    assert fine.exit_code == 0
    wrong = CliRunner().invoke(cli._commands, ["config", str(DEMO), "data.train=nowhere", override])
    assert isinstance(wrong.exception, UserError) and said in str(wrong.exception)
    assert not wrong.stdout


@pytest.mark.parametrize(
    ("model", "overrides", "said"),
    [
        ("options: {depths: 3, depth: 4}", [], "{recipe}:2: model: model 'nest_tiny' has no option 'depth', did you"),
        ("options:\n    gelu: 7", [], "{recipe}:3: model: gelu=7 is not one of"),
        ("options: {gelu: erf}", ["model.options.gelu=x"], "override: model: gelu='x' is not one of"),
        ("options: {gelu: erf}\n  name: nest_tny", [], "{recipe}:3: model: unknown model 'nest_tny'"),
        ("options: {gelu: erf}\n  img_size: 30", [], "{recipe}:3: model: "),
        (
            "options:\n    refine:\n      kernel: 3\n      kernl: 5",
            [],
            "{recipe}:5: model: refine has no option 'kernl'",
        ),
    ],
)
def test_a_mistake_that_a_model_finds_has_its_place(
    model: str, overrides: list[str], said: str, tmp_path: Path
) -> None:
    recipe = write(tmp_path, recipe=f"model:\n  {model}\nbase: small.yaml\n", small=SMALL)["recipe"]
    wrong = CliRunner().invoke(cli._commands, ["config", str(recipe), *overrides])
    assert isinstance(wrong.exception, UserError) and str(wrong.exception).startswith(said.format(recipe=recipe))


def test_command_lists_every_key_with_its_default() -> None:
    lines = CliRunner().invoke(cli._commands, ["config"]).stdout.splitlines()
    listed = {line.split()[0]: line for line in lines if line}
    assert listed.keys() == {key for key, _ in config_keys()}
    assert listed["train.precision"].split(maxsplit=2)[1:] == [
        "bf16", "fp32 | bf16 | fp16; autocast type; weights stay fp32",
    ]  # fmt: skip
    assert listed["checkpoint.every"].split()[1] == str(Duration(1, "ep"))
    assert listed["optim.lr"].split()[1] == "required"
