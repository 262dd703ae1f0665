"""The manifests in cluster/ have no faults, and a fault in a copy of one is detected."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.ray.manifests import (
    IN_IMAGE,
    JOBS,
    LABEL,
    MANIFESTS,
    PINS,
    RAY,
    README,
    VARIANTS,
    Manifest,
    Pod,
    amount,
    cluster_of,
    faults,
    pods_of,
    render,
)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_no_faults(name: str) -> None:
    for manifest in MANIFESTS[name]:
        assert list(faults(manifest, PINS["ray"])) == []


def test_the_expected_jobs_and_clusters_exist() -> None:
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
CPU_JOB = f"python {IN_IMAGE}/learn_soup.py /etc/ray_soup/recipe.yaml s3://BUCKET/out"


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("kind", "Service", "a Service is not allowed here"),
        ("metadata.namespace", "default", "wrong namespace"),
        (f"{SPEC}.rayVersion", "2.59.0", "rayVersion is 2.59.0"),
        (f"{SPEC}.authOptions.mode", "disabled", "no token required"),
        (f"{SPEC}.headGroupSpec.serviceType", "NodePort", "the head is exposed"),
        (f"{SPEC}.headGroupSpec.serviceType", "LoadBalancer", "the head is exposed"),
        (f"{SPEC}.headGroupSpec.enableIngress", True, "the head is exposed"),
        (f"{SPEC}.headGroupSpec.rayStartParams.num-cpus", "2", "actors would run on the head"),
        (f"{SPEC}.workerGroupSpecs.0.template.metadata.labels", {}, "no network policy"),
        (f"{WORKER}.hostNetwork", True, "cpu: hostNetwork"),
        (f"{WORKER}.automountServiceAccountToken", None, "cpu: a service account token is mounted"),
        (f"{WORKER}.volumes.0", {"name": "shm", "hostPath": {"path": "/dev/shm"}}, "cpu: volume shm: hostPath"),
        (f"{WORKER}.securityContext.runAsNonRoot", False, "cpu: ray-worker: runAsNonRoot"),
        (f"{WORKER}.securityContext.runAsUser", 0, "cpu: ray-worker: runAsUser"),
        (f"{WORKER}.securityContext.seccompProfile", None, "cpu: ray-worker: seccompProfile"),
        (f"{WORKER}.containers.0.securityContext.runAsUser", 0, "cpu: ray-worker: runAsUser"),
        (f"{HEAD}.containers.0.securityContext.privileged", True, "head: ray-head: privileged"),
        (f"{HEAD}.containers.0.securityContext.allowPrivilegeEscalation", True, "head: ray-head: allowPrivilegeEscalation"),
        (f"{HEAD}.containers.0.securityContext.capabilities", {"drop": []}, "head: ray-head: capabilities"),
        (f"{SUBMITTER}.containers.0.securityContext.readOnlyRootFilesystem", None, "submitter: submitter: readOnlyRoot"),
        (f"{SUBMITTER}.containers.0.env.1", {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}, "is a literal value"),
        (f"{HEAD}.containers.0.env.0", {"name": "RAY_AUTH_MODE", "value": "disabled"}, "RAY_AUTH_MODE is a literal value"),
        (f"{WORKER}.containers.0.resources.requests.memory", "1Gi", "cpu: ray-worker: requests differ from limits"),
        (f"{SUBMITTER}.containers.0.resources", {}, "submitter: submitter: requests differ from limits"),
        (f"{WORKER}.containers.0.resources", {"limits": {"cpu": 4}, "requests": {"cpu": 4}}, "is not limited"),
        (f"{SPEC}.workerGroupSpecs.0.rayStartParams.object-store-memory", "1073741824", "does not fit into /dev/shm"),
        (f"{SPEC}.workerGroupSpecs.0.rayStartParams.memory", "16106127360", "are more than the limit"),
        (f"{WORKER}.volumes.0.emptyDir.medium", "", "does not fit into /dev/shm"),
        (f"{WORKER}.volumes.1.emptyDir", {}, "cpu: volume tmp: no sizeLimit"),
        (f"{WORKER}.volumes.2.emptyDir.sizeLimit", "20Gi", "RAY_SOUP_CACHE_GB is not under"),
        (f"{WORKER}.volumes.2.emptyDir.sizeLimit", "64Gi", "larger than ephemeral-storage"),
        (f"{WORKER}.containers.0.env.3.value", "/numba", "NUMBA_CACHE_DIR (/numba) is not writable"),
        (f"{WORKER}.containers.0.volumeMounts.1.mountPath", "/var/tmp", "temp (/tmp) is not writable"),
        ("spec.submissionMode", "HTTPMode", "not submitted by a Kubernetes Job"),
        ("spec.shutdownAfterJobFinishes", False, "the cluster outlives"),
        ("spec.backoffLimit", None, "no retries"),
        ("spec.activeDeadlineSeconds", None, "no deadline"),
        ("spec.entrypoint", f"python {IN_IMAGE}/learn.py /etc/ray_soup/r s3://BUCKET/out", "no such job"),
        ("spec.entrypoint", f"python {IN_IMAGE}/learn_soup.py /etc/r.yaml s3://BUCKET/out", "no such recipe"),
        ("spec.entrypoint", f"python {IN_IMAGE}/learn_soup.py /etc/ray_soup/r /cache/out", "OUT is neither in"),
        ("spec.entrypoint", f"{CPU_JOB} actors.replicas=5 actors.cpus=4", "5 actors for 4 workers"),
        ("spec.entrypoint", f"{CPU_JOB} actors.replicas=4 actors.cpus=8", "an actor requests"),
        (f"{SPEC}.workerGroupSpecs.0.maxReplicas", 8, "worker counts must be equal"),
    ],
)
def test_a_fault_is_detected(path: str, value: Any, fault: str) -> None:
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
    assert any(fault in found for found in faults(manifest, PINS["ray"]))


def test_only_the_autoscaler_holds_a_token_and_its_container_is_restricted_too() -> None:
    for key, fault in (("securityContext", "autoscaler: allowPriv"), ("resources", "autoscaler: requests"), ("env", "HOME")):
        manifest = json.loads(json.dumps(JOBS["rayjob-search.yaml"]))
        del cluster_of(manifest)["autoscalerOptions"][key]
        assert any(fault in found for found in faults(manifest, PINS["ray"]))
    manifest = json.loads(json.dumps(JOBS["rayjob-search.yaml"]))
    driver = cluster_of(manifest)["headGroupSpec"]["template"]["spec"]["containers"][0]
    driver["volumeMounts"].append(cluster_of(manifest)["autoscalerOptions"]["volumeMounts"][-1])
    assert any("ray-head: only autoscaler and creator may hold" in fault for fault in faults(manifest, PINS["ray"]))


def test_pods_are_reachable_only_through_a_network_policy() -> None:
    policies = [policy["spec"] for policy in MANIFESTS["networkpolicy.yaml"]]
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in policies
    labels = [next(pods_of(manifest)).labels[LABEL] for manifest in RAY.values()] + ["nightly"]
    assert len(set(labels)) == len(labels), "two clusters could reach each other"
    among = [p["podSelector"]["matchLabels"][LABEL] for p in policies if LABEL in p["podSelector"].get("matchLabels", {})]
    assert sorted(among) == sorted(labels)
    (operator,) = (p for p in policies if p["podSelector"].get("matchLabels") == {"ray.io/node-type": "head"})
    (rule,) = operator["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert {"namespaceSelector", "podSelector"} == set(rule["from"][0])
    assert len(policies) == 2 + len(labels)


def test_the_namespace_enforces_restricted_pods() -> None:
    (namespace,) = MANIFESTS["namespace.yaml"]
    assert namespace["metadata"]["name"] == "ray-soup"
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_command_of_the_readme_replaces_every_placeholder(tmp_path: Path) -> None:
    for folder in ("cluster", "jobs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (command,) = re.findall(r"^sed -i .*(?:\\\n.*)*$", README, re.MULTILINE)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert not [f for f in (tmp_path / "cluster").rglob("*.yaml") if re.search("OWNER|BUCKET", f.read_text())]
    uploaded = set(re.findall(r"^aws s3 cp .* (s3://\S+)$", README, re.MULTILINE))
    read = re.findall(r"s3://\S+", (tmp_path / "jobs" / "learn_soup.yaml").read_text())
    assert {uri.removesuffix("/*.safetensors") for uri in read} == uploaded


def test_every_referenced_object_is_defined_or_created_by_a_command_in_the_readme() -> None:
    (claim,) = MANIFESTS["shared-volume/storage.yaml"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    classes = [m["metadata"]["name"] for m in MANIFESTS["disruption.yaml"] if m["kind"] == "PriorityClass"]
    made = {kind: set(re.findall(rf"create {kind} (\S+)", README)) for kind in ("configmap", "secret generic")}
    for pod in (pod for found in MANIFESTS.values() for manifest in found for pod in pods_of(manifest)):
        assert ([pod.spec.get("priorityClassName")] == classes) == (pod.where == "head")
        for volume in pod.volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
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


# Variants, queues, priorities, budgets


@pytest.fixture(scope="module")
def variants() -> dict[str, dict[str, Manifest]]:
    """Every variant as kubectl renders it, by kind."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    return {name: {manifest["kind"]: manifest for manifest in render(name)} for name in VARIANTS}


