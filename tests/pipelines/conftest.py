"""Workspaces for the pipeline's tests."""

import os
from pathlib import Path

import pytest
from workspace import PARAMS, copy_to_work_in, make_data, make_run, write_params


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with PARAMS in it."""
    monkeypatch.chdir(tmp_path)
    write_params(PARAMS)
    return tmp_path


@pytest.fixture
def data(folder: Path) -> Path:
    """The same with the data stages done."""
    make_data()
    return folder


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a whole run in it; tests do not write to it."""
    path = tmp_path_factory.mktemp("done")
    before = Path.cwd()
    os.chdir(path)
    try:
        write_params(PARAMS)
        make_data()
        make_run()
    finally:
        os.chdir(before)
    return path


@pytest.fixture
def whole(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `done` to work in."""
    return copy_to_work_in(done, tmp_path / "whole", monkeypatch)
