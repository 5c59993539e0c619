"""Imports point one way, and importing needs nothing that may be missing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import memokern

ROOT = Path(memokern.__file__).parent
# From the bottom to the top: a module imports only from the lines above its own.
LAYERS = [
    ["checks", "env", "files"],
    ["kernels"],
    ["backends", "datasets", "processes"],
    ["bases", "ops", "rows"],
    ["projection"],
    ["index", "ops_support"],
    ["index_build"],
    ["data"],
    ["queries"],
    ["results"],
    ["pruning"],
    ["pruning_nearest", "shortcuts"],
    ["functional"],
    ["regularizers", "memorization"],
    ["denoiser"],
    ["samplers"],
    ["figures"],
    ["demo", "experiments", "info"],
    ["cli"],
    ["__main__"],
]
# The same inside the packages whose files build on each other.
INSIDE = {
    "processes": [["base"], ["continuous", "schedules"], ["__init__"]],
    "regularizers": [
        ["base"],
        ["covariance", "density", "prediction", "smoothing", "tikhonov", "weights"],
        ["text"],
        ["__init__"],
    ],
    "samplers": [["base"], ["flow", "reverse"], ["__init__"]],
    "experiments": [["base"], ["planar"], ["squares", "structured", "sweeps"], ["__init__"]],
    "kernels": [
        ["variant", "rows"],
        ["common", "tuning"],
        ["nearest", "products", "queries", "scan", "support", "weigh"],
        ["backward", "finish", "onepass"],
        ["backward_ends", "backward_limit", "backward_rows", "planner"],
        ["chunked", "gradient"],
        ["listing", "sweep"],
        ["__init__"],
    ],
    "cli": [["common"], ["log"], ["metrics", "other", "sample"], ["__init__"]],
}
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The package's own names, for those above all that they are defined in.
RANK["memokern"] = RANK["denoiser"]


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def names_imported(path: Path) -> set[str]:
    """Dotted names below memokern; a module and what is taken from it are one name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "memokern"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "memokern":
            assert node.level == 0
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def imported(path: Path) -> set[str]:
    tops = set()
    for name in names_imported(path):
        parts = name.split(".")
        tops.add(parts[1] if len(parts) > 1 and parts[1] in RANK else "memokern")
    return tops


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = module_of(path)
    if here in ("backends",) and path.name in ("cpu.py", "cpu_support.py", "native.py"):
        allowed = {"env", "backends", "memokern"}  # memokern._C
        assert imported(path) <= allowed
        return
    for name in imported(path) - {here}:
        assert RANK[name] < RANK[here], f"{here} imports {name}"


@pytest.mark.parametrize("package", INSIDE)
def test_imports_point_down_inside(package):
    rank = {name: i for i, layer in enumerate(INSIDE[package]) for name in layer}
    paths = {path.stem: path for path in (ROOT / package).glob("*.py")}
    assert paths.keys() == rank.keys()
    for here, path in paths.items():
        for name in names_imported(path):
            parts = name.split(".")
            if parts[1:2] == [package]:
                other = parts[2] if len(parts) > 2 and parts[2] in rank else "__init__"
                assert rank[other] < rank[here], f"{package}/{path.name} imports {name}"


def test_every_module_has_a_layer():
    assert {module_of(p) for p in FILES} == RANK.keys() - {"memokern"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_can_be_held_in_mind(path):
    assert len(path.read_text().splitlines()) <= 400


MISSING = ["matplotlib", "triton", "memokern._C", "sklearn", "pytest"]


def test_import_needs_no_optional_part():
    code = f"""
import sys
for name in {MISSING}: sys.modules[name] = None
import memokern, torch, memokern.apps.info, memokern.apps.cli
p = memokern.posterior(torch.zeros(1, 2), torch.ones(3, 2), 1.0)
assert p.mean.tolist() == [[1.0, 1.0]]
from memokern import backends
cpu, triton, reference = backends.explain()
assert not cpu.available and not triton.available, backends.explain()
assert reference.available
print(cpu.detail)
print(triton.detail)
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert [line[:3] for line in run.stdout.splitlines()] == ["the", "Tri"], run.stdout


def test_csrc_knows_nothing_of_torch():
    sources = ROOT.parent / "csrc"
    if not sources.is_dir():
        pytest.skip("the sources are not beside the installed package")
    files = [p for p in sources.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert files
    with_pybind = [p.name for p in files if "pybind11/" in p.read_text()]
    assert with_pybind == ["bind.cpp"]
    assert not [p for p in files if "torch/" in p.read_text() or "ATen" in p.read_text()]
