"""Keep credentials and terminal escapes out of everything that is shown or written.

`redact` and `printable` are called at the exits: the terminal, JSON, and the files of an output folder. What is read
again as a path or a recipe passes `redact_uris` instead, which changes nothing that a run accepts.
"""

from __future__ import annotations

import os
import re

from ray_soup.errors import RecipeError

HIDDEN = "[redacted]"
WITH_PORT = ("http", "https", "hdfs", "viewfs", "webhdfs", "ray")
"""Schemes whose URIs may have a port behind a colon; in others, the colon begins a password."""

# A password may contain any character, so the user information of a URI ends at the last @ of the line. Without a colon
# before the first slash it is not user information: s3://bucket/model@2, hf://name/model@revision. A path that lost a slash
# counts too; a host with a port does not: hdfs://name:8020/user@site.
_WITH_PORT = "|".join(f"(?<={scheme}://)" for scheme in WITH_PORT)
_USER = re.compile(
    rf"(?<=:/)(/?)(?!(?:{_WITH_PORT})[^\s/?#@:]*:\d{{1,5}}(?:[/?#]|$))(?:[^\s/?#@:]*:[^\n]*@|[^\s/?#@]+(?:@[^\s/?#@]*)*@)"
)
_QUERY = re.compile(r"://[^\s?]*\?\S+")
_PARAMETER = re.compile(
    r"([?&;](?!key=)[\w.-]*(?:token|secret|pass|pwd|sig|cred|key|auth|session|policy)[\w.-]*=)\S+", re.IGNORECASE
)
_ASSIGNED = re.compile(
    r"\b([\w.-]*(?:password|passwd|secret|api_?key|access_?key|auth_?token|session_?token|credential)[\w.-]*=)[^\s,;]+",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"\b(?:hf_(?=[a-z0-9]*[A-Z])(?=[A-Z0-9]*[a-z])[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|A[KS]IA[0-9A-Z]{16}|(?:Bearer|Basic)\s+(?=\S*[0-9+/=_.-])\S{8,})"
)
_SECRET_VARIABLE = re.compile(
    r"SECRET|TOKEN|PASSW|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY|STORAGE_?KEY|CONNECTION_STRING|CREDENTIAL"
)
_NAMES_A_FILE = re.compile(r"(_FILE|_PATH|_DIR|_URL|_URI|CREDENTIALS|_ID)$")
_WORD = re.compile(r"[A-Za-z][a-z]{,19}|[A-Z]{,20}")
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def redact(text: str) -> str:
    """Return a text without the credentials in it.

    Hides the user information of URIs, parameters of URIs that look secret, tokens of well-known forms, and the values of
    environment variables that hold secrets.
    """
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    if ":/" in text:
        text = _USER.sub(rf"\g<1>{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\g<1>{HIDDEN}", text)
    text = _ASSIGNED.sub(rf"\g<1>{HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, text)


def redact_uris(text: str) -> str:
    """Return a text without the user information and the secret parameters of URIs.

    For paths that are read again: everything that `check_uri` accepts, and every local path, stays unchanged.
    """
    if "://" not in text:
        return text
    text = _USER.sub(rf"\g<1>{HIDDEN}@", text)
    return _QUERY.sub(lambda found: _PARAMETER.sub(rf"\g<1>{HIDDEN}", found[0]), text)


def _secrets() -> list[str]:
    """Return the values of the environment variables that hold secrets, longest first; a plain word is none."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= 8 and _SECRET_VARIABLE.search(name.upper()) and not _NAMES_A_FILE.search(name.upper())
        if not _WORD.fullmatch(value)
    }
    return sorted(found, key=len, reverse=True)


def printable(text: str) -> str:
    r"""Return a text with control characters, terminal escapes, bidi controls and lone surrogates as escapes like \x1b.

    Newlines and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def check_uri(uri: str) -> None:
    """Refuse a URI that carries credentials or options.

    Raises RecipeError; its message repeats the URI without them. ray_soup's own `?metric=` and `?key=` are allowed.
    """
    scheme, _, inside = uri.partition("://")
    if _USER.match(uri, len(scheme) + 2) or "@" in inside.partition("/")[0] or re.search(r"\?(?!metric=|key=)[\w.-]+=", uri):
        bare = re.sub(r"\?.*", "", redact(uri), flags=re.DOTALL)
        raise RecipeError(
            f"{bare}: a URI must not contain credentials or options. Set them in the environment of the driver and the "
            "actors: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, or the variables of your "
            "storage."
        )
