import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.exc import InternalTorchDynamoError

from gram_core.compile import compiled

# Importing torch's compiler warns of its own use of torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


def test_without_a_compiler_the_module_stays_as_it_is_and_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    said: list[str] = []
    module = nn.Linear(2, 2)
    assert compiled(module, said.append) is module
    assert "forward" not in vars(module)
    assert len(said) == 1
    assert "no C++ compiler" in said[0]


def test_with_a_compiler_the_forward_is_compiled_without_a_word(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    calls, said = [], []

    def compile(function, *, dynamic):
        calls.append(dynamic)
        return lambda x: function(x) + 1

    monkeypatch.setattr(torch, "compile", compile)
    module = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    expected = module(x) + 1
    assert torch.equal(compiled(module, said.append, dynamic=True)(x), expected)
    assert calls == [True]
    assert said == []


def test_a_compilation_that_fails_is_one_line_and_the_module_runs_as_it_is(monkeypatch):
    tried, said = [], []

    def compile(function, *, dynamic):
        def fails(x):
            tried.append(x)
            raise InternalTorchDynamoError("no such instruction\nand a long story")

        return fails

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(torch, "compile", compile)
    module = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    expected = module(x)
    compiled(module, said.append)
    for _ in range(3):
        assert torch.equal(module(x), expected)
    assert len(tried) == 1, "it is not tried again"
    assert len(said) == 1 and "\n" not in said[0]
    assert "torch.compile failed (no such instruction)" in said[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")
def test_an_error_of_the_module_itself_is_not_hidden():
    module = compiled(nn.Linear(2, 2), lambda line: None)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        module(torch.ones(1, 3))
