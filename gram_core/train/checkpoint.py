"""Checkpoints of a run in progress: all that makes a killed run go on as if it had not been.

A checkpoint is a few named files: weights, optimiser, averaged weights, the slots of the whole run
and `meta.json` (iteration, history, fingerprint of the run, checksums of all files). None of them
says how many workers made it, so any number of workers can go on from it. Random numbers need no
state: noise and order are functions of the iteration. Tensors are safetensors; nothing is unpickled
here. Where the files lie is a store's affair.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gram_core.errors import GramError
from gram_core.train.ema import EMA
from gram_core.train.engine import Engine, state_with
from gram_core.train.slots import Slots

VERSION = 3
META = "meta.json"
# What reading a damaged file raises, by the part that is damaged.
DAMAGE = (OSError, SafetensorError, ValueError, KeyError, IndexError, RuntimeError, TypeError)


class CheckpointError(GramError):
    """A checkpoint that cannot be used; one line, naming the folder."""


@dataclass
class Progress:
    """How far a run has come: optimiser steps done, the logged rows so far, and what the workers
    computed on."""

    iteration: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    workers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """The files of one checkpoint, and where they are."""

    where: str
    files: Mapping[str, bytes]


class Store(Protocol):
    """Where the checkpoints of one run lie."""

    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        """Keep a checkpoint whole or not at all, then drop the ones before it. Raises
        `CheckpointError`."""

    def newest(self) -> Found | None:
        """The newest whole checkpoint. Raises `CheckpointError`."""

    def clear(self) -> None:
        """Remove all checkpoints, once the run's results are in place."""


@dataclass(frozen=True)
class FolderStore:
    """Checkpoints as folders in a folder on this machine. One is written beside and moved into
    place by one rename, so a folder of its name is whole."""

    folder: Path

    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        final, partial = self.folder / name, self.folder / f".{name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for file, content in files.items():
                with (partial / file).open("wb") as out:
                    out.write(content)
                    out.flush()
                    os.fsync(out.fileno())
            # Folders of other settings may lie here too, even under the same name.
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self._all():
                if old != final:
                    shutil.rmtree(old)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"{final}: checkpoint not written: {error}") from None

    def newest(self) -> Found | None:
        folders = self._all()
        if not folders:
            return None
        try:
            return Found(
                str(folders[-1]), {path.name: path.read_bytes() for path in folders[-1].iterdir()}
            )
        except OSError as error:
            raise damaged(str(folders[-1]), error) from None

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []


def damaged(where: str, error: Exception) -> CheckpointError:
    """The one line for a checkpoint that cannot be read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{where}: damaged checkpoint ({reason}); delete the folder to start again"
    )


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in `store`; `fingerprint` identifies its settings and data, so
    that a checkpoint of other settings is never resumed. `workers` say what they compute on: a run
    that others began was made by those and these."""

    store: Store
    fingerprint: str
    workers: Sequence[dict[str, Any]] = ()

    def save(self, engine: Engine, slots: Slots, ema: EMA, progress: Progress) -> None:
        """Write a checkpoint. Every worker calls this; the first one writes.

        Raises `CheckpointError` where the disk is full or not writable; what was there stays.
        """
        parts = {
            "weights": state_with(engine.model, engine.whole(engine.held())),
            "optimizer": engine.moments(),
            "ema": {
                **{str(i): t for i, t in enumerate(engine.whole(ema.average))},
                "steps": torch.tensor(ema.steps),
            },
            "slots": slots.state_dict(),
        }
        if engine.rank == 0:
            files = {f"{name}.safetensors": save(_plain(part)) for name, part in parts.items()}
            meta = {
                "version": VERSION,
                "fingerprint": self.fingerprint,
                "sha256": {name: _checksum(content) for name, content in files.items()},
                **vars(progress),
            }
            files[META] = json.dumps({**meta, "own": _checksum(_bytes(meta))}).encode()
            self.store.write(f"step-{progress.iteration:07d}", files)
        engine.barrier()

    def resume(self, engine: Engine, slots: Slots, ema: EMA) -> Progress:
        """Load the newest checkpoint of this run into the given parts; a fresh `Progress` where
        there is none, or only one of other settings or data. Every worker calls this.

        Raises `CheckpointError` where the newest is damaged.
        """
        found = self.store.newest()
        fresh = Progress(workers=list(self.workers))
        if found is None:
            return fresh
        try:
            meta = dict(json.loads(found.files[META]))
            if meta["version"] == VERSION and meta.pop("own") != _checksum(_bytes(meta)):
                raise ValueError(f"{META} does not match its checksum")
            if meta["version"] != VERSION or meta["fingerprint"] != self.fingerprint:
                return fresh
            tensors = {}
            for name, checksum in meta["sha256"].items():
                if _checksum(found.files[name]) != checksum:
                    raise ValueError(f"{name} does not match its checksum")
                tensors[name] = load(found.files[name])
            engine.load(tensors["weights.safetensors"], tensors["optimizer.safetensors"])
            slots.load_state_dict(tensors["slots.safetensors"])
            average = tensors["ema.safetensors"]
            ema.steps = int(average.pop("steps"))
            whole = [average[str(index)] for index in range(len(average))]
            for mine, saved in zip(ema.average, engine.shares(whole), strict=True):
                mine.copy_(saved)
            before = meta.get("workers", [])
            others = [worker for worker in self.workers if worker not in before]
            return Progress(meta["iteration"], meta["history"], [*before, *others])
        except torch.OutOfMemoryError:
            raise
        except DAMAGE as error:
            raise damaged(found.where, error) from None


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _bytes(meta: Mapping[str, Any]) -> bytes:
    """What the checksum of `meta.json` itself is over."""
    return json.dumps(meta, sort_keys=True).encode()


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
