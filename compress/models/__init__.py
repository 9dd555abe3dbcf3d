"""The networks of the published experiments, as `--arch compress:NAME` and as Python functions."""

from compress.models.catalogue import REFERENCE_NETS, Normalisation, ReferenceNet
from compress.models.chains import (
    alexnet_cifar10,
    digits_net,
    lenet_300_100,
    mlp,
    mlp_factorized,
    mnist_cnn,
    vgg19_cifar10,
)
from compress.models.resnet import resnet_cifar10

__all__ = [
    "REFERENCE_NETS",
    "Normalisation",
    "ReferenceNet",
    "alexnet_cifar10",
    "digits_net",
    "lenet_300_100",
    "mlp",
    "mlp_factorized",
    "mnist_cnn",
    "resnet_cifar10",
    "vgg19_cifar10",
]
