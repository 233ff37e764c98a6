"""A trained model on disk: `model.safetensors` beside `config.json`.

Nothing is unpickled. Both files are replaced whole; `config.json` goes last and names the weights'
checksum, so a pair that does not belong together is noticed.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from gram_core.config import ConfigError, dump, load
from gram_core.errors import GramError
from gram_core.files import write_atomic
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.shape import TokenShape

VERSION = 1


class ModelError(GramError):
    """A saved model that is missing, damaged or of another version; one line, naming the file."""


def save_model(folder: Path, model: GRAM, about: Mapping[str, Any]) -> None:
    """Write weights and configuration; `about` (task, run, provenance) is kept beside them."""
    weights = save_tensors({name: t.contiguous() for name, t in model.state_dict().items()})
    write_atomic(folder / "model.safetensors", weights)
    document = {
        "version": VERSION,
        "model": dump(model.config),
        "shape": vars(model.shape),
        "sha256": hashlib.sha256(weights).hexdigest(),
        **about,
    }
    write_atomic(folder / "config.json", (json.dumps(document, indent=2) + "\n").encode())


def load_model(folder: Path, device: torch.device | None = None) -> tuple[GRAM, dict[str, Any]]:
    """The model in evaluation mode, and the whole of its `config.json`.

    Raises `ModelError` for missing or damaged files or weights of another configuration.
    """
    about = _read_config(folder / "config.json")
    path = folder / "model.safetensors"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ModelError(f"{path}: does not match the checksum in config.json; train the run again")
    try:
        model = GRAM(
            load(ModelConfig, about["model"], f"{folder / 'config.json'}: model"),
            TokenShape.of(about["shape"]),
        )
        model.load_state_dict(load_tensors(content))
    except (ConfigError, SafetensorError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: not weights of this configuration ({reason})") from None
    return model.to(device or torch.device("cpu")).eval(), about


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path}: no such model; run its training stage (dvc repro)")
    try:
        about = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None
    wanted = {"version", "model", "shape", "sha256"}
    if not isinstance(about, dict) or not wanted <= set(about):
        raise ModelError(f"{path}: not a model's configuration; it needs {sorted(wanted)}")
    if about["version"] != VERSION:
        raise ModelError(f"{path}: version {about['version']!r}, this program reads {VERSION}")
    return about
