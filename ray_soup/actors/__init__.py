"""Actors, and pools of actors on Ray or in this process.

May import recipe, io, mixing and task. Only metrics, placement, ray_session, relays and on_ray import Ray.
"""
