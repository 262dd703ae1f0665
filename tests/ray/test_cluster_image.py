"""The image of the cluster and its README: pinned versions, an unprivileged user, names that match the manifests."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.ray.manifests import CLUSTER, DOCKERFILE, FILES, IN_IMAGE, JOBS, MANIFESTS, PINS, RAY, README, RIGHTS, pods_of


def test_versions_agree_in_the_image_the_manifests_and_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.10 has none
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = project["version"]
    images = set(re.findall(r"image: (?:&\w+ )?(\S+)", "".join(FILES.values())))
    images -= {"*image"}
    assert images == {f"ghcr.io/OWNER/ray-soup:{version}-{variant}" for variant in ("cpu", "cuda")}
    assert images == set(re.findall(r"ghcr\.io/\S+", README))
    assert set(re.findall(r"ghcr\.io/\S+", DOCKERFILE)) < images
    for name, manifest in RAY.items():
        used = {container["image"] for pod in pods_of(manifest) for container in pod.containers if "image" in container}
        assert len(used) == 1, "Ray and Python must be the same everywhere"
        assert used.pop().endswith("-cuda" if name == "rayjob-gpu.yaml" else "-cpu")

    (python,) = re.findall(r"^FROM python:(\d+\.\d+\.\d+)-slim-\w+$", DOCKERFILE, re.M)
    assert SpecifierSet(project["requires-python"]).contains(python)
    assert f"Python {python.rpartition('.')[0]}." in (CLUSTER / "constraints.txt").read_text()
    (extras,) = re.findall(r"/tmp/src\[([\w,]+)\]", DOCKERFILE)
    wanted = project["dependencies"] + [r for e in extras.split(",") for r in project["optional-dependencies"][e]]
    for requirement in map(Requirement, wanted):
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement} and {pin} in constraints.txt"
    assert set(re.findall(r"ray\[default\]==([\d.]+)", README)) == {PINS["ray"]}
    assert set(re.findall(r"--version (\S+)", README)) == set(re.findall(r"KubeRay (\d+\.\d+\.\d+)", README)) == {"1.7.0"}


def test_the_image_is_pinned_and_runs_as_an_unprivileged_user() -> None:
    assert re.findall(r"^ARG VARIANT=(\w+)$", DOCKERFILE, re.M) == ["cpu"]
    assert "cpu) from=" in DOCKERFILE
    assert "cuda) from=" in DOCKERFILE
    installs = re.findall(r"pip install .*", DOCKERFILE)
    assert len(installs) == 2
    assert all("--constraint /tmp/constraints.txt" in line for line in installs)
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.M) == [str(RIGHTS["runAsUser"])]
    assert "useradd --uid 1000 " in DOCKERFILE
    assert DOCKERFILE.index("COPY jobs") < DOCKERFILE.index("USER 1000")
    assert f"COPY jobs {IN_IMAGE}\n" in DOCKERFILE
    sources = {source for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for source in line.split()[:-1]}
    everything, *kept = [
        line for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert everything == "*"
    assert {line[1:] for line in kept if line.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources)


# The README


def test_the_readme_lists_exactly_the_files_of_the_folder() -> None:
    rows = re.findall(r"^\| (`.+?) \|", README.partition("## 1.")[0], re.M)
    existing = {path.name for path in CLUSTER.iterdir()} - {"README.md"}
    assert set(re.findall(r"`([\w.-]+)`", "".join(rows))) == existing
    named = set(re.findall(r"(?:cluster/|`)([\w-]+\.yaml)\b", README)) - {"recipe.yaml"}
    assert named <= {name.rpartition("/")[2] for name in MANIFESTS}


def test_names_in_the_commands_of_the_readme_match_the_manifests() -> None:
    names = {(m["kind"], m["metadata"]["name"]) for found in MANIFESTS.values() for m in found}
    for job in re.findall(r"(?:get rayjob |\bjob/)([\w-]+)", README):
        assert ("RayJob", job) in names
    for service in re.findall(r"svc/([\w-]+)-head-svc", README):
        assert ("RayCluster", service) in names
    for secret in re.findall(r"get secret ([\w-]+)", README):
        assert ("RayCluster", secret) in names
    for pod in re.findall(r"(?:exec |cp \S+ )([\w-]+-files)", README):
        assert ("Pod", pod) in names
    assert set(re.findall(r"kubectl -n (\S+)", README)) == {"ray-soup"}
    outs = {manifest["spec"]["entrypoint"].split()[3] for manifest in JOBS.values()}
    assert len(outs) == len(JOBS)
    assert {f"s3://BUCKET/out/{name}" for name in re.findall(r"your-bucket/out/(cpu|gpu|search)", README)} <= outs