def worker_of(job: Manifest) -> Pod:
    return next(pod for pod in pods_of(job) if pod.where == "cpu")


def test_a_variant_is_the_same_job_with_its_own_additions(variants: dict[str, dict[str, Manifest]]) -> None:
    assert set(variants) == {"kueue", "shared-volume", "spot"}
    for found in variants.values():
        for manifest in found.values():
            assert list(faults(manifest, PINS["ray"])) == []
    original = JOBS["rayjob-cpu.yaml"]
    queued = variants["kueue"]["RayJob"]
    assert queued["spec"].pop("suspend") is True
    assert queued["metadata"].pop("labels") == {
        "kueue.x-k8s.io/queue-name": variants["kueue"]["LocalQueue"]["metadata"]["name"]
    }
    queued["spec"]["preRunningDeadlineSeconds"] = original["spec"]["preRunningDeadlineSeconds"]
    assert queued == original
    spot = variants["spot"]["RayJob"]
    worker, head = worker_of(spot).spec, next(pods_of(spot)).spec
    assert worker.pop("terminationGracePeriodSeconds") < 30
    on, off = (
        [t["matchExpressions"] for t in p.pop("affinity")["nodeAffinity"][REQUIRED]["nodeSelectorTerms"]]
        for p in (worker, head)
    )
    tolerated = {(t["key"], t["value"]) for t in worker.pop("tolerations")}
    on_spot = {(e["key"], *e["values"]) for (e,) in on if e["operator"] == "In"}
    kept_off = {(e["key"], *e["values"]) for (terms,) in [off] for e in terms if e["operator"] == "NotIn"}
    assert len(on_spot) == len(on)
    assert tolerated < on_spot
    assert kept_off == on_spot, "the head could land on a spot node"
    assert spot == original
    names = {found["RayJob"]["metadata"]["name"] for found in variants.values()}
    assert names == {original["metadata"]["name"]}, "clusters of two variants could exist, and share budgets"
    shared = variants["shared-volume"]["RayJob"]
    assert all(pod.at(pod.containers[0], "/mnt/shared", "persistentVolumeClaim") for pod in pods_of(shared) if pod.start)
    assert not any(pod.at(pod.containers[0], "/mnt/shared", "persistentVolumeClaim") for pod in pods_of(original))


REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def test_the_queue_has_room_for_one_run() -> None:
    flavor, queue, local = MANIFESTS["kueue/queues.yaml"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    (group,) = queue["spec"]["resourceGroups"]
    (quota,) = group["flavors"]
    assert quota["name"] == flavor["metadata"]["name"]
    job = JOBS["rayjob-cpu.yaml"]
    count = {"cpu": cluster_of(job)["workerGroupSpecs"][0]["replicas"]}
    need = dict.fromkeys(group["coveredResources"], amount(0))
    for pod in pods_of(job):
        for container in pod.containers:
            for name, size in container["resources"]["requests"].items():
                need[name] += count.get(pod.where, 1) * amount(size)
    have = {one["name"]: amount(one["nominalQuota"]) for one in quota["resources"]}
    assert set(have) == set(need)
    assert all(need[name] <= have[name] < 2 * need[name] for name in need)
    assert not cluster_of(job).get("enableInTreeAutoscaling"), "Kueue does not admit jobs that scale"


def test_every_head_and_every_fixed_group_of_workers_has_a_budget() -> None:
    budgets = {}
    for manifest in MANIFESTS["disruption.yaml"]:
        if manifest["kind"] == "PodDisruptionBudget":
            selected = manifest["spec"]["selector"]["matchLabels"]
            budgets[selected[LABEL], selected["ray.io/node-type"]] = manifest["spec"]["minAvailable"]
    wanted = {}
    for manifest in RAY.values():
        label = next(pods_of(manifest)).labels[LABEL]
        wanted[label, "head"] = 1
        if manifest["kind"] == "RayJob" and not cluster_of(manifest).get("enableInTreeAutoscaling"):
            wanted[label, "worker"] = cluster_of(manifest)["workerGroupSpecs"][0]["replicas"] - 1
    wanted |= {("nightly", where): wanted["cpu", where] for where in ("head", "worker")}
    assert budgets == wanted


def test_the_account_of_the_recurring_job_may_only_create_rayjobs() -> None:
    account, role, binding, cron = MANIFESTS["recurring.yaml"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    (subject,) = binding["subjects"]
    (pod,) = pods_of(cron)
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert subject["name"] == account["metadata"]["name"] == pod.spec["serviceAccountName"]
    assert pod.containers[0]["command"][1] == f"{IN_IMAGE}/create_rayjob.py"
