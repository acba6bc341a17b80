"""torch.compile: where it is chosen, and a compilation that fails."""

import gc
from weakref import ref

import pytest
import torch
from torch import nn

from neon_files.errors import UserError
from neon_run.compiling import compile_network
from neon_run.replay import Calls, Recorded

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Net(nn.Module):
    calls = Calls()

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 2)


@pytest.mark.parametrize(("device", "kind"), [(CPU, Calls), (GPU, Recorded)])
@pytest.mark.parametrize(("dynamic", "option"), [(True, True), (False, None)])
def test_every_graph_is_whole_and_a_gpu_records_the_calls(device, kind, dynamic, option, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append(options) or function)
    net = Net()
    compile_network(net, [net.part], device, dynamic=dynamic)
    assert made == [{"fullgraph": True, "dynamic": option, "backend": "inductor"}]
    assert type(net.calls) is kind


def test_a_compilation_that_fails_is_one_sentence_and_the_network_is_as_it_was():
    def backend(graph, inputs):
        raise RuntimeError("No working C++ compiler found\nin a long list of places")

    net = Net()
    names = list(net.state_dict())
    compile_network(net, [net.part], CPU, dynamic=False, backend=backend)
    with pytest.raises(UserError) as error, torch.no_grad():
        net.part(torch.ones(1, 2))
    assert error.value.message == (
        "--compile: this network cannot be compiled here (No working C++ compiler found); leave --compile out"
    )
    assert list(net.state_dict()) == names
    assert net.part.forward(torch.ones(1, 2)).shape == (1, 2)


@torch.no_grad()
def test_a_process_may_compile_many_networks_and_equal_ones_share_their_graphs():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for width in (*range(2, 13), 5):
        net = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        compile_network(net, net, CPU, dynamic=True, backend=backend)
        assert net(torch.ones(1, width)).shape == (1, width)
    assert len(graphs) == 11


@torch.no_grad()
def test_a_network_may_be_called_in_more_ways_than_torch_keeps_graphs_of():
    """Precisions, guidance, sizes, training: torch stops at eight."""

    class Many(nn.Module):
        def forward(self, x, way: str):
            return x + len(way)

    net, graphs = nn.Sequential(Many()), []
    compile_network(net, net, CPU, dynamic=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for number in range(12):
        assert net[0](torch.zeros(2), "i" * number).tolist() == [number] * 2
    assert len(graphs) == 12


@torch.no_grad()
def test_a_network_that_is_dropped_is_free_at_once():
    """The next stage needs its memory, and Python looks for circles when it likes."""
    net = Net()
    compile_network(net, [net.part], CPU, dynamic=True, backend=lambda graph, inputs: graph.forward)
    net.calls = Recorded(net)
    gc.disable()
    try:
        net.part(torch.ones(1, 2))
        dropped = ref(net), ref(net.part), ref(net.calls)
        del net
        assert [which() for which in dropped] == [None] * 3
    finally:
        gc.enable()
