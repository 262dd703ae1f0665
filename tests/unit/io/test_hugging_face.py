"""Files of the Hugging Face Hub, from a server in a child process that speaks its protocol."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_soup.errors import RecipeError
from ray_soup.io.hub_path import HubPath, without_commit
from ray_soup.io.mirror import Mirror
from ray_soup.io.redact import redact_uris
from tests.conftest import ROOT
from tests.hub_server import CHUNK, TOKEN, Hub

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"words",
    "additional_chat_templates/tool.jinja": b"template",
    "model.safetensors.index.json": b"{}",
    "model-00001-of-00001.safetensors": bytes(range(256)) * 1200,  # of several chunks
    "checkpoint-2/model.safetensors": b"two",
    "checkpoint-10/model.safetensors": b"ten",
}
START = """
import json, sys
from pathlib import Path
from ray_soup.errors import explain
from ray_soup.io import hugging_face as hf, storage
from ray_soup.io.progress import drain
hf.PAUSES_S = (0,)
def read(path): return Path(path).read_bytes().decode("latin1")
def tell(value): print(json.dumps(value))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub").serving() as hub:
        yield hub


def ask(environment: dict[str, str], script: str) -> Any:
    """Run a script after START in a process of its own, which reads the environment; return what it tells."""
    done = subprocess.run(
        [sys.executable, "-c", START + script], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout)


def faults(environment: dict[str, str], *calls: str) -> list[tuple[int, str]]:
    """Return the exit code and the sentence that each call ends with."""
    tries = [f"try:\n    {call}\nexcept BaseException as error:\n    found.append(explain(error)[::-1])" for call in calls]
    return [(code, text) for code, text in ask(environment, "\n".join(["found = []", *tries, "tell(found)"]))]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf://org/name", HubPath("model", "org/name", "main", "")),
        ("hf://models/org/name@v1.0/", HubPath("model", "org/name", "v1.0", "")),
        ("hf://org/na.me@refs/pr/3/a/b.pt", HubPath("model", "org/na.me", "refs/pr/3", "a/b.pt")),
        ("hf://datasets/org/name@feature%2Fx/a-*.parquet", HubPath("dataset", "org/name", "feature/x", "a-*.parquet")),
    ],
)
def test_a_uri_names_kind_repository_revision_and_path(uri: str, expected: HubPath) -> None:
    assert HubPath.parse(uri) == expected
    assert HubPath.parse(str(expected)) == expected or "/" in expected.revision
    assert redact_uris(uri) == uri


@pytest.mark.parametrize(
    "uri",
    ["hf://gpt2", "hf://gpt2@main", "hf://datasets/squad", "hf://spaces/a/b", "hf://org/name-*", "hf://u:secret@org/name",
     "hf://org/name/../x", "hf://org/name@..%2F..%2Fx", "hf://org/name@", "hf://"],
)  # fmt: skip
def test_what_names_no_repository_is_refused(uri: str) -> None:
    with pytest.raises(RecipeError, match="Fix it") as refused:
        HubPath.parse(uri)
    assert "secret" not in str(refused.value)


def test_a_name_is_without_the_commit() -> None:
    commit = "0123456789" * 4
    assert without_commit(f"hf://org/name@{commit}/run-1") == "hf://org/name/run-1"
    assert without_commit(f"/disk/name@{commit}") == f"/disk/name@{commit}"


def test_a_run_cannot_write_to_the_hub() -> None:
    with pytest.raises(RecipeError, match="cannot write to the Hugging Face Hub"):
        Mirror("hf://org/name/out")


