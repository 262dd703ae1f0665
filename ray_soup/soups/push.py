"""Push a finished soup to a repository on the Hugging Face Hub. Does not import torch."""

from __future__ import annotations

import glob
import json
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.io.disk import read_json
from ray_soup.io.hub_errors import constants, explained, hub_utils, status_of
from ray_soup.io.hub_path import HubPath
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.soups.place import local_folder
from ray_soup.soups.records import check_files, finished_record

AT_HOME = ("recipe.yaml", "report.html")
"""The files that are not pushed: they name paths of this machine. The model card has the recipe without them."""


def push(out: str | Path, repo: str, private: bool = False, progress: ProgressCallback = no_progress) -> str:
    """Push the model of a finished soup, its coefficients, results and model card to the Hub; return the commit's address.

    HF_TOKEN, or the login of `hf auth login`, must allow to write. The repository is created if it does not exist; other
    files in it stay.

    Args:
        out: the local folder of the soup.
        repo: the repository, ORG/NAME.
        private: whether a new repository is private.
        progress: called with what is being done, the units done so far, and the units in total.

    Raises RecipeError if `out` is not a finished soup, if its files have changed, or if the Hub refuses, SoupError if the
    upload fails.
    """
    import huggingface_hub

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        raise RecipeError(f"--push: found {repo!r}; expected the name of a repository on the Hub, ORG/NAME. Fix it.")
    if storage.is_remote(str(out)):
        raise RecipeError(f"--push: {out} is a URI; expected a local folder. Copy the soup to this machine first.")
    folder = local_folder(out)
    record = finished_record(folder)
    progress("hashing", 0, 1)
    check_files(folder, record)
    names = [name for name in record["files"] if name not in AT_HOME]
    where, changed = HubPath("model", repo, "main", ""), _without_paths(folder, names)
    with suppress(Exception):
        hub_utils().disable_progress_bars()
    progress(f"uploading {len(names)} files", 0, 1)
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repo, private=private or None, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table of coefficients is Parquet, which most models do not have
            done = hub.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=[glob.escape(name) for name in names if name not in changed],
                delete_patterns=["model*.safetensors*", "adapter_model*"],  # of an earlier soup
                commit_message=f"A model soup of {len(record['ingredients'])} ingredients",
            )
            for name, content in changed.items():
                done = hub.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo)
    except Exception as error:
        status = status_of(error)
        if status in (401, 403, 404):
            raise RecipeError(
                f"--push: {constants().ENDPOINT} refused to write to {repo} (HTTP status {status}). Set HF_TOKEN to a token "
                f"that may write there, and check the name."
            ) from error
        raise explained(error, where, downloading=True) from error  # an error of the network
    progress(f"uploading {len(names)} files", 1, 1)
    return str(done.commit_url)


def _without_paths(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return the files that would name a folder of this machine, changed for the Hub: of the base's path, its name stays."""
    from ray_soup.io.checkpoint_files import ADAPTER_CONFIG  # needs torch

    if ADAPTER_CONFIG not in names:
        return {}
    config = read_json(folder / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path") or ""
    if not os.path.isabs(base):
        return {}
    config["base_model_name_or_path"] = os.path.basename(base.rstrip("/"))
    return {ADAPTER_CONFIG: json.dumps(config, indent=2, sort_keys=True).encode()}
