"""Create a RayJob from a manifest, from inside a pod, with the date at the end of its name and of OUT.

    python create_rayjob.py RAYJOB.yaml

See cluster/recurring.yaml. A RayJob of this name is left alone, so a retry on the same day creates no second one.
"""

import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from datetime import datetime, timezone
from pathlib import Path

import yaml


def create_rayjob(file: str, date: str, account: Path) -> str:
    """Create the RayJob of a manifest for a date, and return what became of it.

    Its pods have a label of their own, for which cluster/networkpolicy.yaml and cluster/disruption.yaml have objects.

    `account` is the folder with the service account's token and the API server's certificate.
    """
    manifest = yaml.safe_load(Path(file).read_text())
    metadata, spec = manifest["metadata"], manifest["spec"]
    metadata["name"] += f"-{date}"
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    for template in (spec["submitterPodTemplate"], *(group["template"] for group in groups)):
        template["metadata"]["labels"]["ray-soup/cluster"] = "nightly"
    python, script, recipe, out, *overrides = spec["entrypoint"].split()
    spec["entrypoint"] = " ".join([python, script, recipe, f"{out}/{date}", *overrides])
    server = f"{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"  # set in every pod
    request = urllib.request.Request(
        f"https://{server}/apis/ray.io/v1/namespaces/{metadata['namespace']}/rayjobs",
        data=json.dumps(manifest).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {(account / 'token').read_text()}"},
    )
    try:
        urllib.request.urlopen(request, context=ssl.create_default_context(cafile=account / "ca.crt"), timeout=30).close()
    except urllib.error.HTTPError as error:
        if error.code != 409:
            sys.exit(f"The RayJob {metadata['name']} was not created: {error.code} {error.read().decode()[:1000]}")
        return f"The RayJob {metadata['name']} exists."
    return f"Created the RayJob {metadata['name']}, which writes {out}/{date}."


if __name__ == "__main__":
    today = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    print(create_rayjob(sys.argv[1], today, Path("/var/run/secrets/kubernetes.io/serviceaccount")))
