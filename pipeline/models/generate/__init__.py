"""Generators of images, the discriminator that trains them, and the losses between the two."""

from pipeline.models.generate.base import Generator
from pipeline.models.generate.discriminator import Discriminator
from pipeline.models.generate.gan import Gan, make_gan, total
from pipeline.models.generate.registry import GENERATORS, create_generator, list_generators

__all__ = [
    "GENERATORS",
    "Discriminator",
    "Gan",
    "Generator",
    "create_generator",
    "list_generators",
    "make_gan",
    "total",
]
