"""The rules of the tree hold, and a tree that breaks one of them on purpose is caught.

``structure_rules.py`` has the rules.
"""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import memokern
from memokern.backends import protocol
from tests import structure_rules as rules

PACKAGE = Path(memokern.__file__).parent
CSRC = PACKAGE.parent / "csrc"
SOURCES = rules.read(PACKAGE, ".py")


@pytest.mark.parametrize("rule", rules.PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert SOURCES
    broken = rule(SOURCES)
    assert not broken, "\n".join(broken)


def test_the_native_sources_keep_the_rules():
    if not CSRC.is_dir():
        pytest.skip("the sources are not beside the installed package")
    native = rules.read(CSRC, ".h", ".hpp", ".cpp", ".cu", ".cuh")
    assert native
    broken = rules.wrong_includes(native)
    assert not broken, "\n".join(broken)


def test_the_source_archive_has_every_source():
    """A wheel is built, and tests are run, from what MANIFEST.in takes."""
    root = PACKAGE.parent
    if not (root / "MANIFEST.in").is_file():
        pytest.skip("the sources are not beside the installed package")
    lines = [line.split() for line in (root / "MANIFEST.in").read_text().splitlines()]
    taken = {words[1]: words[2:] for words in lines if words[:1] == ["recursive-include"]}
    missing = [
        str(file.relative_to(root))
        for folder in ("csrc", "tests", "tools", "bench", "examples")
        for file in (root / folder).rglob("*")
        if file.is_file()
        and "__pycache__" not in file.parts
        and not any(fnmatch(file.name, pattern) for pattern in taken[folder])
    ]
    assert not missing, missing


# --- each rule sees what breaks it --------------------------------------------------------------

# rule, a tree that keeps it, what is put into that tree, and what the rule then says
BROKEN = [
    pytest.param(rules.unplaced, {}, {"odds/__init__.py": ""}, "odds/__init__.py", id="no layer"),
    pytest.param(
        rules.upward_imports,
        {"util/env.py": "import os", "calls/state.py": "from memokern.util import env"},
        {"util/checks.py": "from memokern.calls.state import State"},
        "util/checks.py:1 imports calls.state",
        id="upward",
    ),
    pytest.param(
        rules.upward_imports,
        {"data/files.py": ""},
        {"index/index.py": "def f():\n    import memokern.data.files\n"},
        "index/index.py:2 imports data.files",
        id="upward, inside a function",
    ),
    pytest.param(
        rules.upward_imports,
        {"validate.py": "from memokern.data.files import read", "data/files.py": ""},
        {"data/storage.py": "from memokern import validate"},
        "data/storage.py:1 imports validate",
        id="upward, a single file",
    ),
    pytest.param(
        rules.upward_imports,
        {"regularizers/base.py": "", "processes/base.py": ""},
        {"processes/base.py": "from memokern.regularizers import base"},
        "processes/base.py:1 imports regularizers.base",
        id="sideways",
    ),
    pytest.param(
        rules.upward_imports,
        {"apps/info.py": "import memokern", "__init__.py": ""},
        {"denoiser.py": "import memokern"},
        "denoiser.py:1 imports memokern",
        id="upward, the package itself",
    ),
    pytest.param(
        rules.upward_imports,
        {},
        {"results.py": "from memokern.missing import name"},
        "results.py:1 imports missing, which has no layer",
        id="upward, from nowhere",
    ),
    pytest.param(
        rules.import_cycles,
        {"calls/a.py": "from memokern.calls import b", "calls/b.py": ""},
        {"calls/b.py": "from memokern.calls.a import A"},
        "calls.a -> calls.b -> calls.a",
        id="cycle",
    ),
    pytest.param(
        rules.import_cycles,
        {"calls/a.py": "from .b import B", "calls/b.py": ""},
        {"calls/b.py": "import importlib\nimportlib.import_module('memokern.calls.a')"},
        "calls.a -> calls.b -> calls.a",
        id="cycle, relative and by name",
    ),
    pytest.param(
        rules.backend_imports,
        {
            "backends/protocol.py": "",
            "backends/cpu/__init__.py": "from memokern.backends.protocol import Backend",
            "backends/cpu/native.py": "from memokern import _C",
            "backends/reference/dense.py": "",
            "strategies/dense.py": "from memokern.backends.reference import dense",
            "apps/info.py": "from memokern.backends import protocol",
        },
        {"backends/cpu/dense.py": "from memokern.backends.reference.dense import weights"},
        "backends/cpu/dense.py:1 imports backends.reference.dense",
        id="a backend imports another",
    ),
    pytest.param(
        rules.backend_imports,
        {"backends/protocol.py": ""},
        {"functional.py": "from memokern.backends import protocol"},
        "functional.py:1 imports backends.protocol",
        id="a layer that has no business with backends",
    ),
    pytest.param(
        rules.backend_imports,
        {"backends/cpu/native.py": "from memokern import _C"},
        {"backends/triton/launch.py": "from memokern import _C"},
        "backends/triton/launch.py:1 imports _C",
        id="another backend imports the compiled module",
    ),
    pytest.param(
        rules.crossing_names,
        {"calls/a.py": "def _f(): ...\nx = 1", "calls/b.py": "from memokern.calls.a import x"},
        {"calls/b.py": "from memokern.calls.a import _f"},
        "calls/b.py:1 imports _f of calls.a",
        id="a private name is imported",
    ),
    pytest.param(
        rules.crossing_names,
        {"calls/a.py": "class A:\n    def _f(self):\n        self._g = self._f()\n"},
        {"calls/b.py": "from memokern.calls.a import A\nA()._f()"},
        "calls/b.py:2 uses ._f",
        id="a private attribute is read",
    ),
    pytest.param(
        rules.crossing_names,
        {"calls/a.py": "", "calls/b.py": "def f(t):\n    return t._replace(x=1)"},
        {"calls/b.py": "from memokern.calls import a\nprint(a._f)"},
        "calls/b.py:2 uses ._f",
        id="a private name of a module is read",
    ),
    pytest.param(
        rules.torch_internals,
        {"util/torch_internals.py": "import torch\ntorch._C", "ops/dense.py": "import torch._C"},
        {"data/files.py": "import torch\ntorch._C._x()"},
        "data/files.py:2 uses torch._C",
        id="torch._C",
    ),
    pytest.param(
        rules.torch_internals,
        {"data/files.py": "from torch.autograd import forward_ad\nforward_ad.dual_level()"},
        {"data/files.py": "from torch.autograd import forward_ad\nforward_ad._current_level"},
        "data/files.py:2 uses forward_ad._current_level",
        id="a private name of a module of torch",
    ),
    pytest.param(
        rules.torch_internals,
        {},
        {"data/files.py": "from torch._subclasses import FakeTensor"},
        "data/files.py:1 uses torch._subclasses.FakeTensor",
        id="a private module of torch",
    ),
    pytest.param(
        rules.crowded_functions,
        {
            "data/files.py": "class A:\n    def f(self, a, b, c, d, e, f, g, h, *, i): ...",
            "ops/dense.py": "def f(a, b, c, d, e, f, g, h, i): ...",
            "apps/cli/sample.py": "def f(a, b, c, d, e, f, g, h, i): ...",
            "backends/triton/kernels.py": "@triton.jit\ndef f(a, b, c, d, e, f, g, h, i): ...",
        },
        {"data/files.py": "def f(a, b, c, d, /, e, f, g, h, i): ..."},
        "data/files.py:1 f has 9 positional parameters",
        id="nine parameters",
    ),
    pytest.param(
        rules.crowded_functions,
        {},
        {"data/files.py": "class A:\n    @staticmethod\n    def f(a, b, c, d, e, f, g, h, i): ..."},
        "data/files.py:3 f has 9 positional parameters",
        id="nine parameters of a static method",
    ),
    pytest.param(
        rules.long_files,
        {"data/files.py": "x = 1\n" * 400},
        {"data/files.py": "x = 1\n" * 401},
        "data/files.py has 401 lines",
        id="long",
    ),
    pytest.param(
        rules.wrong_includes,
        {
            "bind/module.cpp": "#include <pybind11/pybind11.h>\n#include \"cpu/core/isa.h\"",
            "cpu/core/isa.h": '#include "memokern/abi.h"\n#include <vector>',
            "cuda/sweep/sweep.cuh": '#include "../common/mma.cuh"',
        },
        {"cpu/core/isa.h": "#include <torch/extension.h>"},
        "cpu/core/isa.h includes torch/extension.h",
        id="a header of torch",
    ),
    pytest.param(
        rules.wrong_includes,
        {},
        {"cpu/core/isa.h": "#  include <pybind11/numpy.h>"},
        "cpu/core/isa.h includes pybind11/numpy.h",
        id="pybind11 outside bind",
    ),
    pytest.param(
        rules.wrong_includes,
        {},
        {"cuda/sweep/sweep.cuh": '#include "../../cpu/core/vec.h"'},
        "cuda/sweep/sweep.cuh includes ../../cpu/core/vec.h",
        id="cuda includes cpu",
    ),
    pytest.param(
        rules.wrong_includes,
        {},
        {"cpu/nearest/nearest.h": '#include "cuda/nearest/nearest.cuh"'},
        "cpu/nearest/nearest.h includes cuda/nearest/nearest.cuh",
        id="cpu includes cuda",
    ),
    pytest.param(
        rules.wrong_includes,
        {"include/memokern/state.h": '#include "memokern/abi.h"'},
        {"include/memokern/state.h": '#include "cpu/core/vec.h"'},
        "include/memokern/state.h includes cpu/core/vec.h",
        id="what both share includes one",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "tree", "change", "says"), BROKEN)
def test_a_rule_broken_on_purpose_is_caught(rule, tree, change, says):
    assert rule(tree) == []
    assert says in rule(tree | change)


# --- operations ---------------------------------------------------------------------------------


def calls() -> list[protocol.Call]:
    """Calls of both kinds of device, of types that some backend has a kernel for."""
    return [
        protocol.Call(device, x, rows, b=3, n=5, dim=7, k=2)
        for device in ("cpu", "cuda")
        for x in (torch.float32, torch.float64)
        for rows in (torch.float32, torch.uint8)
    ]


@pytest.mark.parametrize("name", protocol.NAMES)
def test_every_operation_is_answered_or_refused(name):
    backend = protocol.get(name)
    if name == "triton":  # which says what it refuses wherever Triton can be imported
        pytest.importorskip("triton")
    elif backend.unavailable() is not None:
        pytest.skip(f"{name}: {backend.unavailable()}")
    broken = rules.unanswered_operations(backend, protocol.Backend, protocol.OPERATIONS, calls())
    assert not broken, "\n".join(broken)


def test_the_protocol_lists_every_operation():
    own = {name for name in vars(protocol.Backend) if not name.startswith("_")}
    about = {"name", "unavailable", "detail", "refuses", "refusal"}
    assert own - about == set(protocol.OPERATIONS)


class Partial(protocol.Backend):
    """Has nearest, refuses bound_scan, and forgets everything else."""

    def refuses(self, operation, call):
        if operation == "posterior_listed":
            return "two\nlines"
        return "it has no index" if operation == "bound_scan" else None

    def nearest(self, x, rows, k):
        raise AssertionError


def test_an_operation_that_is_forgotten_is_caught():
    said = rules.unanswered_operations(Partial(), protocol.Backend, protocol.OPERATIONS, calls())
    assert "Partial neither has nor refuses posterior_state" in said
    assert "Partial neither has nor refuses posterior" in said
    assert "Partial gives no line of reason for posterior_listed" in said
    assert not [line for line in said if "nearest" in line or "bound_scan" in line]


# --- what is not installed ----------------------------------------------------------------------

MISSING = ["matplotlib", "triton", "cuda", "memokern._C", "sklearn", "pytest"]


def test_import_needs_no_optional_part():
    code = f"""
import sys
for name in {MISSING}: sys.modules[name] = None
import memokern, torch, memokern.apps.info, memokern.apps.cli
p = memokern.posterior(torch.zeros(1, 2), torch.ones(3, 2), 1.0)
assert p.mean.tolist() == [[1.0, 1.0]]
from memokern.backends import protocol
cpu, cuda, triton, reference = protocol.here()
assert not cpu.runs and not cuda.runs and not triton.runs, protocol.here()
assert reference.runs
print(cpu.detail)
print(cuda.detail)
print(triton.detail)
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert [line[:3] for line in run.stdout.splitlines()] == ["the", "cud", "Tri"], run.stdout
