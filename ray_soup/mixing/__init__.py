"""The mathematics of a soup: blocks, directions, combine and project, coefficients, exact baking.

Imports ray_soup.errors and ray_soup.io only.
"""
