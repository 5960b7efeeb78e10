"""The stage runner: a source becomes shards, an index beside each, and a manifest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.build import WRITERS, ShardBuilder, ShardTask
from data_prep.cores import usable_cores
from data_prep.errors import UserError
from data_prep.manifest import MANIFEST_NAME, BadImage, Manifest
from data_prep.options import PrepOptions
from data_prep.plan import Plan, make_plan
from data_prep.progress import Progress, SilentProgress
from data_prep.sources import open_source
from data_prep.sources.base import Listing, Source
from data_prep.sources.folder import FolderSource
from data_prep.state import Record, SplitState
from data_prep.store import Store, is_remote, local_path, open_store
from data_prep.token_labels import TokenMaps, open_token_maps
from data_prep.wording import counted, printable
from data_prep.workers import build_shards

SHOWN = 20
SHOWN_CLASSES = 5


def prepare(
    source: str | Path,
    out: str | Path,
    options: PrepOptions | None = None,
    split: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Prepare one split of `source` into `out/<split>`; `split` may be left out where the source has only one.

    Raises:
        UserError: see `prepare_splits`.
    """
    opened = open_source(source, options)
    if split is None and len(opened.splits()) > 1:
        raise UserError(f"{source}: it has the splits {', '.join(opened.splits())}; choose one of them")
    [manifest] = prepare_splits(opened, out, options, [split] if split else [], progress).values()
    return manifest


def prepare_splits(
    source: str | Path | Source,
    out: str | Path,
    options: PrepOptions | None = None,
    splits: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Manifest]:
    """Prepare these splits of `source` (all that it offers, if none are named) into `out/<split>`.

    Shards are a pure function of the source and of `options.content()`. Killed at any moment and called again, it makes
    the missing shards only; called on finished directories it changes nothing.

    Raises:
        UserError: the source can't be read; `out` can't be written, holds something else, or is being written by
            another preparation; or more images are bad than tolerated (no manifest is written then).
    """
    options = options or PrepOptions()
    progress = progress or SilentProgress()
    if options.format not in WRITERS:
        raise UserError(f"--format {options.format}: no such format; there are {' and '.join(WRITERS)}")
    opened = open_source(source, options) if isinstance(source, str | Path) else source
    if (
        opened.kind == FolderSource.kind
        and not is_remote(out)
        and local_path(out).resolve().is_relative_to(opened.path.resolve())
    ):
        raise UserError(f"{out}: lies inside the class folders of {opened.path}; choose an OUT outside")
    chosen = list(splits or opened.splits())
    if options.token_labels is not None and not any(map(options.maps_of, chosen)):
        raise UserError(
            f"--token-labels: label maps are for splits named train*, and there is none in {', '.join(chosen)}; "
            "leave it out, or name the split with --split"
        )
    jobs = {}
    for split in chosen:  # all of them are listed before any work: a bad one shows at once
        listing = _list(opened, split, progress)
        _tell_doubts(listing, split, progress)
        directory = options.maps_of(split)
        maps = None if directory is None else open_token_maps(directory, listing)
        plan = make_plan(listing, opened.kind, opened.name, split, options, maps)
        jobs[split] = _SplitJob(split, listing, plan, maps, SplitState(open_store(out).below(split)), options, progress)
    return {split: job.run() for split, job in jobs.items()}


def _list(source: Source, split: str, progress: Progress) -> Listing:
    offered = source.splits()
    if split not in offered and not source.unnamed:
        raise UserError(f"{source.name}: no split {split!r} in it; it has {', '.join(offered)}")
    if not split or split.startswith(".") or os.sep in split:
        raise UserError(
            f"--split {split!r}: it names a folder below OUT, so it can't hold {os.sep} or start with a dot"
        )
    progress.say(f"{split}: listing {source.name} ({source.kind})")
    listing = source.listing(split if split in offered else offered[0])
    if not len(listing):
        raise UserError(f"{source.name}: no images in the split {split}; are its class folders empty?")
    return listing


def _tell_doubts(listing: Listing, split: str, progress: Progress) -> None:
    """Name what the source has doubts about, and classes without an image: a slip of the pen in one split makes one."""
    for doubt in listing.doubts:
        progress.say(f"{split}: warning: {doubt}")
    counts = np.bincount(listing.labels, minlength=len(listing.classes)).tolist()
    empty = [printable(name) for name, count in zip(listing.classes, counts, strict=True) if not count]
    if empty:
        named = ", ".join(empty[:SHOWN_CLASSES])
        more = f" and {len(empty) - SHOWN_CLASSES:,} more" if len(empty) > SHOWN_CLASSES else ""
        progress.say(
            f"{split}: warning: no images of {counted(len(empty), 'class')}: {named}{more}; "
            "if that is not meant, mend the source"
        )


