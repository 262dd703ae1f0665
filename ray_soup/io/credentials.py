"""What obstore does not find out by itself about a storage and its credentials.

obstore knows the variables in the environment, service accounts and the roles of machines. Added here are the profiles of
AWS, the region of a bucket, and unsigned requests, for public buckets, if there are no credentials.
"""

from __future__ import annotations

import configparser
import importlib.util
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from ray_soup.errors import RecipeError
from ray_soup.io.remote import storage_failed

PREFIXES = ("AWS_", "GOOGLE_", "AZURE_", "MSI_", "IDENTITY_")
"""Of the variables in the environment that matter here."""
IN_S3 = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE")
OF_SERVICES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"
)  # fmt: skip
IN_GCS = (
    "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN", "GOOGLE_SKIP_SIGNATURE",
)  # fmt: skip
GCLOUD = "~/.config/gcloud/application_default_credentials.json"
METADATA = "http://169.254.169.254"
"""The metadata service of a machine in a cloud."""
RENEWED = timedelta(minutes=5)
"""How long the credentials of a profile are used before they are asked for again."""


def store_options(kind: str, bucket: str) -> dict[str, Any]:
    """Return the options of the store of a bucket that obstore does not take from the environment by itself.

    Raises RecipeError if the profile of AWS cannot be read.
    """
    if kind == "S3Store":
        return {**_place_of_s3(bucket), **_reader_of_s3()}
    if kind == "GCSStore":
        known = any(map(os.environ.get, IN_GCS)) or Path(GCLOUD).expanduser().exists() or _has_service_account()
        return {} if known else {"skip_signature": True}
    if os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or os.environ.get("AZURE_STORAGE_USE_EMULATOR"):
        return {}
    account = os.environ.get("AZURE_STORAGE_ACCOUNT")  # the name that the command `az` uses
    if not account:
        raise ValueError("AZURE_STORAGE_ACCOUNT_NAME is not set")
    return {"account_name": account}


def _place_of_s3(bucket: str) -> dict[str, Any]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        return {"endpoint": endpoint if "://" in endpoint else f"https://{endpoint}"}
    if os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        return {}
    from pyarrow import fs

    try:
        return {"region": fs.resolve_s3_region(bucket)}
    except OSError as error:
        raise storage_failed(f"s3://{bucket}", str(error).partition("\n")[0]) from error


def _reader_of_s3() -> dict[str, Any]:
    if any(map(os.environ.get, IN_S3)):
        return {}
    if profile_keys() is not None:
        return {"credential_provider": profile_keys}
    known = any(map(os.environ.get, OF_SERVICES)) or _has_role()
    return {} if known else {"skip_signature": True}


def profile_keys() -> dict[str, Any] | None:
    """Return the keys of the profile AWS_PROFILE, by default of `default`, as obstore asks for them; None if it has none.

    Through botocore if it is installed, which also assumes roles, signs in and starts processes. Raises RecipeError.
    """
    places = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    files = [Path(os.environ.get(name) or place).expanduser() for name, place in places.items()]
    if not any(file.exists() for file in files):
        return None
    if importlib.util.find_spec("botocore") is None:
        return _keys_in(files, os.environ.get("AWS_PROFILE") or "default")
    import botocore.exceptions
    import botocore.session

    try:
        found = botocore.session.get_session().get_credentials()
        return None if found is None else _keys(*found.get_frozen_credentials())
    except botocore.exceptions.BotoCoreError as error:
        raise RecipeError(f"The credentials of AWS cannot be read: {error}. Fix the profile, or AWS_PROFILE.") from error


def _keys(key: str, secret: str, token: str | None = None, *_: Any) -> dict[str, Any]:
    renewed = datetime.now(timezone.utc) + RENEWED
    return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": renewed}


def _keys_in(files: Sequence[Path], profile: str) -> dict[str, Any] | None:
    """Return the keys of a profile that stand in these files; None if it has no credentials.

    Raises RecipeError if it gets them in another way, which needs botocore.
    """
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read(files, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise RecipeError(f"The credentials of AWS cannot be read: {error}. Fix the file.") from error
    values: dict[str, str] = {}
    for name in (f"profile {profile}", profile):
        values |= dict(parser[name]) if parser.has_section(name) else {}
    if "aws_access_key_id" in values and "aws_secret_access_key" in values:
        return _keys(values["aws_access_key_id"], values["aws_secret_access_key"], values.get("aws_session_token"))
    if "AWS_PROFILE" in os.environ or any(key.startswith(("role_arn", "sso_", "credential_process")) for key in values):
        raise RecipeError(
            f"The profile {profile} of AWS has no keys of its own in {' or '.join(map(str, files))}. To assume a role, to "
            "sign in or to start a process for them, install botocore (pip install botocore); or fix AWS_PROFILE."
        )
    return None


def _has_role() -> bool:
    """Return whether this machine has a role of AWS."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    place = os.environ.get("AWS_METADATA_ENDPOINT") or METADATA
    token = _metadata(f"{place}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    headers = {"X-aws-ec2-metadata-token": token or ""}
    return bool(token and _metadata(f"{place}/latest/meta-data/iam/security-credentials/", "GET", headers))


def _has_service_account() -> bool:
    """Return whether this machine has a service account of Google."""
    url = f"{METADATA}/computeMetadata/v1/instance/service-accounts/default/email"
    return bool(_metadata(url, "GET", {"Metadata-Flavor": "Google"}))


def _metadata(url: str, method: str, headers: dict[str, str]) -> str | None:
    """Ask the metadata service of this machine, which answers at once unless it is busy; None without an answer."""
    for timeout in (1, 2):
        with (
            suppress(OSError, ValueError, HTTPException),
            urlopen(Request(url, headers=headers, method=method), timeout=timeout) as answer,
        ):
            return str(answer.read(4096).decode())
    return None