@pytest.mark.slow
def test_storage_reads_a_repository_at_the_commit_of_its_branch(hub: Hub, tmp_path: Path) -> None:
    at = f"hf://org/name@{hub.commit('org/name', FILES)}"
    found = ask(
        hub.environment(tmp_path),
        f"""
uri = hf.pinned("hf://org/name")
Path({str(hub.root)!r}, "models/org/name/refs/main").write_text("f" * 40)  # the branch moves on
found = [uri, hf.pinned("hf://org/name?key=ema"), storage.listdir(uri), list(storage.walk(uri))]
found += [sorted(storage.glob(uri + "/*/*.safetensors")), storage.stat(uri + "/config.json").size]
found += [storage.isdir(uri + "/checkpoint-2"), storage.exists(uri + "/nothing")]
found += [storage.read_bytes(uri + "/checkpoint-10/model.safetensors").decode()]
found += [sorted(p.name for p in Path(hf.settings_folder(uri)).rglob("*") if p.is_file())]
tell(found)
""",
    )
    assert found[:2] == [at, f"{at}?key=ema"]
    assert found[2] == sorted({name.partition("/")[0] for name in FILES})
    assert found[3] == sorted(FILES)
    assert found[4] == [f"{at}/checkpoint-10/model.safetensors", f"{at}/checkpoint-2/model.safetensors"]
    assert found[5:9] == [2, True, False, "ten"]
    assert found[9] == ["config.json", "model.safetensors", "tokenizer.json", "tool.jinja"]  # one was read before
    assert not [line for line in hub.requests() if "model-00001" in line]


@pytest.mark.slow
def test_what_was_read_once_is_read_again_offline_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    first = hub.commit("org/name", FILES)
    hub.commit("datasets/org/texts", {"data/train-0.parquet": b"rows", "README.md": b"card"})
    of_texts = 'read(drain(storage.local_copy("hf://datasets/org/texts/data")) + "/train-0.parquet")'
    script = f'tell([hf.pinned("hf://org/name"), read(hf.settings_folder("hf://org/name") + "/tokenizer.json"), {of_texts}])'
    online, pinned = ask(hub.environment(tmp_path), script), f"hf://org/name@{first}"
    assert online == [pinned, "words", "rows"]
    assert hub.requests()
    offline = hub.environment(tmp_path, HF_HUB_OFFLINE="1")
    assert ask(offline, script) == online
    assert ask(hub.environment(tmp_path), f'tell(read(hf.settings_folder("{pinned}") + "/config.json"))') == "{}"
    assert hub.requests() == []  # a commit that is complete in the cache needs no Hub
    file, branch = faults(
        offline, f'storage.read_bytes("{pinned}/checkpoint-2/model.safetensors")', 'hf.pinned("hf://org/name@other")'
    )
    assert (file[0], branch[0]) == (2, 2)
    assert "checkpoint-2/model.safetensors of this revision is not complete in the cache" in file[1]
    assert f"hf download org/name --revision {first}" in file[1]
    assert "HF_HUB_OFFLINE is set" in branch[1]


@pytest.mark.slow
def test_a_cache_without_a_list_of_the_files_is_used_only_if_it_is_known_to_be_complete(hub: Hub, tmp_path: Path) -> None:
    """As `hf download` leaves it: later versions of huggingface_hub keep the list, earlier ones do not."""
    hub.commit("org/name", FILES)
    download = "import huggingface_hub as hub; hub.snapshot_download('org/name'); tell(hasattr(hub, 'get_cached_repo_tree'))"
    keeps = ask(hub.environment(tmp_path), download)
    offline = hub.environment(tmp_path, HF_HUB_OFFLINE="1")
    found = faults(offline, 'found.append(["read", storage.read_bytes("hf://org/name/tokenizer.json").decode()])')
    assert found == [("read", "words")] if keeps else "not complete in the cache" in found[0][1]


