"""Tests of ray_soup.mixing."""
