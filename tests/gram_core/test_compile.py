import copy
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.exc import InternalTorchDynamoError

from gram_core.compile import compiled, kept
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.model.recursion import State
from gram_core.sample.trajectory import SampleConfig, SupervisionStep
from gram_core.shape import TokenShape

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

    def compile(function, *, dynamic, mode):
        calls.append(dynamic)
        return lambda x: function(x) + 1

    monkeypatch.setattr(torch, "compile", compile)
    module = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    expected = module(x) + 1
    assert torch.equal(compiled(module, said.append)(x), expected)
    assert calls == [False]
    assert said == []


def test_any_number_of_rows_is_compiled_once(monkeypatch):
    """Rows that are at first as many as positions and channels are not taken for these."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    shape = TokenShape(length=6, vocab=3)
    model = GRAM(ModelConfig(dim=8, heads=2, ffn=16, prefix_tokens=2, T=2, K=1), shape).eval()
    step = SupervisionStep(model, SampleConfig())
    fast = compiled(copy.copy(step), print, rows=step.rows)
    with torch.inference_mode():
        for rows in (8, 5, 12, 3, 8):
            inputs = torch.randint(1, 3, (rows, 6)).to(torch.uint8)
            # As sampling has it: the rows are the second axis, and lie in memory as the first.
            noise = torch.randn(rows, 2, 8, 8).transpose(0, 1)
            given = (model.initial_state(rows), model.embed(inputs), noise)
            for found, expected in zip(fast(*given)[1:], step(*given)[1:], strict=True):
                torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


def test_a_compilation_that_fails_is_one_line_and_the_module_runs_as_it_is(monkeypatch):
    tried, said = [], []

    def compile(function, *, dynamic, mode):
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


def test_what_is_kept_of_a_graph_s_results_is_a_copy():
    h, low, answer = torch.ones(2), torch.zeros(2), torch.ones(3, requires_grad=True) * 2
    state, copy, rest = kept((State(h, low), answer, "text"))
    for tensor in (h, low):
        tensor.fill_(7.0)
    assert torch.equal(state.h, torch.ones(2)) and torch.equal(state.l, torch.zeros(2))
    assert torch.equal(copy, answer) and copy.data_ptr() != answer.data_ptr()
    assert copy.requires_grad
    assert rest == "text"


def test_a_gpu_s_graph_is_told_of_each_step_and_its_results_are_copied(monkeypatch):
    """The module says that it is on a GPU; it is not."""
    told, asked = [], []
    buffer = torch.zeros(2)

    def compile(function, *, dynamic, mode):
        asked.append(mode)
        return lambda x: buffer.copy_(x)

    class OnGpu(nn.Linear):
        def parameters(self, recurse=True):
            yield type("P", (), {"device": torch.device("cuda")})()

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append(1))
    module = compiled(OnGpu(2, 2), told.append)
    first, second = module(torch.ones(2)), module(torch.full((2,), 2.0))
    assert torch.equal(first, torch.ones(2)) and torch.equal(second, torch.full((2,), 2.0))
    assert told == [1, 1]
    compiled(OnGpu(2, 2), told.append, graphs=False)
    assert asked == ["reduce-overhead", None]


def test_who_compiles_nothing_does_not_wait_for_the_compiler():
    program = (
        "import sys, pipelines.sample, pipelines.train, pipelines.evaluate\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
