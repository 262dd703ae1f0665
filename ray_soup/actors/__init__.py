"""Actors, and pools of actors on Ray or in this process.

May import recipe, io, mixing and task. Only placement, ray_session and on_ray import Ray.
"""
