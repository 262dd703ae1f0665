"""The methods, a run from recipe to output folder, and operations on finished soups.

May import actors and everything below it; never Ray.
"""
