"""Neural balance: exact against the closed form, through every kind of layer, and never a larger sum of squares."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.cli import main
from compress.diagnostics.balance import balance_units
from compress.graph.trace import trace_network
from compress.models import digits_net, mlp, resnet_cifar10
from compress.units.find import find_units
from compress.units.scaling import find_scalings
from tests.networks import Function, randomise


def balanced(module, inputs, per="unit"):
    randomise(module.double())
    graph = trace_network(module, (inputs,))
    state = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    scalings, reasons = find_scalings(graph, find_units(graph, module), state)
    names = [name for name, _ in module.named_parameters()]
    before = module(inputs).detach()
    result = balance_units(state, scalings, names, per=per)
    module.load_state_dict(result.state)
    return result, reasons, float((module(inputs).detach() - before).abs().max() / before.abs().max())


NETWORKS = {
    "mlp": (lambda: mlp((6, 9, 7, 3)), (2, 6)),
    "leaky and prelu": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 2)),
        (2, 4),
    ),
    "conv, batch norm, pool": (digits_net, (2, 1, 8, 8)),
    "residual stream": (lambda: resnet_cifar10(depth=8, width=4), (2, 3, 16, 16)),
    "depthwise and grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2),
        ),
        (2, 3, 8, 8),
    ),
    "concatenation": (
        lambda: Function(
            lambda layers, x: layers["c"](torch.cat([layers["a"](x).relu(), layers["b"](x).relu()], 1)),
            a=nn.Linear(4, 3), b=nn.Linear(4, 5), c=nn.Linear(8, 2),
        ),
        (2, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_balancing_keeps_the_outputs_and_lowers_the_sum_of_squares(name):
    build, shape = NETWORKS[name]
    result, _, deviation = balanced(build(), torch.randn(shape, dtype=torch.float64))
    assert result.layers
    assert deviation < 1e-10
    assert result.squares[1] < result.squares[0]
    assert all(layer["balance"][1] == pytest.approx(1, abs=1e-6) for layer in result.layers)


def test_one_hidden_layer_meets_the_closed_form():
    """The least Σ‖w‖² + ‖v‖² over rescalings is 2Σ‖w_k‖‖v_k‖, which no other factor reaches."""
    module = mlp((4, 6, 3))
    randomise(module.double())
    w, v = module.layers[0].weight.detach().clone(), module.layers[2].weight.detach().clone()
    result, _, _ = balanced(module, torch.randn(2, 4, dtype=torch.float64))
    assert result.squares[1] == pytest.approx(float(2 * (w.norm(dim=1) * v.norm(dim=0)).sum()), rel=1e-12)
    assert torch.allclose(module.layers[0].weight.norm(dim=1), module.layers[2].weight.norm(dim=0), rtol=1e-9)


def test_every_layer_of_a_balanced_chain_has_the_same_sum_of_squares():
    module = mlp((4, 6, 5, 7, 3))
    balanced(module, torch.randn(2, 4, dtype=torch.float64))
    sums = [float(layer.weight.detach().square().sum()) for layer in module.layers if isinstance(layer, nn.Linear)]
    assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-7)


def test_one_factor_per_layer_leaves_the_units_proportions():
    module = mlp((4, 6, 3))
    randomise(module.double())
    before = module.layers[0].weight.detach().clone()
    result, _, deviation = balanced(module, torch.randn(2, 4, dtype=torch.float64), per="layer")
    ratio = module.layers[0].weight.detach() / before
    assert deviation < 1e-12
    assert float(ratio.max() - ratio.min()) < 1e-12
    assert module.layers[0].weight.norm().item() == pytest.approx(module.layers[2].weight.norm().item())
    assert result.squares[1] <= result.squares[0]


def test_a_dead_unit_and_a_smooth_activation_are_left_alone():
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 2))
    randomise(module.double())
    with torch.no_grad():
        module[2].weight[:, 0] = 0
    state = {name: value.clone() for name, value in module.state_dict().items()}
    graph = trace_network(module, (torch.randn(2, 4, dtype=torch.float64),))
    scalings, reasons = find_scalings(graph, find_units(graph, module), state)
    result = balance_units(state, scalings, list(state))
    assert torch.equal(result.state["0.weight"][0], state["0.weight"][0])
    assert "not homogeneous" in reasons["2"]
    assert torch.equal(result.state["4.weight"], state["4.weight"])


def test_the_command_writes_a_state_dict_that_a_fresh_process_loads(tmp_path, capsys):
    torch.manual_seed(0)
    net = mlp((8, 6, 5, 3))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    target = tmp_path / "out.safetensors"
    code = main(["balance", str(tmp_path / "net.safetensors"), "--input-shape", "8", "--output", str(target), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    total = [sum(float(v.double().square().sum()) for v in state.values() if v.ndim == 2)
             for state in (net.state_dict(), load_file(target))]  # fmt: skip
    assert found["factor"] == pytest.approx(total[1] / total[0], rel=1e-5)
    script = (
        "import sys, torch; from safetensors.torch import load_file; from compress.models import mlp;"
        "net = mlp((8, 6, 5, 3)); net.load_state_dict(load_file(sys.argv[1]));"
        "print(net(torch.ones(1, 8)).sum().item())"
    )
    shown = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert float(shown.stdout) == pytest.approx(net(torch.ones(1, 8)).sum().item(), rel=1e-5)


def test_an_existing_file_is_refused(tmp_path, capsys):
    save_file(mlp((8, 6, 3)).state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "out.safetensors").write_bytes(b"kept")
    code = main(["balance", str(tmp_path / "net.safetensors"), "--output", str(tmp_path / "out.safetensors")])
    assert code == 1
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_bytes() == b"kept"
