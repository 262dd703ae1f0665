"""The manifests in cluster/ have no faults, and a fault in a copy of one is detected."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.ray.manifests import IN_IMAGE, JOBS, LABEL, MANIFESTS, PINS, RAY, README, cluster_of, faults, pods_of


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
CPU_JOB = f"python {IN_IMAGE}/learn_soup.py /etc/ray_soup/recipe.yaml /mnt/shared/out"


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
        (f"{WORKER}.volumes.1", {"name": "shm", "hostPath": {"path": "/dev/shm"}}, "cpu: volume shm: hostPath"),
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
        (f"{WORKER}.volumes.1.emptyDir.medium", "", "does not fit into /dev/shm"),
        (f"{WORKER}.volumes.2.emptyDir", {}, "cpu: volume tmp: no sizeLimit"),
        (f"{WORKER}.volumes.3.emptyDir.sizeLimit", "20Gi", "RAY_SOUP_CACHE_GB is not under"),
        (f"{WORKER}.volumes.3.emptyDir.sizeLimit", "64Gi", "larger than ephemeral-storage"),
        (f"{WORKER}.containers.0.env.3.value", "/numba", "NUMBA_CACHE_DIR (/numba) is not writable"),
        (f"{WORKER}.containers.0.volumeMounts.2.mountPath", "/var/tmp", "temp (/tmp) is not writable"),
        (f"{WORKER}.containers.0.volumeMounts.0.mountPath", "/data", "no /mnt/shared"),
        ("spec.submissionMode", "HTTPMode", "not submitted by a Kubernetes Job"),
        ("spec.shutdownAfterJobFinishes", False, "the cluster outlives"),
        ("spec.backoffLimit", None, "no retries"),
        ("spec.activeDeadlineSeconds", None, "no deadline"),
        ("spec.entrypoint", f"python {IN_IMAGE}/learn.py /etc/ray_soup/r /mnt/shared/out", "no such job"),
        ("spec.entrypoint", f"python {IN_IMAGE}/learn_soup.py /etc/r.yaml /mnt/shared/out", "no such recipe"),
        ("spec.entrypoint", f"python {IN_IMAGE}/learn_soup.py /etc/ray_soup/r /cache/out", "OUT is not on the shared"),
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
    assert any("ray-head: only the autoscaler may hold" in fault for fault in faults(manifest, PINS["ray"]))


def test_pods_are_reachable_only_through_a_network_policy() -> None:
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


def test_the_namespace_enforces_restricted_pods() -> None:
    (namespace,) = MANIFESTS["namespace.yaml"]
    assert namespace["metadata"]["name"] == "ray-soup"
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_referenced_object_is_defined_or_created_by_a_command_in_the_readme() -> None:
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
