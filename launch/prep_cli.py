"""`rookery prep` and `rookery verify`."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from data_prep.errors import UserError
from data_prep.manifest import Manifest
from data_prep.options import PrepOptions
from data_prep.prepare import describe_quarantine, prepare_splits
from data_prep.progress import SilentProgress, make_progress
from data_prep.store import Store, open_store
from data_prep.verify import split_directories
from data_prep.verify import verify as verify_directory
from data_prep.wording import counted
from launch.quarantine_cli import replay_quarantine
from pipeline.streams import drop_unprintable

INTERRUPTED = 130


def prep(
    source: Annotated[
        str,
        typer.Argument(
            help="Class folders, ILSVRC2012 tar, Hugging Face parquet, CIFAR archive, or the word `digits`."
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(help="Folder for the shards, or s3://..., gs://...; every split gets its own folder in it."),
    ],
    split: Annotated[
        list[str] | None,
        typer.Option(help="Split to prepare; repeat it for several. Default: every split of the source."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes. Default: every core this process may use.")
    ] = None,
    shard_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples per shard at most, instead of --shard-mb.")
    ] = None,
    shard_mb: Annotated[
        int,
        typer.Option(
            min=1, help="Source megabytes per shard, about; a small set still gets 16 shards if they hold 64 samples."
        ),
    ] = 128,
    shuffle: Annotated[
        bool | None,
        typer.Option("--shuffle/--no-shuffle", help="Shuffle the whole split. Default: only splits named train*."),
    ] = None,
    shuffle_seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffle.")] = 0,
    resize: Annotated[
        int | None,
        typer.Option(
            min=1, help="Shrink images to this short side (bicubic, antialiased). Default: keep original bytes."
        ),
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality where an image is encoded again.")] = 90,
    restart_markers: Annotated[
        bool,
        typer.Option(
            "--restart-markers",
            help="Add restart markers to JPEGs: same pixels, crops decode a little faster; --resize adds them anyway.",
        ),
    ] = False,
    max_resolution: Annotated[
        int | None, typer.Option(min=1, help="With ffcv: shrink images to this long side.")
    ] = None,
    write_mode: Annotated[
        str | None,
        typer.Option(
            help="With ffcv: jpg (default), raw, proportion (JPEG by --compress-probability, else raw) or smart (JPEG "
            "above --smart-threshold, else raw)."
        ),
    ] = None,
    compress_probability: Annotated[
        float | None, typer.Option(help="With --write-mode proportion: share of JPEGs. Default: 0.5.")
    ] = None,
    smart_threshold: Annotated[
        int | None,
        typer.Option(min=1, help="With --write-mode smart: bytes of pixels. Default: 786432 (512 x 512 pixels)."),
    ] = None,
    token_labels: Annotated[
        Path | None,
        typer.Option(help="Folder of dense label maps, <class>/<image>.pt, to store beside the training images."),
    ] = None,
    max_bad: Annotated[
        int | None,
        typer.Option(min=0, help="Bad images tolerated (they are dropped). Default: 0.1 % of the split, at least 10."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Kind of source: folder, ilsvrc, parquet, cifar or digits. Default: found out.")
    ] = None,
    devkit: Annotated[
        Path | None, typer.Option(help="ILSVRC2012_devkit_t12.tar.gz or its folder, with the labels of the val tar.")
    ] = None,
    coarse_labels: Annotated[bool, typer.Option("--coarse-labels", help="CIFAR-100: its 20 coarse classes.")] = False,
    image_column: Annotated[str | None, typer.Option(help="Parquet: the image column. Default: found out.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Parquet: the label column. Default: found out.")] = None,
    format: Annotated[str, typer.Option(help="Format of the shards: webdataset or ffcv.")] = "webdataset",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace shards made with other options or from another source.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Hash the finished shards and make the damaged ones again.")
    ] = False,
) -> None:
    """Turn raw images into shards, an index beside each, and a manifest.

    Killed at any moment, the same command finishes the work with the same bytes. Exit status: 0 done (tolerated bad
    images are listed), 2 wrong input, full disk or too many bad images.
    """
    if not source or not out:
        # Most likely an unset shell variable; the empty path would mean the working directory.
        raise UserError(f"{'SOURCE' if not source else 'OUT'} is empty; name a path (`.` for the working directory)")
    drop_unprintable()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's SIGTERM ends it as Ctrl-C does
    options = PrepOptions(
        kind=kind,
        devkit=devkit,
        coarse_labels=coarse_labels,
        image_column=image_column,
        label_column=label_column,
        format=format,
        shard_samples=shard_samples,
        shard_mb=shard_mb,
        shuffle=shuffle,
        shuffle_seed=shuffle_seed,
        resize=resize,
        quality=quality,
        restart_markers=restart_markers,
        max_resolution=max_resolution,
        write_mode=write_mode,
        compress_probability=compress_probability,
        smart_threshold=smart_threshold,
        token_labels=token_labels,
        max_bad=max_bad,
        workers=workers,
        overwrite=overwrite,
        repair=repair,
    )
    start = time.monotonic()
    try:
        manifests = prepare_splits(source, out, options, split or (), make_progress())
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command continues", err=True)
        raise typer.Exit(INTERRUPTED) from None
    for manifest in manifests.values():
        typer.echo(_summary(manifest, open_store(out)))
    typer.echo(f"{time.monotonic() - start:.1f} s")


def verify(
    directory: Annotated[
        str | None,
        typer.Argument(help="A split's folder, or the folder that holds the splits; also s3://..., https://..."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads. Default: one per usable core.")] = None,
    quarantine: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Instead try the bad samples again that this run met (DIRECTORY: if its shards moved)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check shards and indexes against their manifest: hashes, sizes, and every index row against its shard.

    Exit status: 0 everything is as it was made, 1 something is wrong (listed, with how to mend it), 2 wrong input.
    """
    if quarantine is not None:
        replay_quarantine(quarantine, directory, as_json)
        return
    if directory is None:
        raise UserError("name a folder with shards, or a run with --quarantine")
    progress = SilentProgress() if as_json and not sys.stderr.isatty() else make_progress()
    splits = split_directories(directory)
    problems = verify_directory(directory, workers, progress)
    if as_json:
        content = {"ok": not problems, "splits": [split.name for split in splits], "problems": [*map(asdict, problems)]}
        typer.echo(json.dumps(content, indent=1))
    else:
        for problem in problems:
            typer.echo(f"{problem.split}/{problem.file}: {problem.what}\n    {problem.mend}")
        wrong = counted(len(problems), "problem") if problems else "everything is as it was made"
        typer.echo(f"{', '.join(Path(split.name).name for split in splits)}: {wrong}")
    if problems:
        raise typer.Exit(1)


def _summary(manifest: Manifest, out: Store) -> str:
    size = sum(shard.bytes for shard in manifest.shards)
    line = (
        f"{out.at(manifest.split)}: {counted(manifest.num_samples, 'sample')}, "
        f"{counted(manifest.num_classes, 'class')}, {counted(len(manifest.shards), 'shard')}, {size / 1e6:,.1f} MB, "
        f"fingerprint {manifest.fingerprint()[:12]}"
    )
    if not manifest.quarantine:
        return line
    bad = counted(len(manifest.quarantine), "image")
    return f"{line}\n{bad} dropped or repaired:\n{describe_quarantine(manifest.quarantine)}"
