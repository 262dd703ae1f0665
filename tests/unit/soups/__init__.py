"""Tests of ray_soup.soups."""
