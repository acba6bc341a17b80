"""torch.compile: where its mode is chosen, what a CUDA graph would overwrite, and a compilation that fails."""

import pytest
import torch
from torch import nn

from neon_core.compiling import compile_calls
from neon_files.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "static", "modes"),
    [(CPU, True, [None]), (CPU, False, [None]), (GPU, False, [None]), (GPU, True, [None, "reduce-overhead"])],
)
def test_only_static_calls_on_a_gpu_are_replayed_and_every_graph_is_whole(device, static, modes, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append(options) or function)
    compile_calls([nn.Identity()], device, static=static)
    assert [options.get("mode") for options in made] == modes
    assert all(options["fullgraph"] for options in made)
    assert {options["dynamic"] for options in made} == {None if static else True}


def test_what_a_replay_overwrites_is_copied_and_gradients_are_not_replayed(monkeypatch):
    memory = torch.zeros(2)  # where each replay of a CUDA graph writes its output

    def compiled(function, mode=None, **options):
        if mode is None:
            return function
        return lambda module, x: {"output": memory.copy_(x), "count": 2}

    monkeypatch.setattr(torch, "compile", compiled)
    module = nn.Identity()
    compile_calls([module], GPU, static=True)
    with torch.no_grad():
        first, second = module(torch.ones(2)), module(torch.full((2,), 5.0))
    assert first["output"].tolist() == [1, 1] and second["output"].tolist() == [5, 5] and first["count"] == 2
    x = torch.ones(2, requires_grad=True)
    assert module(x) is x


def test_a_compilation_that_fails_is_one_sentence_and_the_network_is_as_it_was():
    def backend(graph, inputs):
        raise RuntimeError("No working C++ compiler found\nin a long list of places")

    net = nn.Linear(2, 2)
    names = list(net.state_dict())
    compile_calls([net], CPU, static=True, backend=backend)
    with pytest.raises(UserError) as error, torch.no_grad():
        net(torch.ones(1, 2))
    assert error.value.message == (
        "--compile: this network cannot be compiled here (No working C++ compiler found); leave --compile out"
    )
    assert list(net.state_dict()) == names
    assert net.forward(torch.ones(1, 2)).shape == (1, 2)


@torch.no_grad()
def test_a_process_may_compile_many_networks_and_equal_ones_share_their_graphs():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for width in (*range(2, 13), 5):  # torch keeps eight graphs of one function
        net = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        compile_calls(net, CPU, static=False, backend=backend)
        assert net(torch.ones(1, width)).shape == (1, width)
    assert len(graphs) == 11
