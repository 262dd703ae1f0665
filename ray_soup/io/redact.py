"""Keep credentials out of URIs, which ray_soup writes into recipes and reports."""

from __future__ import annotations

import re

from ray_soup.errors import RecipeError


def check_uri(uri: str) -> None:
    """Refuse a URI that carries credentials or options.

    Raises RecipeError; its message repeats the URI without them. ray_soup's own `?metric=` and `?key=` are allowed.
    """
    authority = uri.partition("://")[2].partition("/")[0]
    if "@" in authority or re.search(r"\?(?!metric=|key=)[\w.-]+=", uri):
        bare = re.sub(r"\?.*", "", uri.replace(authority, authority.rpartition("@")[2]))
        raise RecipeError(
            f"{bare}: a URI must not contain credentials or options. Set them in the environment of the driver and the "
            "actors: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, or the variables of your "
            "storage."
        )
