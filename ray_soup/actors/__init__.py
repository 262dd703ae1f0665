"""Actors, and pools of actors on Ray or in this process.

May import recipe, io, mixing and task. Only placement and on_ray import Ray.
"""