@dataclass(frozen=True)
class _SplitJob:
    """The preparation of one split."""

    split: str
    listing: Listing
    plan: Plan
    maps: TokenMaps | None
    state: SplitState
    options: PrepOptions
    progress: Progress

    def run(self) -> Manifest:
        """Make what is missing, and the manifest if it is not what the shards say."""
        with self.state.locked() as exclusive, self.state.writing():
            if not exclusive:
                self._say("this file system has no locks; let no other prep write here meanwhile")
            files = self._files()
            records = self.state.begin(self.plan, files, self.options.overwrite, self.options.repair)
            current = _current_manifest(self.state.store)
            missing = [number for number, file in enumerate(files) if file not in records]
            if missing:
                self._build(missing, records)
            manifest = self._manifest([records[file] for file in files])
            if manifest == current:
                done = "mended" if missing else "complete already, nothing to do"
                self._say(
                    f"{done} ({counted(manifest.num_samples, 'sample')} in {counted(len(manifest.shards), 'shard')})"
                )
                return manifest
            self._check_bad(manifest)
            self.state.check_still_ours(self.plan)
            manifest.save(self.state.store)
            return manifest

    def _say(self, text: str) -> None:
        self.progress.say(f"{self.split}: {text}")

    def _files(self) -> list[str]:
        suffix = WRITERS[self.options.format].suffix
        return [f"{self.split}-{number:06d}{suffix}" for number in range(len(self.plan.shards))]

    def _build(self, missing: list[int], records: dict[str, Record]) -> None:
        """Build the missing shards and add their records to `records`."""
        options, files, images = self.options, self._files(), len(self.listing)
        finished = f", {len(records):,} of them finished" if records else ""
        classes = counted(len(self.listing.classes), "class")
        self._say(f"{counted(images, 'image')}, {classes}, {counted(len(files), 'shard')}{finished}")
        builder = ShardBuilder(
            self.state,
            self.plan.fingerprint,
            self.listing.reader,
            options,
            self.maps,
        )

        def task_of(number: int) -> ShardTask:
            return ShardTask(files[number], self.listing.items(self.plan.shards[number]))

        def keep(record: Record) -> None:
            records[record.shard.file] = record

        left = sum(len(self.plan.shards[number]) for number in missing)
        try:
            with self.progress.task(self.split, images, images - left) as advance:
                build_shards(builder, missing, task_of, options.workers or usable_cores(), advance, keep)
        finally:
            self.state.empty_scratch()

    def _manifest(self, records: list[Record]) -> Manifest:
        return Manifest(
            format=self.options.format,
            split=self.split,
            classes=self.listing.classes,
            shards=[record.shard for record in records if record.shard.samples],
            options=self.plan.description["options"],
            source=self.plan.description["source"],
            quarantine=[*self.listing.rejected, *(bad for record in records for bad in record.quarantine)],
        )

    def _check_bad(self, manifest: Manifest) -> None:
        images = len(self.listing)
        bad = [image for image in manifest.quarantine if image.action == "dropped"]
        tolerated = self.options.tolerated(images)
        if len(bad) <= tolerated and manifest.shards:
            return
        self.state.store.remove(MANIFEST_NAME)
        listed = describe_quarantine(bad)
        if not manifest.shards:
            raise UserError(f"{self.split}: none of the images is usable ({counted(images, 'image')})\n{listed}")
        raise UserError(
            f"{self.split}: {len(bad):,} of {counted(images, 'image')} bad, {tolerated:,} tolerated\n{listed}\n"
            f"mend the source, or leave them out: the same command with --max-bad {len(bad)} (no shard is made again)"
        )


def _current_manifest(store: Store) -> Manifest | None:
    try:
        return Manifest.load(store)
    except UserError:
        return None  # missing or damaged: the records know better


def describe_quarantine(bad: Sequence[BadImage]) -> str:
    """The first images of a quarantine list, one per line."""
    lines = [f"  {printable(f'{image.source}: {image.reason} ({image.action})')}" for image in bad[:SHOWN]]
    return "\n".join(lines + ([f"  ... and {len(bad) - SHOWN:,} more"] if len(bad) > SHOWN else []))
