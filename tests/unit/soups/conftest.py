"""Fixtures of the unit tests of ray_soup.soups."""

from tests.ray.conftest import conv_zoo as conv_zoo
