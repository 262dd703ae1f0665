"""The manifests and the image in cluster/, read as files: versions held together, rights, sizes, deadlines, names.

`faults` says what is wrong with a manifest; a test breaks copies of one to see that it does.
"""

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ray_soup.recipe import make_recipe, parse_overrides
from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
README = (CLUSTER / "README.md").read_text()
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
IN_IMAGE = "/opt/ray_soup/jobs"
LABEL = "ray-soup/cluster"
GiB = 1 << 30
RAY_KINDS = ("RayJob", "RayCluster")
KINDS = ("Namespace", "PersistentVolumeClaim", "NetworkPolicy", "Pod", *RAY_KINDS)
"""No Service and no Ingress, which expose; no Secret, which would hold values."""
RIGHTS = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
VOLUMES = {"emptyDir", "persistentVolumeClaim", "configMap", "projected"}
CACHES = ("HOME", "RAY_SOUP_CACHE", "NUMBA_CACHE_DIR", "MPLCONFIGDIR")
PINS = dict(line.split("==") for line in (CLUSTER / "constraints.txt").read_text().splitlines() if "==" in line)

Manifest = dict[str, Any]


def read_manifests() -> dict[str, list[Manifest]]:
    """Documents by file; without YAML's aliases, so that a change in one place is one."""
    files = sorted(CLUSTER.glob("*.yaml"))
    return {f.name: json.loads(json.dumps(list(yaml.safe_load_all(f.read_text())))) for f in files}


MANIFESTS = read_manifests()
RAY = {name: found[0] for name, found in MANIFESTS.items() if found[0]["kind"] in RAY_KINDS}
JOBS = {name: manifest for name, manifest in RAY.items() if manifest["kind"] == "RayJob"}


class Pod(NamedTuple):
    where: str
    labels: dict[str, str]
    spec: dict[str, Any]
    containers: list[dict[str, Any]]
    start: dict[str, str] | None
    """Ray's start parameters, where it runs Ray."""

    @property
    def volumes(self) -> dict[str, dict[str, Any]]:
        return {volume["name"]: volume for volume in self.spec.get("volumes", [])}

    def at(self, container: dict[str, Any], path: str, kind: str, writable: bool = True) -> dict[str, Any] | None:
        """What stands under `kind` of the volume that holds `path` in a container; None if that is none of this kind."""
        mounts = [m for m in container.get("volumeMounts", []) if f"{path}/".startswith(f"{m['mountPath'].rstrip('/')}/")]
        innermost = max(mounts, key=lambda m: len(m["mountPath"]), default={})
        if writable and innermost.get("readOnly"):
            return None
        return self.volumes.get(innermost.get("name", ""), {}).get(kind)


def cluster_of(manifest: Manifest) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def pods_of(manifest: Manifest) -> Iterator[Pod]:
    """The pods that a manifest makes; the head's with the autoscaler's container, which the operator adds."""
    if manifest["kind"] == "Pod":
        templates = [("pod", manifest, None)]
    elif manifest["kind"] in RAY_KINDS:
        cluster = cluster_of(manifest)
        head = cluster["headGroupSpec"]
        templates = [("head", head["template"], head["rayStartParams"])]
        templates += [(g["groupName"], g["template"], g["rayStartParams"]) for g in cluster["workerGroupSpecs"]]
        if manifest["kind"] == "RayJob":
            templates.append(("submitter", manifest["spec"]["submitterPodTemplate"], None))
    else:
        return
    for where, template, start in templates:
        spec = template["spec"]
        containers = [*spec["containers"], *spec.get("initContainers", [])]
        if where == "head" and cluster.get("enableInTreeAutoscaling"):
            containers.append({"name": "autoscaler", **cluster.get("autoscalerOptions", {})})
        yield Pod(where, template["metadata"].get("labels", {}), spec, containers, start)


def amount(quantity: str | int) -> Fraction:
    """ "500m" -> 1/2, "8Gi" -> 8 * 2**30."""
    number, unit = re.fullmatch(r"([0-9.]+)(m|[KMGT]i)?", str(quantity)).groups()
    factor = Fraction(1, 1000) if unit == "m" else 1 << (10 * " KMGT".index(unit[0])) if unit else 1
    return Fraction(number) * factor


