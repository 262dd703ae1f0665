"""The manifests in cluster/, read as files, and `faults`: rules on versions, rights, sizes, deadlines and names."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import yaml

from ray_soup.recipe import make_recipe, parse_overrides
from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
README = (CLUSTER / "README.md").read_text()
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
IN_IMAGE = "/opt/ray_soup/jobs"
LABEL = "ray-soup/cluster"
GiB = 1 << 30
RAY_KINDS = ("RayJob", "RayCluster")
CLUSTER_WIDE = ("Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue")
RECURRING = ("ServiceAccount", "Role", "RoleBinding", "CronJob")
KINDS = (
    *CLUSTER_WIDE, *RECURRING, *RAY_KINDS,
    "PersistentVolumeClaim", "NetworkPolicy", "PodDisruptionBudget", "LocalQueue", "Pod",
)  # fmt: skip
"""No Service and no Ingress, which would expose the cluster; no Secret, which would hold values."""
HOLD_TOKENS = ("autoscaler", "creator")
"""The containers that may call the Kubernetes API."""
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


def parse(text: str) -> list[Manifest]:
    """Read all documents without YAML aliases: a change in one place must not change another."""
    return json.loads(json.dumps(list(yaml.safe_load_all(text))))


def render(variant: str) -> list[Manifest]:
    """Render a variant as the README says, without an API server."""
    command = ["kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(CLUSTER / variant)]
    return parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


FILES = {
    str(file.relative_to(CLUSTER)): file.read_text()
    for file in sorted(CLUSTER.rglob("*.yaml"))
    if file.name != "kustomization.yaml"
}
VARIANTS = sorted(file.parent.name for file in CLUSTER.glob("*/kustomization.yaml"))
MANIFESTS = {name: parse(text) for name, text in FILES.items()}
RAY = {name: found[0] for name, found in MANIFESTS.items() if found[0]["kind"] in RAY_KINDS}
JOBS = {name: manifest for name, manifest in RAY.items() if manifest["kind"] == "RayJob"}


class Pod(NamedTuple):
    where: str
    labels: dict[str, str]
    spec: dict[str, Any]
    containers: list[dict[str, Any]]
    start: dict[str, str] | None
    """Ray's start parameters, if it runs Ray."""

    @property
    def volumes(self) -> dict[str, dict[str, Any]]:
        return {volume["name"]: volume for volume in self.spec.get("volumes", [])}

    def at(self, container: dict[str, Any], path: str, kind: str, writable: bool = True) -> dict[str, Any] | None:
        """The section `kind` of the volume that holds `path` in a container; None if the volume is of another kind."""
        mounts = [m for m in container.get("volumeMounts", []) if f"{path}/".startswith(f"{m['mountPath'].rstrip('/')}/")]
        innermost = max(mounts, key=lambda m: len(m["mountPath"]), default={})
        if writable and innermost.get("readOnly"):
            return None
        return self.volumes.get(innermost.get("name", ""), {}).get(kind)


def cluster_of(manifest: Manifest) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def pods_of(manifest: Manifest) -> Iterator[Pod]:
    """The pods that a manifest creates; the head with the autoscaler's container, which the operator adds."""
    if manifest["kind"] == "Pod":
        templates = [("pod", manifest, None)]
    elif manifest["kind"] == "CronJob":
        templates = [("creator", manifest["spec"]["jobTemplate"]["spec"]["template"], None)]
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
        yield Pod(where, template.get("metadata", {}).get("labels", {}), spec, containers, start)


def amount(quantity: str | int) -> Fraction:
    """ "500m" -> 1/2, "8Gi" -> 8 * 2**30."""
    number, unit = re.fullmatch(r"([0-9.]+)(m|[KMGT]i)?", str(quantity)).groups()
    factor = Fraction(1, 1000) if unit == "m" else 1 << (10 * " KMGT".index(unit[0])) if unit else 1
    return Fraction(number) * factor


def environment(container: dict[str, Any]) -> dict[str, str | None]:
    return {entry["name"]: entry.get("value") for entry in container.get("env", [])}


# Faults


def faults(manifest: Manifest, ray: str) -> Iterator[str]:
    """Find what is wrong with a manifest, for an image with this version of Ray."""
    if manifest["kind"] not in KINDS:
        yield f"a {manifest['kind']} is not allowed here"
        return
    if manifest["kind"] not in CLUSTER_WIDE and manifest["metadata"].get("namespace") != "ray-soup":
        yield "wrong namespace"
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
        yield "a service account token is mounted"
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
                yield f"{container['name']}: {entry['name']} is a literal value"


