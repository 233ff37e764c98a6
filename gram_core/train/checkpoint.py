"""Checkpoints of a run in progress: all that makes a killed run go on as if it had not been.

A checkpoint is a folder `step-NNNNNNN` with the engine's files, the averaged weights, the slots
of every worker and `meta.json` (iteration, history, fingerprint of the run). It is written beside
and moved into place by one rename, so a folder of that name is whole. Random numbers need no
state: noise and order are functions of the iteration. Tensors are safetensors; nothing is
unpickled here.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gram_core.errors import GramError
from gram_core.train.ema import EMA
from gram_core.train.engine import Engine
from gram_core.train.slots import Slots

VERSION = 1
# What reading a damaged file raises, by the part that is damaged.
DAMAGE = (OSError, SafetensorError, ValueError, KeyError, IndexError, RuntimeError, TypeError)


class CheckpointError(GramError):
    """A checkpoint that cannot be used; one line, naming the folder."""


@dataclass
class Progress:
    """How far a run has come: optimiser steps done, and the logged rows so far."""

    iteration: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run under `folder`; `fingerprint` identifies its settings and data,
    so that a checkpoint of other settings is never resumed."""

    folder: Path
    fingerprint: str

    def save(self, engine: Engine, slots: Slots, ema: EMA, progress: Progress) -> None:
        """Write a checkpoint, then remove the ones before it. Every worker calls this.

        Raises `CheckpointError` where the disk is full or not writable; what was there stays.
        """
        final = self.folder / f"step-{progress.iteration:07d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            if engine.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            engine.barrier()
            save_file(slots.state_dict(), partial / f"slots-{engine.rank}.safetensors")
            engine.save(partial)
            if engine.rank == 0:
                self._write_common(partial, engine, ema, progress)
            engine.barrier()
            if engine.rank == 0:
                # Folders of other settings may lie here too, even under the same name.
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                for old in self._all():
                    if old != final:
                        shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"{final}: checkpoint not written: {error}") from None

    def _write_common(self, folder: Path, engine: Engine, ema: EMA, progress: Progress) -> None:
        average = {str(i): t for i, t in enumerate(ema.average)}
        save_file({**average, "steps": torch.tensor(ema.steps)}, folder / "ema.safetensors")
        meta = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "world": engine.world,
            **vars(progress),
        }
        with (folder / "meta.json").open("w") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())

    def resume(self, engine: Engine, slots: Slots, ema: EMA) -> Progress:
        """Load the newest checkpoint of this run into the given parts; a fresh `Progress` where
        there is none, or only one of other settings or data.

        Raises `CheckpointError` where the newest is damaged or was made by another number of
        workers.
        """
        folders = self._all()
        if not folders:
            return Progress()
        newest = folders[-1]
        try:
            meta = json.loads((newest / "meta.json").read_bytes())
            if meta["version"] != VERSION or meta["fingerprint"] != self.fingerprint:
                return Progress()
            if meta["world"] != engine.world:
                raise CheckpointError(
                    f"{newest}: made by {meta['world']} workers, this run has {engine.world}; "
                    "use that number, or delete the checkpoint to start again"
                )
            engine.load(newest)
            slots.load_state_dict(load_file(newest / f"slots-{engine.rank}.safetensors"))
            average = load_file(newest / "ema.safetensors")
            ema.steps = int(average.pop("steps"))
            for index, value in average.items():
                ema.average[int(index)].copy_(value)
            return Progress(meta["iteration"], meta["history"])
        except CheckpointError:
            raise
        except DAMAGE as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{newest}: damaged checkpoint ({reason}); delete the folder to start again"
            ) from None

    def clear(self) -> None:
        """Remove all checkpoints, once the run's results are in place."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []
