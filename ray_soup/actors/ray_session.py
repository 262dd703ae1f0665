"""The connection to Ray: a cluster at RAY_ADDRESS, or a local Ray."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray_soup.errors import RecipeError, SoupError, Stopped, first_line
from ray_soup.io.environment import check_environment
from ray_soup.io.signals import keeping_handler, under_handler

PROBE_S = 5
"""Seconds for the head of a cluster to accept a TCP connection."""
CONNECT_S = 60
"""Seconds to connect to a cluster whose head accepts TCP connections."""
LONGEST_FOLDER = 38
"""Bytes of the longest temporary folder: Ray appends up to 69 for its sockets, whose paths may have 107."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}


@contextmanager
def connect(about: Mapping[str, str] | None = None) -> Iterator[None]:
    """Connect to Ray for as long as the context lasts; `about` becomes the metadata that `ray job list` shows.

    Uses the Ray session that is already open, or the cluster at RAY_ADDRESS; otherwise starts Ray locally, without a
    dashboard. Raises RecipeError if RAY_ADDRESS is wrong or no cluster answers there, SoupError if Ray does not start.
    """
    check_environment()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of other actors than the one whose error is raised
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "").strip()
    with keeping_handler():
        try:
            if address and address != "local":
                _join_cluster(address, {} if about is None else about)
            else:
                _start_local()
        except BaseException:
            under_handler(ray.shutdown)  # what had started
            raise
    try:
        yield
    finally:
        under_handler(ray.shutdown)


def has_cluster() -> bool:
    """Return whether this process is connected to Ray, or RAY_ADDRESS names a cluster to connect to."""
    ray = sys.modules.get("ray")  # not imported to learn that nobody has connected to it
    return (ray is not None and ray.is_initialized()) or os.environ.get("RAY_ADDRESS", "").strip() not in ("", "local")


def _join_cluster(address: str, about: Mapping[str, str]) -> None:
    """Connect to the cluster at `address`, HOST:PORT or auto."""
    if address != "auto":
        _check_answers(*parse_address(address))
    failures: list[BaseException] = []

    def join() -> None:
        import ray
        from ray.job_config import JobConfig

        try:
            ray.init(address, job_config=JobConfig(metadata=dict(about)), **_QUIET)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=join, daemon=True)  # Ray would try for minutes
    thread.start()
    thread.join(CONNECT_S)
    if thread.is_alive():
        raise RecipeError(
            f"RAY_ADDRESS={address}: something answers there, but not a Ray cluster that accepts this driver within "
            f"{CONNECT_S} s. Check the port (6379 by default), that both have the same version of Ray, and its logs."
        )
    if failures:
        error = failures[0]
        if isinstance(error, KeyboardInterrupt):
            raise error
        if type(error).__name__ == "AuthenticationError":
            raise RecipeError(
                f"RAY_ADDRESS={address}: the cluster refused the token. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the "
                "token of the cluster."
            ) from error
        raise RecipeError(
            f"RAY_ADDRESS={address}: no connection to a Ray cluster: {first_line(error)}. Check that it is running (`ray "
            "status`) with this version of Ray, or unset RAY_ADDRESS to start Ray on this machine."
        ) from error


def parse_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT. Raises RecipeError, which says what to write instead of a URL."""
    if "://" in address:
        kind = "the address of Ray Client" if address.startswith("ray://") else "a URL, as of a dashboard"
        raise RecipeError(
            f"RAY_ADDRESS={address} is {kind}; expected HOST:PORT of the cluster's head, such as 10.0.0.1:6379. The driver "
            "must run inside the cluster: use ray job submit --address=http://HOST:8265 -- ray-soup ..., or run it on a "
            "node with RAY_ADDRESS=auto."
        )
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[\w.-]+):(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise RecipeError(
            f"RAY_ADDRESS={address[:200]} is not valid; expected HOST:PORT, such as 10.0.0.1:6379, or auto. Fix it, or "
            "unset it to start Ray on this machine."
        )
    return found[1].strip("[]"), int(found[2])


def _check_answers(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), PROBE_S).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RecipeError(
            f"RAY_ADDRESS={host}:{port}: no Ray cluster answers there ({reason}). Start the cluster, fix the address, or "
            "unset RAY_ADDRESS to start Ray on this machine."
        ) from error


def _start_local() -> None:
    """Start Ray on this machine; a second time if it is slow on a busy machine. Raises SoupError."""
    import ray

    folder = temporary_folder()
    for attempt in range(2):
        try:
            ray.init(
                "local",
                num_cpus=max(2, len(os.sched_getaffinity(0))),  # a mesh of two shards runs on one core too
                include_dashboard=False,
                object_store_memory=100_000_000,  # nothing large goes through it
                _temp_dir=folder,
                **_QUIET,
            )
            return
        except (Exception, SystemExit) as error:
            if isinstance(error, OSError) and f"{os.sep}.ray" in str(getattr(error, "filename", "")):
                raise RecipeError(
                    f"Ray cannot write its settings to {error.filename}: {error.strerror}. Set HOME to a folder that can be "
                    "written."
                ) from error
            if attempt or isinstance(error, OSError) or Stopped.signal is not None:
                raise SoupError(
                    f"Ray could not be started on this machine: {first_line(error)}. Check its free memory, limits (ulimit "
                    f"-a), and disk (Ray's logs are in {folder or tempfile.gettempdir()}); then rerun the same command."
                ) from error
            with suppress(Exception):
                ray.shutdown()


def temporary_folder() -> str | None:
    """Return the folder for the files of a local Ray; None: Ray's default. Raises RecipeError if there is none.

    Ray puts sockets into it, so its path must be short.
    """
    named = os.environ.get("RAY_TMPDIR")
    folder = named or os.environ.get("TMPDIR") or "/tmp"
    if len(os.fsencode(folder)) <= LONGEST_FOLDER and _can_write(folder):
        return None
    for short in () if named else SHORT_FOLDERS:
        if _can_write(short):
            return f"{short}/ray"
    name = "RAY_TMPDIR" if named else "TMPDIR"
    raise RecipeError(
        f"{name}={folder[:200]}: the temporary folder of Ray must be one that can be written, with a path of at most "
        f"{LONGEST_FOLDER} bytes, because Ray puts its sockets there. Set RAY_TMPDIR to such a folder, such as /tmp."
    )


def _can_write(folder: str) -> bool:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, ValueError):
        return False
