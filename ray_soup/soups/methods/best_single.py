"""The best single ingredient, which every soup is compared with."""

from __future__ import annotations

from ray_soup.recipe import BEST_SINGLE
from ray_soup.soups.mixture import Mixture, held_out_figures, mean_of, on_whole_model
from ray_soup.soups.session import Session
from ray_soup.task.choices import ranking


def best_single(session: Session) -> Mixture:
    """Take the ingredient that is best on fit and select together."""
    figures, passes = held_out_figures(session)
    held_out = session.individual()
    best = ranking({k: held_out[k] for k in session.subset}, session.recipe.select_by)[0]
    name = session.inputs.names[best]
    figures |= {BEST_SINGLE: name, "image_passes": passes}
    values = mean_of([session.subset.index(best)], len(session.subset))
    return Mixture(on_whole_model(session, values), figures, [f"Best single ingredient on fit and select together: {name}."])
