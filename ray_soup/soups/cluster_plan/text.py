"""The plan for a cluster, as text. Does not import torch."""

from __future__ import annotations

from typing import Any

from ray_soup.soups.report.text import duration, size_in_bytes

PARTS = ("combine", "passes", "project", "wire", "driver")
HEAD = ("nodes", "actors", "mesh", "model batch", "steps", "GB/actor", "GB/node", "step", *PARTS, "run")


def lines(found: dict[str, Any]) -> list[list[str]]:
    """Return what does not depend on the number of nodes, as rows of name and text."""
    sizes, first = found["examples"], found["plans"][0]
    return [
        ["node", found["node"]],
        ["figures", f"{found['source']}; passes in {found['precision']}"],
        ["ingredients", f"{found['ingredients']} of {found['parameters'] / 1e6:,.1f} M parameters, "
                        f"{size_in_bytes(found['bytes_read'])}"],
        ["coefficients", f"{found['ingredients']} x {found['blocks']} blocks"],
        ["examples", ", ".join(f"{count:,} in {name}" for name, count in sizes.items())],
        ["passes", f"{found['flops_per_example'] / 1e9:,.3g} GFLOP forward per example"],
        ["disk", f"{size_in_bytes(first['store_bytes_per_node'])} per node"],
    ]  # fmt: skip


def table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells of a table with a row for each number of nodes."""
    priced = "cost" in found["plans"][0]
    rows = []
    for plan in found["plans"]:
        mesh, parts = plan["mesh"], [duration(plan["step_parts_s"][name]) for name in PARTS]
        over = "" if plan["memory_fits"] else "!"
        rows.append([
            str(plan["nodes"]), str(plan["actors"]), f"{mesh['replicas']} x {mesh['shards']}", str(plan["model_batch"]),
            f"{plan['steps']:,}",
            f"{plan['memory_bytes_per_actor'] / 1e9:.1f}{over}", f"{plan['memory_bytes_per_node'] / 1e9:.1f}",
            duration(plan["step_s"]), *parts, minutes(plan["wall_s"]), *([f"{plan['cost']:,.2f}"] if priced else []),
        ])  # fmt: skip
    return [*HEAD, *(["cost"] if priced else [])], rows


def minutes(seconds: float) -> str:
    """Format the time of a run so that neighbouring rows can be compared."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3600:.1f} h"


def closing(found: dict[str, Any]) -> list[str]:
    """Return the sentences below the table."""
    over = [plan["nodes"] for plan in found["plans"] if not plan["memory_fits"]]
    said = []
    if over:
        said.append(
            f"! With {over[0]} node{'s' if over[0] > 1 else ''}, an actor needs more memory than its device has. Use a "
            "smaller learn.model_batch or learn.micro_batch, more actors.shards, or a larger device."
        )
    return [*said, found["why"]]
