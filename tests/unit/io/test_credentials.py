"""Who reads object storage: against a server that notes which keys sign a request, and answers as a metadata service."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import credentials, objects, storage
from ray_soup.io.objects import ObjectFile, object_store

ROLE = {
    "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "ROLEKEY", "SecretAccessKey": "s", "Token": "t",
    "LastUpdated": "2020-01-01T00:00:00Z", "Expiration": "2099-01-01T00:00:00Z",
}  # fmt: skip
LISTING = b"""<ListBucketResult><Name>bucket</Name><KeyCount>1</KeyCount><IsTruncated>false</IsTruncated><Contents>
<Key>a/./b</Key><LastModified>2026-01-01T00:00:00Z</LastModified><ETag>"e"</ETag><Size>3</Size></Contents></ListBucketResult>"""


class Server(ThreadingHTTPServer):
    """An object of 3 bytes at every path, and the role of a machine if `has_role`; `signers` are the keys of requests."""

    has_role = False
    silent = 0
    """How many requests for a token get no answer."""
    refuses = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.signers: list[str | None] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: object) -> None: ...

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        if self.server.silent:
            self.server.silent -= 1
            return
        self.answer(200 if self.server.has_role else 404, b"token")

    def do_GET(self) -> None:
        if self.path.startswith("/computeMetadata/"):
            self.answer(404)
            return
        if self.path.startswith("/latest/"):
            known = self.server.has_role and self.headers.get("X-aws-ec2-metadata-token") == "token"
            body = b"role" if self.path.endswith("/") else json.dumps(ROLE).encode()
            self.answer(200 if known else 404, body)
            return
        if "list-type=2" in self.path:
            self.answer(200, LISTING)
            return
        found = re.search(r"Credential=([^/]+)/|(Bearer \S+)|SharedKey (\w+):", self.headers.get("Authorization", ""))
        self.server.signers.append(found and (found[1] or found[2] or found[3]))
        if self.server.refuses:
            self.answer(self.server.refuses, b"<Error><Code>AccessDenied</Code><Message>Not yours</Message></Error>")
            return
        modified = {"ETag": '"e"', "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Content_Type": "text/plain"}
        if self.headers.get("Range"):
            self.answer(206, b"abc", Content_Range="bytes 0-2/3", **modified)
        else:
            self.answer(200, b"abc", **modified)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """The server; the environment has no credentials, and points S3, its metadata service and GCS at it."""
    for name in list(os.environ):
        if name.startswith(credentials.PREFIXES):
            monkeypatch.delenv(name)
    with Server() as running:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.address)
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", running.address)
        monkeypatch.setattr(credentials, "METADATA", running.address)
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def signer(server: Server, uri: str = "s3://bucket/a") -> str | None:
    """The key with which a read of `uri` is signed; None if it is not signed."""
    server.signers.clear()
    assert storage.read_bytes(uri) == b"abc"
    (key,) = set(server.signers)
    return key


def profiles(home: Path, *lines: str, file: str = "credentials") -> None:
    (home / ".aws").mkdir(exist_ok=True)
    (home / ".aws" / file).write_text("\n".join(lines))


def test_without_credentials_requests_are_not_signed(server: Server) -> None:
    assert signer(server) is None


def test_variables_come_before_a_profile_and_that_before_the_role_of_the_machine(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.has_role = True
    assert signer(server) == "ROLEKEY"
    profiles(tmp_path, "[default]", "aws_access_key_id = DEFAULTKEY", "aws_secret_access_key = s", "[other]",
             "aws_access_key_id = OTHERKEY", "aws_secret_access_key = s")  # fmt: skip
    monkeypatch.setenv("AWS_REGION", "us-east-2")  # the store of another environment
    assert signer(server) == "DEFAULTKEY"
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert signer(server) == "OTHERKEY"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVIRONMENTKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    assert signer(server) == "ENVIRONMENTKEY"
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert signer(server) is None


def test_a_role_is_found_if_the_metadata_service_answers_the_second_time(server: Server) -> None:
    server.has_role, server.silent = True, 1
    assert signer(server) == "ROLEKEY"


def test_a_client_without_credentials_is_kept_for_a_time_only(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signer(server) is None
    server.has_role = True
    assert signer(server) is None
    now = time.monotonic()
    monkeypatch.setattr(objects, "time", Mock(monotonic=lambda: now + credentials.RENEWED.total_seconds() + 1))
    assert signer(server) == "ROLEKEY"
    server.has_role = False
    assert signer(server) == "ROLEKEY"  # with the same client


@pytest.mark.parametrize("installed", [True, False])
def test_a_profile_is_read_with_and_without_botocore(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if not installed:
        monkeypatch.setattr(credentials.importlib.util, "find_spec", lambda name: None)
    keys = ("aws_access_key_id = MYKEY", "aws_secret_access_key = s%s", "aws_session_token = t")
    profiles(tmp_path, "[profile my]", "region = us-east-1", *keys, file="config")
    monkeypatch.setenv("AWS_PROFILE", "my")
    assert signer(server) == "MYKEY"
    monkeypatch.setenv("AWS_PROFILE", "your")
    with pytest.raises(RecipeError, match="profile"):
        storage.exists("s3://bucket/a")


def test_a_profile_without_keys_of_its_own_needs_botocore(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials.importlib.util, "find_spec", lambda name: None)
    profiles(tmp_path, "[default]", "region = us-east-1", file="config")
    assert signer(server) is None
    profiles(tmp_path, "[default]", "credential_process = echo", file="config")
    monkeypatch.setenv("AWS_REGION", "us-east-2")
    with pytest.raises(RecipeError, match=r"The profile default of AWS has no keys of its own .*pip install botocore"):
        storage.exists("s3://bucket/a")


def test_the_endpoint_of_s3_comes_before_that_of_all_services(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.address)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert signer(server) is None


def test_an_endpoint_without_a_scheme_is_one_of_https(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio:9000")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    assert credentials.store_options("S3Store", "bucket") == {"endpoint": "https://minio:9000"}


@pytest.mark.parametrize("recursive", [False, True])
def test_an_object_whose_name_is_no_path_is_named(server: Server, recursive: bool) -> None:
    with pytest.raises(RecipeError, match=r"^s3://bucket/a: 'a/\./b' cannot be read: .*Rename this object"):
        ObjectFile("s3://bucket/a").listed(recursive)
    with pytest.raises(RecipeError, match=r"^s3://bucket/x//y: 'x//y' cannot be read: it has an empty part"):
        storage.isfile("s3://bucket/x//y")


def test_who_may_not_read_is_told_at_once(server: Server) -> None:
    server.refuses = 403
    with pytest.raises(
        SoupError, match=r"The storage failed at s3://bucket/a: 403 Forbidden\. Check .*credentials"
    ) as error:
        storage.stat("s3://bucket/a")
    assert len(server.signers) == 1
    with pytest.raises(SoupError, match=r"The storage failed at s3://bucket/a: 403 Forbidden \(Not yours\)"):
        storage.RemoteFile("s3://bucket/a", 3).read(0, 3)
    assert error.value.exit_code == 1


def test_google_and_azure_are_read_with_their_variables(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", server.address)
    assert signer(server, "gs://bucket/a") is None
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "of-google")
    assert signer(server, "gs://bucket/a") == "Bearer of-google"
    with pytest.raises(
        RecipeError, match=r"az://container/a: cannot open this storage .AZURE_STORAGE_ACCOUNT_NAME is not set"
    ):
        storage.exists("az://container/a")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server.address)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    for scheme in ("az", "abfs", "azure"):
        assert signer(server, f"{scheme}://container/a") == "account"


@pytest.mark.parametrize(
    ("uri", "kind", "path"),
    [
        ("s3://bucket/a/b", "S3Store", "a/b"),
        ("s3://bucket/", "S3Store", ""),
        ("s3a://bucket", "S3Store", ""),
        ("gs://bucket/a%20b@c", "GCSStore", "a%20b@c"),
        ("gcs://bucket/a", "GCSStore", "a"),
        ("az://container/a/", "AzureStore", "a"),
    ],
)
def test_the_scheme_says_which_storage_it_is(
    server: Server, uri: str, kind: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
    found = object_store(uri)
    assert found is not None
    assert (type(found[0]).__name__, found[1]) == (kind, path)


def test_other_schemes_are_no_object_storage() -> None:
    assert [object_store(uri) for uri in ("hdfs://host/a", "hf://org/name", "/local")] == [None] * 3
    with pytest.raises(RecipeError, match=r"s3:///a names no bucket; expected s3://BUCKET/PATH"):
        object_store("s3:///a")
