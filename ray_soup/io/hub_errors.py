"""Errors of the Hugging Face Hub as sentences that say what to do."""

from __future__ import annotations

import importlib
import socket
from pathlib import Path
from typing import Any

from ray_soup.errors import RecipeError, SoupError, first_line
from ray_soup.io import disk
from ray_soup.io.hub_path import HubPath
from ray_soup.io.redact import redact


def constants() -> Any:
    """Return the settings of `huggingface_hub`, which it reads from the environment when it is imported."""
    from huggingface_hub import constants

    return constants


def hub_utils() -> Any:
    """Return the module with the errors and the requests of `huggingface_hub`, which mypy does not know as exported."""
    return importlib.import_module("huggingface_hub.utils")


def repository(where: HubPath) -> Path:
    """Return the folder of a repository in the cache of `huggingface_hub`."""
    return Path(constants().HF_HUB_CACHE, f"{where.kind}s--{where.repo.replace('/', '--')}")


def may_pass(error: BaseException) -> bool:
    """Return whether an error may not occur again: the Hub could not be reached, or is overloaded."""
    utils = hub_utils()
    if isinstance(error, (utils.OfflineModeIsEnabled, utils.RepositoryNotFoundError, utils.RevisionNotFoundError)):
        return False
    status = status_of(error)
    return _is_network(error) if status is None else status in (408, 429) or status >= 500


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error; None if there was no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_network(error: BaseException) -> bool:
    """Return whether no answer came: an error of the HTTP library, or one that was caused by such an error."""
    library = type(error).__module__.partition(".")[0]
    return library in ("httpx", "httpx2", "httpcore", "requests", "urllib3") or isinstance(error, ConnectionError)


def not_cached(where: HubPath, name: str = "") -> RecipeError:
    """Return the error for a revision, or a file of it, that is not in the cache of `huggingface_hub`."""
    of_data = " --repo-type dataset" if where.kind == "dataset" else ""
    what = f"the file {name} of " if name else ""
    return RecipeError(
        f"{where}: {what}this revision is not complete in the cache {constants().HF_HUB_CACHE} on {socket.gethostname()}, "
        f"and HF_HUB_OFFLINE is set. Run once with a connection, or `hf download {where.repo}{of_data} --revision "
        f"{where.revision}`."
    )


def explained(error: BaseException, where: HubPath, downloading: bool = False) -> BaseException:
    """Return an error with a sentence that says what to do; it never contains an answer of the Hub as a whole.

    Errors of the disk are DiskError; what cannot be explained is returned unchanged.
    """
    utils, endpoint = hub_utils(), constants().ENDPOINT
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, utils.GatedRepoError):
            return RecipeError(
                f"{where} is gated: its owners have not granted access to the token in use, or there is none. Accept the "
                f"conditions at {endpoint}/{'datasets/' if where.kind == 'dataset' else ''}{where.repo}, and set HF_TOKEN."
            )
        if isinstance(cause, utils.RevisionNotFoundError):
            return RecipeError(f"{where}: the repository has no branch, tag or commit {where.revision!r}. Fix the revision.")
        status = status_of(cause)
        if isinstance(cause, utils.RepositoryNotFoundError):
            return RecipeError(
                f"{where}: {endpoint} has no such {where.kind} repository, or it is private and HF_TOKEN is not set or may "
                "not read it. Check the name, and set HF_TOKEN if it is private."
            )
        if status in (401, 403):
            return RecipeError(f"{where}: {endpoint} refused access (HTTP status {status}). Check HF_TOKEN.")
        if status is not None:
            return SoupError(f"{where}: {endpoint} answered with HTTP status {status}. Rerun the command later.")
        if isinstance(cause, utils.OfflineModeIsEnabled):
            return not_cached(where)
        if _is_network(cause):
            said = f"{where}: {endpoint} cannot be reached ({redact(first_line(cause))})"
            cure = "Check the network, and rerun the command"
            if downloading:
                return SoupError(f"{said}. {cure}: files that are complete are kept.")
            return RecipeError(f"{said}. {cure}, or set HF_HUB_OFFLINE=1 to use what was downloaded before.")
        if isinstance(cause, OSError) and cause.errno is not None:
            try:
                with disk.writing(Path(constants().HF_HUB_CACHE)):
                    raise cause
            except SoupError as said_so:
                return said_so
        cause = cause.__cause__ or cause.__context__
    return error
