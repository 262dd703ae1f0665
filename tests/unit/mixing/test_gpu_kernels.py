"""Triton's compiler makes machine code of every GPU kernel, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton")

COMPILES = """
import json
import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction
from ray_soup.mixing import kernels_cuda
from ray_soup.mixing.hyperplane import synthetic_plane
from ray_soup.mixing.store_format import DTYPES
from tests.gpu_on_cpu import gpu

NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64"}
compiled = []

class Compiles:
    # in the place of a kernel: compiles it for the arguments of a launch, and does not run it
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **constants):
        given = dict(zip(self.kernel.arg_names, arguments))
        signature = {n: NAMES[a.dtype] if isinstance(a, torch.Tensor) else "i32" for n, a in given.items()}
        signature |= dict.fromkeys(constants, "constexpr")
        for capability in (80, 90):
            source = ASTSource(self.kernel, signature, {(self.kernel.arg_names.index(n),): v for n, v in constants.items()})
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert "ld.global" in made.asm["ptx"] and len(made.asm["cubin"]) > 0
            compiled.append((self.kernel.fn.__name__, dtype, capability))

for name, found in list(vars(kernels_cuda).items()):
    if isinstance(found, JITFunction) and "TILE" in found.arg_names:  # the others are called by kernels
        setattr(kernels_cuda, name, Compiles(found))
with gpu():
    for dtype in DTYPES:
        plane = synthetic_plane(dtype, 3, 5000, torch.device("cuda"), 1)
        vector = torch.zeros(5000, device="cuda")
        plane.combine(vector, vector, np.ones((3, 1), np.float32))
        plane.project(vector)
print(json.dumps(compiled))
"""


def test_every_kernel_compiles_for_gpus(tmp_path: object) -> None:
    from ray_soup.mixing.store_format import DTYPES

    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {tuple(one) for one in json.loads(done.stdout.splitlines()[-1])}
    assert {(dtype, capability) for _, dtype, capability in compiled} == {(d, c) for d in DTYPES for c in (80, 90)}
    assert len(compiled) == 2 * 2 * len(DTYPES)  # combine and project
