"""Real features for tests: an untrained little network's of the embedded images, made once a session."""

import functools

import torch

from prototypes_lib import data
from prototypes_lib.backbones import Backbone
from prototypes_lib.evaluate import Features, extract


@functools.lru_cache
def backbone() -> Backbone:
    """vit_pico_patch8 as it is before training: its features know colors and layout, so kNN is above chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Backbone("vit_pico_patch8", 32).eval()


@functools.lru_cache
def images() -> tuple[data.Images, data.Images]:
    """1000 training and 500 test images of ten classes, as many of each."""
    train = data.load("cifar10-5k", "train", limit=1000, progress=False)
    return train, data.load("cifar10-5k", "test", limit=500, progress=False)


@functools.lru_cache
def real() -> tuple[Features, Features]:
    """Their features (1000, 64) and (500, 64). Shared by all tests: change copies only."""
    train, test = images()
    return extract(backbone(), train), extract(backbone(), test)