def environment(container: dict[str, Any]) -> dict[str, str | None]:
    return {entry["name"]: entry.get("value") for entry in container.get("env", [])}


# What can be wrong


def faults(manifest: Manifest, ray: str) -> Iterator[str]:
    """What is wrong with a manifest, for an image with this version of Ray."""
    if manifest["kind"] not in KINDS:
        yield f"a {manifest['kind']} has no place here"
        return
    if manifest["kind"] != "Namespace" and manifest["metadata"].get("namespace") != "ray-soup":
        yield "it is in another namespace"
    for pod in pods_of(manifest):
        yield from (f"{pod.where}: {fault}" for check in (rights, resources, volumes, sizes) for fault in check(pod))
    if manifest["kind"] in RAY_KINDS:
        yield from exposure(manifest)
        yield from workers(manifest)
        if cluster_of(manifest).get("rayVersion") != ray:
            yield f"rayVersion is {cluster_of(manifest).get('rayVersion')}, the image has {ray}"
    if manifest["kind"] == "RayJob":
        yield from deadlines(manifest["spec"])
        yield from entrypoint(manifest)


def rights(pod: Pod) -> Iterator[str]:
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "the token of a service account is mounted"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield key
    for container in pod.containers:
        have = {**pod.spec.get("securityContext", {}), **container.get("securityContext", {})}
        wrong = [key for key, value in RIGHTS.items() if have.get(key) != value]
        if wrong or have.get("privileged"):
            yield f"{container['name']}: {', '.join(wrong) or 'privileged'}"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{container['name']}: hostPort"
        for entry in container.get("env", []):
            if re.search(r"SECRET|TOKEN|PASSWORD|KEY|RAY_AUTH", entry["name"]) and "value" in entry:
                yield f"{container['name']}: {entry['name']} is given by value"