def resources(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        have = container.get("resources", {})
        if not have.get("limits") or have.get("limits") != have.get("requests"):
            yield f"{container['name']}: requests differ from limits"
        if not {"cpu", "memory", "ephemeral-storage"} <= set(have.get("limits", {})):
            yield f"{container['name']}: cpu, memory or ephemeral-storage is not limited"


def volumes(pod: Pod) -> Iterator[str]:
    """Volumes must not reach the host and must have a limit; with a read-only root, caches must be writable."""
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
        token = pod.at(container, "/var/run/secrets/kubernetes.io/serviceaccount", "projected", writable=False)
        if (token is not None) != (container["name"] in HOLD_TOKENS):
            yield f"{container['name']}: only {' and '.join(HOLD_TOKENS)} may hold a Kubernetes API token"


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
        yield "no token required"
    head = cluster["headGroupSpec"]
    if head.get("serviceType") != "ClusterIP" or head.get("enableIngress") is not False or "headService" in head:
        yield "the head is exposed"
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "actors would run on the head"
    found = {pod.labels.get(LABEL) for pod in pods_of(manifest)}
    allowed = [p["spec"] for p in MANIFESTS["networkpolicy.yaml"]]
    same = {"matchLabels": {LABEL: next(iter(found))}}
    rule = {"podSelector": same, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": same}]}]}
    if len(found) > 1 or rule not in allowed:
        yield "no network policy admits its pods and no others"


def workers(manifest: Manifest) -> Iterator[str]:
    cluster = cluster_of(manifest)
    for group in cluster["workerGroupSpecs"]:
        low, now, high = group["minReplicas"], group["replicas"], group["maxReplicas"]
        if cluster.get("enableInTreeAutoscaling"):
            if not 1 <= low == now < high or cluster.get("autoscalerOptions", {}).get("version") != "v2":
                yield "the workers do not scale with autoscaler v2"
        elif not 1 <= low == now == high:
            yield "without an autoscaler the worker counts must be equal"


def deadlines(spec: dict[str, Any]) -> Iterator[str]:
    if spec.get("submissionMode") != "K8sJobMode" or spec["submitterPodTemplate"]["spec"].get("restartPolicy") != "Never":
        yield "not submitted by a Kubernetes Job"
    if spec.get("shutdownAfterJobFinishes") is not True or spec.get("ttlSecondsAfterFinished", 0) < 1:
        yield "the cluster outlives the job"
    if spec.get("backoffLimit", 0) < 1 or spec.get("submitterConfig", {}).get("backoffLimit", 0) < 1:
        yield "no retries"
    start = 1 if spec.get("suspend") else spec.get("preRunningDeadlineSeconds", 0)  # it may wait in a queue for longer
    if not 0 < start < spec.get("activeDeadlineSeconds", 0):
        yield "no deadline"


def entrypoint(manifest: Manifest) -> Iterator[str]:
    """The job exists, the head sees recipe and OUT, the recipe keys are valid, and the workers hold the mesh."""
    python, script, recipe_file, out, *overrides = manifest["spec"]["entrypoint"].split()
    folder, _, job = script.rpartition("/")
    if python != "python" or folder != IN_IMAGE or not (ROOT / "jobs" / job).is_file():
        yield f"no such job: {script}"
    head = next(pods_of(manifest))
    if head.at(head.containers[0], recipe_file, "configMap", writable=False) is None:
        yield f"no such recipe: {recipe_file}"
    shared = [pod.at(pod.containers[0], out, "persistentVolumeClaim") for pod in pods_of(manifest) if pod.start is not None]
    if not out.startswith("s3://BUCKET/") and (None in shared or len(set(map(str, shared))) > 1):
        yield f"OUT is neither in the bucket nor on a volume that head and workers share: {out}"
    recipe = make_recipe({"model": "a:b", **parse_overrides(overrides)})
    group = cluster_of(manifest)["workerGroupSpecs"][0]
    worker = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    wanted = recipe.actors
    most = {"cpu": wanted.cpus, "nvidia.com/gpu": wanted.gpus}
    if any(amount(worker.get(key, 0)) != value for key, value in most.items()):
        yield f"a worker has {worker}, an actor requests {most}"
    if job == "search_soup.py":
        if not 0 < recipe.actors.wait_s <= manifest["spec"]["preRunningDeadlineSeconds"]:
            yield "a trial does not wait for new nodes"
    elif wanted.replicas != group["replicas"]:
        yield f"{wanted.replicas} actors for {group['replicas']} workers"
