"""Devices and their published figures, and clusters as text: `8 x H100-80GB, 100 Gbit`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from ray_soup.errors import RecipeError


@dataclass(frozen=True)
class Device:
    """One GPU as its manufacturer describes it; rates are dense, without structured sparsity."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second that its memory reads or writes."""
    bfloat16: float | None
    """FLOP/s of matrix products in bfloat16 with float32 sums; None: it has no bfloat16."""
    float32: float
    """FLOP/s in float32, without TF32, which PyTorch does not use by default."""
    source: str
    """Where the figures are from."""


def _gpu(name: str, gigabytes: float, terabytes_per_s: float, bfloat16: float | None, float32: float, source: str) -> Device:
    low = None if bfloat16 is None else bfloat16 * 1e12
    return Device(name, gigabytes * 1e9, terabytes_per_s * 1e12, low, float32 * 1e12, source)


DEVICES = (
    _gpu("B200-180GB", 180, 8.0, 2250, 80, "NVIDIA Blackwell architecture technical brief (HGX B200); DGX B200 data sheet"),
    _gpu("H200-141GB", 141, 4.8, 989.4, 66.9, "NVIDIA H200 data sheet (SXM); same compute as the H100 SXM"),
    _gpu("H100-80GB", 80, 3.35, 989.4, 66.9, "NVIDIA H100 data sheet (SXM)"),
    _gpu("H100-PCIe-80GB", 80, 2.0, 756, 51, "NVIDIA H100 data sheet (PCIe)"),
    _gpu("A100-80GB", 80, 2.039, 312, 19.5, "NVIDIA A100 data sheet (SXM, 80 GB)"),
    _gpu("A100-40GB", 40, 1.555, 312, 19.5, "NVIDIA A100 data sheet (40 GB)"),
    _gpu("L40S-48GB", 48, 0.864, 362.05, 91.6, "NVIDIA L40S data sheet"),
    _gpu("L4-24GB", 24, 0.3, 121, 30.3, "NVIDIA L4 data sheet"),
    _gpu("A10-24GB", 24, 0.6, 125, 31.2, "NVIDIA A10 data sheet"),
    _gpu("V100-32GB", 32, 0.9, None, 15.7, "NVIDIA V100 data sheet (SXM2, 32 GB)"),
    _gpu("V100-16GB", 16, 0.9, None, 15.7, "NVIDIA V100 data sheet (SXM2, 16 GB)"),
    _gpu("T4-16GB", 16, 0.32, None, 8.1, "NVIDIA T4 data sheet"),
    _gpu("RTX4090-24GB", 24, 1.008, 165.2, 82.6, "NVIDIA Ada GPU architecture whitepaper (GeForce RTX 4090)"),
    _gpu("RTX3090-24GB", 24, 0.936, 71, 35.6, "NVIDIA Ampere GA102 GPU architecture whitepaper (GeForce RTX 3090)"),
    _gpu("MI300X-192GB", 192, 5.3, 1307.4, 163.4, "AMD Instinct MI300X data sheet"),
)
"""Memory in GB, its bandwidth in TB/s, TFLOP/s in bfloat16 and in float32, and the source."""
THIS_MACHINE = "CPU"
"""The device of `N x CPU`: a core of this machine."""
NETWORK = 10.0  # Gbit/s of a node, unless the cluster says otherwise
MOST_DEVICES = 64  # of a node


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices, and the network between them."""

    devices: int
    """GPUs of a node, or its cores."""
    device: Device | None
    """The GPU; None: cores of this machine."""
    network: float = NETWORK
    """Gbit/s of a node."""

    @property
    def node(self) -> str:
        """Describe a node."""
        return f"{self.devices} x {self.device.name if self.device else THIS_MACHINE}, {self.network:g} Gbit/s"


_FORM = re.compile(
    r"\s*(?:(?P<count>\d{1,4})\s*[x×*]\s*)?(?P<name>[A-Za-z][\w .-]*?)\s*"
    r"(?:,\s*(?P<network>\d{1,6}(?:\.\d+)?)\s*G(?:bit|b)(?:/s|ps)?)?\s*"
)  # fmt: skip
_EXAMPLE = "'8 x H100-80GB, 100 Gbit', '4 x CPU' or 'here'"


def parse_cluster(text: str) -> Cluster:
    """Read a cluster: devices of a node, their name, and the network of a node. Raises RecipeError.

    >>> parse_cluster("8 x H100-80GB, 100 Gbit").node
    '8 x H100-80GB, 100 Gbit/s'
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise RecipeError(
            f"--cluster: found {text!r}; expected the devices of one node and its network, as in {_EXAMPLE}. Write it in "
            "this form."
        )
    network = float(found["network"] or NETWORK)
    if not network:
        raise RecipeError(f"--cluster: found {text!r}, a network of 0 Gbit/s; expected more. Change it.")
    count = int(found["count"] or 1)
    if found["name"] == "here":
        return Cluster(count * (os.cpu_count() or 1), None, network)
    if not 0 < count <= MOST_DEVICES and found["name"].upper() != THIS_MACHINE:
        raise RecipeError(
            f"--cluster: found {count} devices in a node; expected 1 to {MOST_DEVICES}. Give the devices of one node here, "
            "and the number of nodes as --nodes."
        )
    return Cluster(max(count, 1), None if found["name"].upper() == THIS_MACHINE else find_device(found["name"]), network)


def find_device(name: str) -> Device:
    """Return the device of a name; the memory may be left out if there is only one size. Raises RecipeError."""
    asked = _plain(name)
    fitting = [d for d in DEVICES if asked in (_plain(d.name), _plain(d.name.rpartition("-")[0]))]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(device.name for device in fitting or DEVICES)
    if fitting:
        raise RecipeError(f"--cluster: {name!r} could be any of {names}. Choose one.")
    raise RecipeError(
        f"--cluster: {name!r} is not in the table of devices; expected one of {names}, or {THIS_MACHINE} for cores of this "
        "machine. Choose one."
    )


def _plain(name: str) -> str:
    """Return a name without its maker, spaces and dashes."""
    return re.sub(r"nvidia|amd|instinct|geforce|tesla|[^a-z0-9]", "", name.lower())
