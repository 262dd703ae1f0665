"""Credentials and terminal escapes leave nothing of themselves in what is shown."""

from __future__ import annotations

import re
import string
import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ray_soup.errors import RecipeError
from ray_soup.io.redact import HIDDEN, WITH_PORT, check_uri, printable, redact

PRINTABLE = "".join(c for c in string.printable if c not in "\n\r\x0b\x0c\t") + "äß漢🙂"
SCHEMES = st.sampled_from(["s3", "gs", "hdfs", "abfs", "hf", "http", "https", "redis", "postgresql"])
NAMES = st.text("abcXYZ019._-", max_size=8)
PASSWORDS = st.text(PRINTABLE, min_size=1, max_size=20)
AROUND = st.text(string.ascii_letters + " .,:'\"()[]{}<>=&?%/\n", max_size=30)


def hides(secret: str, text: str, *around: str) -> None:
    """Check that `secret` is not in the redacted text, unless it is also part of what is around it."""
    assume(all(secret not in part for part in (*around, HIDDEN, f"{HIDDEN}@")))
    found = redact(text)
    assert secret not in found
    assert redact(found) == found


@settings(max_examples=200, deadline=None)
@given(SCHEMES, NAMES, PASSWORDS, NAMES, AROUND, AROUND)
def test_a_password_is_hidden_wherever_a_uri_stands(
    scheme: str, user: str, password: str, host: str, before: str, after: str
) -> None:
    assume(scheme not in WITH_PORT or not re.match(r"\d{1,5}[/?#]", password))  # a port
    start, end = f"{before}{scheme}://", f"@{host}/model.pt{after}"
    hides(password, f"{start}{user}:{password}{end}", start, f"{start}{user}", f"{start}{HIDDEN}{end}", end)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["token", "X-Amz-Signature", "secret_key", "sig", "api_key", "AWSAccessKeyId", "password", "auth"]),
    st.text(PRINTABLE.replace(" ", ""), min_size=1, max_size=20),
)
def test_a_secret_parameter_is_hidden(name: str, secret: str) -> None:
    uri = "https://host/a.pt?x=1&"
    hides(secret, f"read {uri}{name}={secret} failed", f"read {uri}{name}=", f"{name}={HIDDEN} failed", "read failed")


@settings(max_examples=100, deadline=None)
@given(SCHEMES, NAMES, PASSWORDS, NAMES)
def test_a_uri_with_a_password_is_refused_without_repeating_it(scheme: str, user: str, password: str, host: str) -> None:
    assume(scheme not in ("http", "https", "hdfs") or not password[0].isdigit())
    uri = f"{scheme}://{user}:{password}@{host}/model.pt"
    said = []
    for one in (uri, f"{scheme}://{user}:another@{host}/model.pt"):
        with pytest.raises(RecipeError, match="must not contain credentials") as refused:
            check_uri(one)
        said.append(str(refused.value))
    assert said[0] == said[1]  # whatever the password


KEPT = [
    "s3://bucket/model@2/x.pt", "hf://org/name@main/model.safetensors", "https://127.0.0.1:8265/api", "s3://bucket/a?key=ema",
    "http://www.w3.org/2000/svg", "model: found nan at element 3 of key.weight", "user@host", "a/b:c", "http://[::1]:8265/x",
    "open_clip:ViT-B-32?classes=10", "data/train-*.parquet", "token_embedding.weight", "https://host/a?metric=val_loss",
    "hdfs://nn:8020/u@x/m.pt", "/zoo/hf_clipvitb32laion2b.pt",
]  # fmt: skip


@pytest.mark.parametrize("text", KEPT)
def test_what_is_not_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("uri", ["s3://b/x@2", "hf://org/name@main", "gs://b/x?metric=acc&mode=max", "https://h:80/a@b"])
def test_uris_without_credentials_are_accepted(uri: str) -> None:
    check_uri(uri)


@pytest.mark.parametrize(
    "uri", ["s3://me@b/x", "s3://me:12/34@b/x", "s3://b/x?access_key=1", "s3://me:a?b@b", "s3://me:p/w@b?key=1", "s3://:p@b"]
)
def test_uris_with_credentials_are_refused(uri: str) -> None:
    with pytest.raises(RecipeError, match="must not contain credentials"):
        check_uri(uri)


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("AWS_SECRET_ACCESS_KEY", "abc/def+ghi=", True),
        ("HF_TOKEN", "hf_abcdefgh", True),
        ("WANDB_API_KEY", "0123456789abcdef", True),
        ("MY_DB_PASSWORD", "pass word@1", True),
        ("RAY_AUTH_TOKEN", "t" * 32, True),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("AWS_SECRET_ACCESS_KEY", "short", False),
        ("APP_SECRET_NAME", "training", False),
    ],
)
def test_values_of_secret_variables_are_hidden(name: str, value: str, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert (value not in redact(f"The request with '{value}' failed")) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "Invalid token hf_" + "aB3" * 10,
        "Authorization: Bearer abc.def-123",
        "AKIA" + "ABCD1234" * 2,
        "secret_key=abc!",
        "x_password=p",
    ],
)
def test_tokens_in_texts_of_libraries_are_hidden(text: str) -> None:
    assert HIDDEN in redact(text)
    assert text.split()[-1] not in redact(text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=40))
def test_printable_text_cannot_control_a_terminal(text: str) -> None:
    found = printable(text)
    assert not [c for c in found if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert not [
        c for c in found if unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI", "FSI", "PDI")
    ]
    found.encode()
    assert printable(found) == found
    assert [c for c in found if c in "\n\t"] == [c for c in text if c in "\n\t"]


def test_escapes_are_shown() -> None:
    assert printable("a\x1b[31m\r\x07\x9b\u202e\udc80b漢🙂\n") == "a\\x1b[31m\\r\\x07\\x9b\\u202e\\udc80b漢🙂\n"