def resources(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        have = container.get("resources", {})
        if not have.get("limits") or have.get("limits") != have.get("requests"):
            yield f"{container['name']}: requests are not limits"
        if not {"cpu", "memory", "ephemeral-storage"} <= set(have.get("limits", {})):
            yield f"{container['name']}: cpu, memory or ephemeral-storage is not limited"


def volumes(pod: Pod) -> Iterator[str]:
    """Only volumes that reach nowhere, each with a limit; what must be writable is, with a read-only root."""
    for name, volume in pod.volumes.items():
        if not set(volume) - {"name"} <= VOLUMES:
            yield f"volume {name}: {', '.join(set(volume) - {'name'})}"
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {name}: no sizeLimit"
    used = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", [])}
    if used != set(pod.volumes):
        yield f"volumes and mounts differ: {', '.join(used ^ set(pod.volumes))}"
    for container in pod.containers:
        runs_ray = pod.start is not None and container["name"] != "autoscaler"
        env = environment(container)
        for what, path in {
            "temp": "/tmp",
            **{key: env.get(key, "/") for key in (CACHES if runs_ray else CACHES[:1])},
        }.items():
            if pod.at(container, path, "emptyDir") is None:
                yield f"{container['name']}: {what} ({path}) is not writable"
        if runs_ray and pod.at(container, "/mnt/shared", "persistentVolumeClaim") is None:
            yield f"{container['name']}: no /mnt/shared"
        token = pod.at(container, "/var/run/secrets/kubernetes.io/serviceaccount", "projected", writable=False)
        if (token is not None) != (container["name"] == "autoscaler"):
            yield f"{container['name']}: the Kubernetes API's token is the autoscaler's alone"


def sizes(pod: Pod) -> Iterator[str]:
    container = pod.containers[0]
    limits = container.get("resources", {}).get("limits", {})
    empty = [volume["emptyDir"] for volume in pod.volumes.values() if "emptyDir" in volume]
    disk = sum(amount(e.get("sizeLimit", 0)) for e in empty if e.get("medium") != "Memory")
    if disk >= amount(limits.get("ephemeral-storage", 0)):
        yield "the volumes on disk are larger than ephemeral-storage"
    if pod.start is None:
        return
    shm = pod.at(container, "/dev/shm", "emptyDir") or {}
    size, store = amount(shm.get("sizeLimit", 0)), int(pod.start.get("object-store-memory", 0))
    if shm.get("medium") != "Memory" or not 75 << 20 <= store <= size:
        yield "the object store does not fit into /dev/shm"
    if int(pod.start.get("memory", 1 << 62)) + size + GiB > amount(limits.get("memory", 0)):
        yield "memory for actors, /dev/shm and 1 GiB for Ray itself are more than the limit"
    env = environment(container)
    cache = pod.at(container, env.get("RAY_SOUP_CACHE", "/"), "emptyDir") or {}
    if not 0 < float(env.get("RAY_SOUP_CACHE_GB", 0)) * 1e9 < amount(cache.get("sizeLimit", 0)):
        yield "RAY_SOUP_CACHE_GB is not under the volume's limit"


def exposure(manifest: Manifest) -> Iterator[str]:
    cluster = cluster_of(manifest)
    if cluster.get("authOptions") != {"mode": "token"}:
        yield "no token asked for"
    head = cluster["headGroupSpec"]
    if head.get("serviceType") != "ClusterIP" or head.get("enableIngress") is not False or "headService" in head:
        yield "the head is exposed"
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "actors land on the head"
    found = {pod.labels.get(LABEL) for pod in pods_of(manifest)}
    allowed = [p["spec"] for p in MANIFESTS["networkpolicy.yaml"]]
    same = {"matchLabels": {LABEL: next(iter(found))}}
    rule = {"podSelector": same, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": same}]}]}
    if len(found) > 1 or rule not in allowed:
        yield "no network policy lets its pods, and them alone, reach each other"


def workers(manifest: Manifest) -> Iterator[str]:
    cluster = cluster_of(manifest)
    for group in cluster["workerGroupSpecs"]:
        low, now, high = group["minReplicas"], group["replicas"], group["maxReplicas"]
        if cluster.get("enableInTreeAutoscaling"):
            if not 1 <= low == now < high or cluster.get("autoscalerOptions", {}).get("version") != "v2":
                yield "it does not grow, or not by autoscaler v2"
        elif not 1 <= low == now == high:
            yield "without an autoscaler the numbers of workers are one number"


def deadlines(spec: dict[str, Any]) -> Iterator[str]:
    if spec.get("submissionMode") != "K8sJobMode" or spec["submitterPodTemplate"]["spec"].get("restartPolicy") != "Never":
        yield "not submitted by a Kubernetes Job"
    if spec.get("shutdownAfterJobFinishes") is not True or spec.get("ttlSecondsAfterFinished", 0) < 1:
        yield "the cluster stays when the job is done"
    if spec.get("backoffLimit", 0) < 1 or spec.get("submitterConfig", {}).get("backoffLimit", 0) < 1:
        yield "it is not tried again"
    if not 0 < spec.get("preRunningDeadlineSeconds", 0) < spec.get("activeDeadlineSeconds", 0):
        yield "no deadline"


def entrypoint(manifest: Manifest) -> Iterator[str]:
    """A job that exists, a recipe and an OUT that the head sees, keys that a recipe has, a mesh that the workers hold."""
    python, script, recipe_file, out, *overrides = manifest["spec"]["entrypoint"].split()
    folder, _, job = script.rpartition("/")
    if python != "python" or folder != IN_IMAGE or not (ROOT / "jobs" / job).is_file():
        yield f"no such job: {script}"
    head = next(pods_of(manifest))
    if head.at(head.containers[0], recipe_file, "configMap", writable=False) is None:
        yield f"no such recipe: {recipe_file}"
    if head.at(head.containers[0], out, "persistentVolumeClaim") is None:
        yield f"OUT is not on the shared volume: {out}"
    recipe = make_recipe({"model": "a:b", **parse_overrides(overrides)})
    group = cluster_of(manifest)["workerGroupSpecs"][0]
    worker = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    asked = recipe.actors
    most = {"cpu": asked.cpus, "nvidia.com/gpu": asked.gpus}
    if any(amount(worker.get(key, 0)) != value for key, value in most.items()):
        yield f"a worker has {worker}, an actor asks for {most}"
    if job == "search_soup.py":
        if not 0 < recipe.actors.wait_s <= manifest["spec"]["preRunningDeadlineSeconds"]:
            yield "a trial does not wait for the cluster to grow"
    elif asked.replicas != group["replicas"]:
        yield f"{asked.replicas} actors for {group['replicas']} workers"


# The manifests


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_no_fault(name: str) -> None:
    for manifest in MANIFESTS[name]:
        assert list(faults(manifest, PINS["ray"])) == []


def test_everything_that_was_asked_for_is_there() -> None:
    assert set(JOBS) == {"rayjob-cpu.yaml", "rayjob-gpu.yaml", "rayjob-search.yaml"}
    assert set(RAY) == {*JOBS, "raycluster.yaml"}
    entrypoints = {name: manifest["spec"]["entrypoint"].split()[1] for name, manifest in JOBS.items()}
    assert entrypoints["rayjob-cpu.yaml"] == entrypoints["rayjob-gpu.yaml"] == f"{IN_IMAGE}/learn_soup.py"
    assert entrypoints["rayjob-search.yaml"] == f"{IN_IMAGE}/search_soup.py"
    assert [name for name, m in RAY.items() if cluster_of(m).get("enableInTreeAutoscaling")] == ["rayjob-search.yaml"]
    gpus = [n for n, m in RAY.items() if "nvidia.com/gpu" in json.dumps(cluster_of(m)["workerGroupSpecs"][0])]
    assert gpus == ["rayjob-gpu.yaml"]


SPEC = "spec.rayClusterSpec"
WORKER = f"{SPEC}.workerGroupSpecs.0.template.spec"
HEAD = f"{SPEC}.headGroupSpec.template.spec"
SUBMITTER = "spec.submitterPodTemplate.spec"
CPU_JOB = f"python {IN_IMAGE}/learn_soup.py /etc/ray_soup/recipe.yaml /mnt/shared/out"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("kind", "Service", "a Service has no place here"),
        ("metadata.namespace", "default", "it is in another namespace"),
        (f"{SPEC}.rayVersion", "2.59.0", "rayVersion is 2.59.0"),
        (f"{SPEC}.authOptions.mode", "disabled", "no token asked for"),
        (f"{SPEC}.headGroupSpec.serviceType", "NodePort", "the head is exposed"),
        (f"{SPEC}.headGroupSpec.serviceType", "LoadBalancer", "the head is exposed"),
        (f"{SPEC}.headGroupSpec.enableIngress", True, "the head is exposed"),
        (f"{SPEC}.headGroupSpec.rayStartParams.num-cpus", "2", "actors land on the head"),
        (f"{SPEC}.workerGroupSpecs.0.template.metadata.labels", {}, "no network policy"),
        (f"{WORKER}.hostNetwork", True, "cpu: hostNetwork"),
        (f"{WORKER}.automountServiceAccountToken", None, "cpu: the token of a service account is mounted"),
        (f"{WORKER}.volumes.1", {"name": "shm", "hostPath": {"path": "/dev/shm"}}, "cpu: volume shm: hostPath"),
        (f"{WORKER}.securityContext.runAsNonRoot", False, "cpu: ray-worker: runAsNonRoot"),
        (f"{WORKER}.securityContext.runAsUser", 0, "cpu: ray-worker: runAsUser"),
        (f"{WORKER}.securityContext.seccompProfile", None, "cpu: ray-worker: seccompProfile"),
        (f"{WORKER}.containers.0.securityContext.runAsUser", 0, "cpu: ray-worker: runAsUser"),
        (f"{HEAD}.containers.0.securityContext.privileged", True, "head: ray-head: privileged"),
        (f"{HEAD}.containers.0.securityContext.allowPrivilegeEscalation", True, "head: ray-head: allowPrivilegeEscalation"),
        (f"{HEAD}.containers.0.securityContext.capabilities", {"drop": []}, "head: ray-head: capabilities"),
        (f"{SUBMITTER}.containers.0.securityContext.readOnlyRootFilesystem", None, "submitter: submitter: readOnlyRoot"),
        (f"{SUBMITTER}.containers.0.env.1", {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}, "is given by value"),
        (f"{HEAD}.containers.0.env.0", {"name": "RAY_AUTH_MODE", "value": "disabled"}, "RAY_AUTH_MODE is given by value"),
        (f"{WORKER}.containers.0.resources.requests.memory", "1Gi", "cpu: ray-worker: requests are not limits"),
        (f"{SUBMITTER}.containers.0.resources", {}, "submitter: submitter: requests are not limits"),
        (f"{WORKER}.containers.0.resources", {"limits": {"cpu": 4}, "requests": {"cpu": 4}}, "is not limited"),
        (f"{SPEC}.workerGroupSpecs.0.rayStartParams.object-store-memory", "1073741824", "does not fit into /dev/shm"),
        (f"{SPEC}.workerGroupSpecs.0.rayStartParams.memory", "16106127360", "are more than the limit"),
        (f"{WORKER}.volumes.1.emptyDir.medium", "", "does not fit into /dev/shm"),
        (f"{WORKER}.volumes.2.emptyDir", {}, "cpu: volume tmp: no sizeLimit"),
        (f"{WORKER}.volumes.3.emptyDir.sizeLimit", "20Gi", "RAY_SOUP_CACHE_GB is not under"),
        (f"{WORKER}.volumes.3.emptyDir.sizeLimit", "64Gi", "larger than ephemeral-storage"),
        (f"{WORKER}.containers.0.env.3.value", "/numba", "NUMBA_CACHE_DIR (/numba) is not writable"),
        (f"{WORKER}.containers.0.volumeMounts.2.mountPath", "/var/tmp", "temp (/tmp) is not writable"),
        (f"{WORKER}.containers.0.volumeMounts.0.mountPath", "/data", "no /mnt/shared"),
        ("spec.submissionMode", "HTTPMode", "not submitted by a Kubernetes Job"),
        ("spec.shutdownAfterJobFinishes", False, "the cluster stays"),
        ("spec.backoffLimit", None, "it is not tried again"),
        ("spec.activeDeadlineSeconds", None, "no deadline"),
        ("spec.entrypoint", f"python {IN_IMAGE}/learn.py /etc/ray_soup/r /mnt/shared/out", "no such job"),
        ("spec.entrypoint", f"python {IN_IMAGE}/learn_soup.py /etc/r.yaml /mnt/shared/out", "no such recipe"),
        ("spec.entrypoint", f"python {IN_IMAGE}/learn_soup.py /etc/ray_soup/r /cache/out", "OUT is not on the shared"),
        ("spec.entrypoint", f"{CPU_JOB} actors.replicas=5 actors.cpus=4", "5 actors for 4 workers"),
        ("spec.entrypoint", f"{CPU_JOB} actors.replicas=4 actors.cpus=8", "an actor asks for"),
        (f"{SPEC}.workerGroupSpecs.0.maxReplicas", 8, "one number"),
    ],
)
def test_a_broken_copy_is_found_out(path: str, value: Any, said: str) -> None:
    manifest = json.loads(json.dumps(JOBS["rayjob-cpu.yaml"]))
    broken: Any = manifest
    *parts, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parts:
        broken = broken[part]
    if value is None:
        del broken[last]
    elif isinstance(broken, list) and last == len(broken):
        broken.append(value)
    else:
        broken[last] = value
    assert any(said in fault for fault in faults(manifest, PINS["ray"]))


