"""The layout of a Kernels repository: what it holds, and that `kernels` loads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memokern
import tests
from tools import hub_kernels


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    hub_kernels.write(out)
    return out


def test_the_layout_is_what_kernels_reads(hub) -> None:
    variants = sorted((hub / "build").iterdir())
    assert [v.name for v in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    for variant in variants:
        facts = json.loads((variant / "metadata.json").read_text())
        assert facts["backend"]["type"] == variant.name.removeprefix("torch-")
        assert facts["name"] == "memokern" and facts["id"].isidentifier()
        for part in ("__init__.py", "LICENSE", "backends/triton", "backends/cuda/sources/sweep"):
            assert (variant / part).exists(), part
        assert not (variant / "apps").exists() and not list(variant.rglob("*.so"))
        for path in variant.rglob("*.py"):
            assert not hub_kernels.NAMED.search(path.read_text()), path
    front = (hub / "README.md").read_text().split("---")[1]
    assert "library_name: kernels" in front
    before = {path: path.read_bytes() for path in hub.rglob("*") if path.is_file()}
    hub_kernels.write(hub)
    assert before == {path: path.read_bytes() for path in hub.rglob("*") if path.is_file()}


def test_a_folder_of_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        hub_kernels.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("from memokern import sweep", "from _k import sweep"),
        ("    import memokern", "    import _k"),
        ("from memokern.calls.state import State", "from _k.calls.state import State"),
        ('importlib.import_module(f"memokern.backends.{n}")',
         'importlib.import_module(f"_k.backends.{n}")'),
        ('torch.library.Library("memokern", "DEF")', 'torch.library.Library("_k", "DEF")'),
        ('register_fake(f"memokern::{name}", f)', 'register_fake(f"_k::{name}", f)'),
        ("OPS = torch.ops.memokern", "OPS = torch.ops._k"),
        ('FORMAT = "memokern.TrainingSet"', 'FORMAT = "memokern.TrainingSet"'),  # of files
        ("pip install 'memokern[cuda]'", "pip install 'memokern[cuda]'"),
    ],
)  # fmt: skip
def test_names_of_code_are_renamed_and_no_others(line, wanted) -> None:
    assert hub_kernels.renamed(line, "_k") == wanted


def test_kernels_loads_it_beside_the_package(hub) -> None:
    kernels = pytest.importorskip("kernels")
    loaded = kernels.get_local_kernel(hub, backend="cpu")
    assert loaded is not memokern and loaded.__name__.startswith("_memokern_cpu_")
    assert loaded.posterior is not memokern.posterior
    assert hasattr(torch.ops, loaded.__name__)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    found, wanted = (m.posterior(x, rows, sigma=0.7).score for m in (loaded, memokern))
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(score.square().sum(), x)[0] for score in (found, wanted)]
    torch.testing.assert_close(*gradients)


INTERPRETED = """
import sys, pathlib, kernels, torch, triton_interpreter
triton_interpreter.install()
hub = kernels.get_local_kernel(pathlib.Path(sys.argv[1]))
x, rows = torch.randn(4, 6), torch.randn(40, 6)
assert hub.explain(x, rows, 0.5).runs == "triton"
score = hub.posterior(x, rows, sigma=0.5).score
w = torch.softmax(-torch.cdist(x.double(), rows.double()).square() / 0.5, 1)
torch.testing.assert_close(score.double(), (w @ rows.double() - x) / 0.25, rtol=1e-4, atol=1e-4)
assert not [name for name in sys.modules if name.split(".")[0] == "memokern"]
print("interpreted")
"""


@pytest.mark.long
def test_its_triton_kernels_run_in_the_interpreter(hub, tmp_path) -> None:
    pytest.importorskip("kernels")
    pytest.importorskip("triton")
    # The tests' interpreter, without the package that lies beside them.
    exact = Path(tests.__file__).parent / "triton_interpreter.py"
    (tmp_path / exact.name).symlink_to(exact)
    told = {"TRITON_INTERPRET": "1", "MEMOKERN_BACKEND": "triton", "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(hub)],
        capture_output=True, text=True, cwd=hub, env=os.environ | told, timeout=300,
    )  # fmt: skip
    assert ran.stdout == "interpreted\n", ran.stderr