@pytest.mark.slow
def test_headers_of_a_large_file_are_read_without_downloading_it(hub: Hub, tmp_path: Path) -> None:
    commit, file = hub.commit("org/name", FILES), "model-00001-of-00001.safetensors"
    script = f"""
hf.LARGE, hf.BEGINNING = 1000, 500
uri = "hf://org/name/{file}"
source = storage.open_file(uri, storage.stat(uri).size)
begin = bytes(source.read(3, 400))
kept = hf._in_cache(hf.at_commit(hf.HubPath.parse(uri)), "{file}")
whole = bytes(source.read(300, 1000))
tell([kept, begin.decode("latin1"), whole.decode("latin1")])
"""
    kept, begin, whole = ask(hub.environment(tmp_path), script)
    data = FILES[file].decode("latin1")
    assert (kept, begin, whole) == (None, data[3:403], data[300:1300])
    requests = [line.strip() for line in hub.requests() if line.startswith("GET /org/name/resolve")]
    place = f"GET /org/name/resolve/{commit}/{file}"
    assert requests == [f"{place} bytes=3-402", place]


@pytest.mark.slow
def test_errors_of_the_hub_are_sentences(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit("org/name", FILES)
    hub.commit("org/closed", FILES)
    (hub.root / "models" / "org" / "closed" / "gated").touch()
    nothing, tag, other, settings, gated = faults(
        hub.environment(tmp_path), 'hf.pinned("hf://org/nothing")', 'hf.pinned("hf://org/name@v9")',
        f'storage.listdir("hf://org/name@{commit[::-1]}")', 'hf.settings_folder("hf://org/name/checkpoint-2")',
        'hf.settings_folder("hf://org/closed")',
    )  # fmt: skip
    assert [code for code, _ in (nothing, tag, other, settings, gated)] == [2] * 5
    assert "has no such model repository" in nothing[1]
    assert "has no branch, tag or commit 'v9'" in tag[1]
    assert f"has no branch, tag or commit '{commit[::-1]}'" in other[1]
    assert "has no config.json" in settings[1]
    assert "is gated" in gated[1]
    assert "set HF_TOKEN" in gated[1]
    token = hub.environment(tmp_path, HF_TOKEN=TOKEN)
    down = f'Path({str(hub.root)!r}, "down").touch()'
    read, failing = faults(
        token, 'found.append(["read", read(hf.settings_folder("hf://org/closed") + "/tokenizer.json")])',
        f'{down}; hf.pinned("hf://org/name")',
    )  # fmt: skip
    assert read == ("read", "words")
    assert failing[0] == 1
    assert "answered with HTTP status 503" in failing[1]
    [(code, text)] = faults({**token, "HF_ENDPOINT": "http://127.0.0.1:9"}, 'hf.pinned("hf://org/name")')
    assert code == 2
    assert "http://127.0.0.1:9 cannot be reached" in text
    assert "set HF_HUB_OFFLINE=1" in text


@pytest.mark.slow
def test_a_damaged_file_in_the_cache_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    damage = 'Path(drain(storage.local_copy("hf://org/name/tokenizer.json"))).resolve().write_bytes(b"wor")'
    [(code, text)] = faults(hub.environment(tmp_path), f'{damage}; storage.read_bytes("hf://org/name/tokenizer.json")')
    assert code == 1
    assert "has 3 bytes; the Hub lists 5" in text


@pytest.mark.slow
def test_a_rerun_completes_a_killed_download(hub: Hub, tmp_path: Path) -> None:
    large = bytes(range(251)) * (24 * CHUNK // 251)
    hub.commit("org/name", {"model.bin": large, "a.bin": b"a"})
    script = f'{START}\nfor step in hf.download("hf://org/name"): print(*step, flush=True)'
    (hub.root / "slow").touch()
    environment = hub.environment(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    done = total = 0
    for line in process.stdout:
        done, total = map(int, line.split())
        if done > CHUNK:
            break
    process.kill()
    process.wait()
    assert CHUNK < done < total
    (hub.root / "slow").unlink()
    root = ask(environment, 'tell(drain(hf.download("hf://org/name")))')
    assert {f.name: f.read_bytes() for f in Path(root).iterdir()} == {"model.bin": large, "a.bin": b"a"}
