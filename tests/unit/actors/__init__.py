"""Unit tests of ray_soup.actors, without Ray."""
