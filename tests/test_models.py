"""The reference nets have the shapes their papers give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.models import REFERENCE_NETS, alexnet_cifar10, mlp, mlp_factorized, mnist_cnn, resnet_cifar10
from compress.models import vgg19_cifar10 as vgg19
from compress.models.resnet import Shortcut


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", REFERENCE_NETS)
def test_every_net_maps_its_input_shape_to_ten_scores(name: str) -> None:
    net = REFERENCE_NETS[name]
    network = net.build().eval()
    with torch.inference_mode():
        assert network(torch.zeros(2, *net.input_shape({}))).shape == (2, 10)


def test_vgg19_has_sixteen_convolutions_and_512_units_before_the_head() -> None:
    network = vgg19()
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 16
    assert network.state_dict()["classifier.6.weight"].shape == (10, 512)


def test_alexnet_has_the_published_classifier() -> None:
    state = alexnet_cifar10().state_dict()
    shapes = [tuple(state[f"classifier.{index}.weight"].shape) for index in (1, 4, 6)]
    assert shapes == [(4096, 9216), (4096, 4096), (10, 4096)]


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_cifar_resnets_have_the_published_sizes(depth: int, millions: float) -> None:
    assert parameter_count(resnet_cifar10(depth)) / 1e6 == pytest.approx(millions, abs=0.006)


def test_an_impossible_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="6 n \\+ 2"):
        resnet_cifar10(21)


def test_the_option_a_shortcut_keeps_every_second_pixel_and_pads_channels_with_zeros() -> None:
    images = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    found = Shortcut(2, 2)(images)
    assert torch.equal(found[:, 1:3], images[:, :, ::2, ::2])
    assert not found[:, [0, 3]].any()


def test_the_factorized_mlp_computes_a_plain_mlp_with_multiplied_weights() -> None:
    torch.manual_seed(0)
    factorized, plain = mlp_factorized([6, 5, 4, 3], hidden=5), mlp([6, 5, 4, 3])
    source, target = factorized.state_dict(), plain.state_dict()
    for index in (0, 2, 4):
        target[f"layers.{index}.weight"].copy_(source[f"layers.{index}.1.weight"] @ source[f"layers.{index}.0.weight"])
        target[f"layers.{index}.bias"].copy_(source[f"layers.{index}.1.bias"])
    inputs = torch.randn(7, 6)
    assert torch.allclose(factorized(inputs), plain(inputs), atol=1e-5)


def test_the_small_mnist_cnn_has_three_convolutions_and_two_linear_layers() -> None:
    kinds = [type(module) for module in mnist_cnn().modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert kinds == [nn.Conv2d] * 3 + [nn.Linear] * 2
