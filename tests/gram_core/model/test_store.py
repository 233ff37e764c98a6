import hashlib
import json

import pytest
import torch
from safetensors.torch import save

from gram_core.files import write_atomic
from gram_core.model.store import ModelError, load_model, save_model


@pytest.fixture
def folder(tmp_path, make_model):
    save_model(tmp_path / "run", make_model(), {"task": {"kind": "nqueens"}, "run": "a"})
    return tmp_path / "run"


def refused(folder, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def store_weights(folder, content: bytes) -> None:
    """Other weights with the checksum that goes with them."""
    (folder / "model.safetensors").write_bytes(content)
    edit(folder, sha256=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("settings", [{}, {"guidance": "none", "core": "mixer"}])
def test_a_model_comes_back_with_its_configuration_and_what_was_said_of_it(
    tmp_path, make_model, settings
):
    model = make_model(**settings)
    save_model(tmp_path, model, {"run": "a"})
    loaded, about = load_model(tmp_path)
    assert loaded.config == model.config
    assert loaded.shape == model.shape
    assert about["run"] == "a"
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert {"z0_h", "z0_l"} <= expected.keys()
    assert all(torch.equal(value, expected[k]) for k, value in loaded.state_dict().items())


def test_saving_again_replaces_the_model(folder, make_model):
    save_model(folder, make_model(seed=1), {})
    loaded, about = load_model(folder)
    assert torch.equal(loaded.z0_h, make_model(seed=1).z0_h)
    assert "run" not in about
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_save_that_is_cut_short_is_noticed(folder, make_model, monkeypatch):
    """The configuration, which names the checksum, goes last: of new weights and an old one
    nothing is taken, and neither is the one without the other."""
    written = []

    def stopped(path, content):
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        write_atomic(path, content)

    monkeypatch.setattr("gram_core.model.store.write_atomic", stopped)
    for target in (folder, folder.parent / "fresh"):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            save_model(target, make_model(seed=1), {})
        assert written == ["model.safetensors"]
    refused(folder, "model.safetensors: does not match the checksum")
    refused(folder.parent / "fresh", "no such model")


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors: cannot be read")
    (folder / "config.json").unlink()
    refused(folder, "config.json: no such model; run its training stage")
    refused(folder / "nowhere", "no such model")


def test_a_flipped_bit_of_the_weights_is_noticed(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(folder, "model.safetensors: does not match the checksum")


def test_the_weights_of_another_training_are_noticed(folder, tmp_path, make_model):
    save_model(tmp_path / "other", make_model(seed=1), {})
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    refused(folder, "does not match the checksum")


def test_weights_that_are_no_weights_are_noticed(folder):
    store_weights(folder, b"not safetensors at all")
    refused(folder, "not weights of this configuration")


def test_weights_of_another_configuration_are_noticed(folder, make_model):
    other = make_model(dim=32).state_dict()
    store_weights(folder, save({k: v.contiguous() for k, v in other.items()}))
    refused(folder, "not weights of this configuration")


def test_weights_with_a_tensor_missing_are_noticed(folder, make_model):
    weights = make_model().state_dict()
    del weights["z0_h"]
    store_weights(folder, save({k: v.contiguous() for k, v in weights.items()}))
    refused(folder, "not weights of this configuration")


@pytest.mark.parametrize("text", ["{", "", '{"version": 1', b"\xff\xfe"])
def test_bad_json_is_noticed(folder, text):
    content = text if isinstance(text, bytes) else text.encode()
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json: not valid JSON")


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"version": 1, "model": {}}'])
def test_json_that_describes_no_model_is_noticed(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json: not a model's configuration; it needs")


def test_another_version_is_refused(folder):
    edit(folder, version=2)
    refused(folder, "version 2, this program reads 1")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"dimm": 16}},
        {"model": {"dim": -1}},
        {"shape": {"length": 16, "words": 3}},
        {"shape": {"length": "many", "vocab": 3}},
    ],
)
def test_a_damaged_configuration_is_one_line(folder, changes):
    edit(folder, **changes)
    refused(folder, "not weights of this configuration")