def test_only_the_autoscaler_holds_a_token_and_it_has_no_more_rights_than_the_others() -> None:
    for key, said in (("securityContext", "autoscaler: allowPriv"), ("resources", "autoscaler: requests"), ("env", "HOME")):
        manifest = json.loads(json.dumps(JOBS["rayjob-search.yaml"]))
        del cluster_of(manifest)["autoscalerOptions"][key]
        assert any(said in fault for fault in faults(manifest, PINS["ray"]))
    manifest = json.loads(json.dumps(JOBS["rayjob-search.yaml"]))
    driver = cluster_of(manifest)["headGroupSpec"]["template"]["spec"]["containers"][0]
    driver["volumeMounts"].append(cluster_of(manifest)["autoscalerOptions"]["volumeMounts"][-1])
    assert any("ray-head: the Kubernetes API's token" in fault for fault in faults(manifest, PINS["ray"]))


def test_nothing_reaches_a_pod_that_no_policy_lets_in() -> None:
    policies = [policy["spec"] for policy in MANIFESTS["networkpolicy.yaml"]]
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in policies
    labels = [next(pods_of(manifest)).labels[LABEL] for manifest in RAY.values()]
    assert len(set(labels)) == len(labels), "two clusters could reach each other"
    among = [p["podSelector"]["matchLabels"][LABEL] for p in policies if LABEL in p["podSelector"].get("matchLabels", {})]
    assert sorted(among) == sorted(labels)
    (operator,) = (p for p in policies if p["podSelector"].get("matchLabels") == {"ray.io/node-type": "head"})
    (rule,) = operator["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert {"namespaceSelector", "podSelector"} == set(rule["from"][0])
    assert len(policies) == 2 + len(labels)


def test_the_namespace_refuses_pods_with_more_rights() -> None:
    (namespace,) = MANIFESTS["namespace.yaml"]
    assert namespace["metadata"]["name"] == "ray-soup"
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_what_is_named_is_defined_here_or_made_by_a_command_of_the_readme() -> None:
    claims = {m["metadata"]["name"] for m in MANIFESTS["storage.yaml"] if m["spec"]["accessModes"] == ["ReadWriteMany"]}
    made = {kind: set(re.findall(rf"create {kind} (\S+)", README)) for kind in ("configmap", "secret generic")}
    for pod in (pod for found in MANIFESTS.values() for manifest in found for pod in pods_of(manifest)):
        for volume in pod.volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "configMap" in volume:
                assert volume["configMap"]["name"] in made["configmap"]
            for source in volume.get("projected", {}).get("sources", []):
                assert source.get("configMap", {}).get("name") in (None, "kube-root-ca.crt")
        for container in pod.containers:
            references = [source["secretRef"] for source in container.get("envFrom", [])]
            assert (len(references) == 1) == (container["name"] in ("ray-head", "ray-worker"))
            for reference in references:
                assert reference == {"name": "ray-soup-storage", "optional": True}
                assert reference["name"] in made["secret generic"]


# Versions and the image


def test_versions_are_held_together() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.10 has none
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = project["version"]
    images = set(re.findall(r"image: (?:&\w+ )?(\S+)", "".join((CLUSTER / name).read_text() for name in MANIFESTS)))
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


def test_the_image_is_pinned_and_runs_as_a_user_without_rights() -> None:
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


def test_the_readme_names_every_file_and_only_files_that_there_are() -> None:
    rows = re.findall(r"^\| (`.+?) \|", README.partition("## 1.")[0], re.M)
    there = {path.name for path in CLUSTER.iterdir()} - {"README.md"}
    assert set(re.findall(r"`([\w.-]+)`", "".join(rows))) == there
    named = set(re.findall(r"(?:cluster/|`)([\w-]+\.yaml)\b", README)) - {"recipe.yaml"}
    assert named <= set(MANIFESTS)


def test_names_in_the_readmes_commands_are_those_of_the_manifests() -> None:
    names = {(m["kind"], m["metadata"]["name"]) for found in MANIFESTS.values() for m in found}
    for job in re.findall(r"(?:get rayjob|job/) ?([\w-]+)", README.replace("job/", "job/ ")):
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
    assert set(re.findall(r"/mnt/shared/out/(?:cpu|gpu|search)", README)) <= outs
