"""ray_soup: one model out of all the checkpoints of a sweep."""

__version__ = "0.1.0"
