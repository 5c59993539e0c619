"""`make gpu-check` and the predictions: what can be tested of them without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import aot, gpu, roofline
from memokern.backends.triton import variants as listing

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
H100 = next(g for g in roofline.GPUS if g.name == "H100")
U8, F32 = torch.uint8, torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_compiles() -> None:
    words = ["nearest_groups", "float32", "B16", "unaligned"]
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    first, *rows = run.stdout.splitlines()
    assert first == gpu.NO_GPU
    assert sorted(row.split()[5] for row in rows) == sorted(aot.TARGETS)  # each as it is there
    assert all("registers" in row and " 0 B spilled" in row for row in rows)


def test_a_problem_is_checked_then_timed(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "PEERS", ("cached", "sdpa", "flex", "ideal"))
    monkeypatch.setattr(gpu, "_flex", lambda rows: 1 / 0)
    p = roofline.Problem("mean", 3, 200, 16, F32)
    result = gpu.collect([p], CPU, 2, gpu.Said(0, "3 passed in 1s", []))
    rows = {row["run"]: row for row in result["cases"][0]["runs"]}
    assert "ZeroDivisionError" in rows["flex"]["skipped"]
    for name in ("memokern", "cached", "sdpa"):
        assert rows[name]["error"] < 1e-5 and rows[name]["seconds"] > 0
        rate = 4 * 3 * 200 * 16 / rows[name]["seconds"] / 1e12
        assert rows[name]["tflop_s"] == pytest.approx(rate)
    text = gpu.render(result)
    assert text.startswith("Tests of the kernels: 3 passed in 1s.\n\nMeasured on a CPU")
    assert "| mean B=3 N=200 D=16 | float32 | memokern |" in text
    wrong = {**gpu.peers.MEAN, "cached": lambda rows: lambda x, sigma: torch.zeros_like(x)}
    monkeypatch.setattr(gpu.peers, "MEAN", wrong)
    lines = {row["run"]: row for row in gpu.measure(p, CPU, 1)}
    assert lines["cached"]["skipped"] == "wrong: an error of 1.0e+00" and "sdpa" in lines
    monkeypatch.setattr(gpu.memokern, "denoise", lambda x, data, sigma: torch.zeros_like(x))
    with pytest.raises(RuntimeError, match="nothing was timed"):
        gpu.measure(p, CPU, 1)


def test_what_fails_is_told_and_the_rest_is_measured(monkeypatch, tmp_path, capfd) -> None:
    """A test of pytest's own, and a problem: the page has both, and all that went well."""
    tests, out = tmp_path / "test_it.py", tmp_path / "page.md"
    tests.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    tested = gpu.tested
    monkeypatch.setattr(gpu, "tested", lambda _: tested([str(tests)]))
    problems = [roofline.Problem("mean", b, 200, 16, F32) for b in (2, 3)]
    monkeypatch.setattr(roofline, "PROBLEMS", problems)
    monkeypatch.setattr(gpu, "PEERS", ())
    denoise = gpu.memokern.denoise
    monkeypatch.setattr(
        gpu.memokern, "denoise", lambda x, *how: denoise(x, *how) if len(x) == 3 else 0 * x
    )
    assert gpu.check(1, out, CPU) == 1
    page = out.read_text()
    assert page.startswith("Tests of the kernels: 1 failed, 1 passed in")
    assert "- FAILED" in page and "test_it.py::test_wrong" in page
    first, second = page.splitlines()[-2:]
    assert "| mean B=2 N=200 D=16 | float32 | memokern | FAILED: RuntimeError: an error" in first
    assert second.startswith("| mean B=3 N=200 D=16 | float32 | memokern |")
    assert "FAILED" not in second
    shown = capfd.readouterr().out
    assert shown.endswith(page) and shown.index("test_wrong") < shown.index("Tests of the kernels")
    assert json.loads(out.with_suffix(".json").read_text())["wrong"] == 1
    # Each of the two is enough for the status.
    tests.write_text("def test_right(): pass\n")
    assert gpu.check(1, out, CPU) == 1
    monkeypatch.setattr(gpu.memokern, "denoise", denoise)
    assert gpu.check(1, out, CPU) == 0
    tests.write_text("def test_wrong(): assert 1 == 2\n")
    assert gpu.check(1, out, CPU) == 1


@pytest.mark.parametrize("tool", ["nvidia-smi", "rocm-smi", None])
def test_the_peers_are_installed_where_there_is_a_gpu(tool: str | None, tmp_path) -> None:
    """Of either vendor: by the tool that comes with its driver."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make")
    for name in ("sh", "true"):
        (tmp_path / name).symlink_to(shutil.which(name))
    if tool:
        (tmp_path / tool).symlink_to(shutil.which("true"))
    run = subprocess.run(
        [make, "-n", "gpu-check"], capture_output=True, text=True, cwd=ROOT,
        env={"PATH": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert ("[bench]" in run.stdout) == (tool is not None)


def test_what_needs_no_device_passes_on_a_machine_with_a_gpu_too() -> None:
    """`make gpu-check` runs these first; here they are told that there is a GPU."""
    code = (
        "import sys, torch, pytest; torch.cuda.is_available = lambda: True;"
        "sys.exit(pytest.main(['-q', '-n0', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    names = [f"tests/test_triton_{name}.py" for name in ("planner", "tuning", "launch")]
    slow = ("streams", "ahead", "small", "amd", "room", "every", "all_sizes")
    names += ["-k", " and ".join(f"not {word}" for word in slow)]
    run = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout and "failed" not in run.stdout


def test_peers_are_asked_for_what_they_can() -> None:
    assert "flex" not in gpu.runs_of(roofline.Problem("mean", 1, 9, 3072, F32))
    assert set(gpu.runs_of(roofline.Problem("mean", 1, 9, 64, F32))) == set(gpu.PEERS)
    assert gpu.runs_of(roofline.Problem("mean", 1, 9, 64, U8)) == ()


def test_predictions_by_hand() -> None:
    """One query waits for the rows; many for the tensor cores."""
    one = roofline.Problem("mean", 1, 50_000, 3072, U8).on(H100)
    rows = 50_000 * 3072 / H100.memory
    assert rows <= one.seconds <= 1.05 * rows and one.memory > 0.95
    many = roofline.Problem("mean", 256, 50_000, 3072, F32).on(H100)
    # Both products, three of tf32 each.
    products = 3 * 4 * 256 * 50_000 * 3072 / H100.rates["tf32"]
    assert products <= many.seconds <= 1.05 * products and many.memory < 0.05
    half = roofline.Problem("mean", 256, 50_000, 3072, torch.bfloat16).on(H100)
    # The query is three terms, a weight two.
    assert half.seconds == pytest.approx(5 * 2 * 256 * 50_000 * 3072 / H100.rates["half"], rel=0.05)
    near = roofline.Problem("nearest", 64, 50_000, 3072, F32).on(H100)
    assert near.launches == 2 and 1.0 <= near.seconds / (4 * rows) <= 1.1


def test_every_kernel_that_reads_all_rows_has_a_cost() -> None:
    names = {roofline.kernel_name(v) for v in listing.variants() if "rows" in v.signature}
    # These look at few rows only, or at rows that are in the L2 cache, or are not the forward pass.
    few = {
        "exact_kernel", "weigh_kernel", "coefficients_kernel", "limits_kernel", "ties_kernel",
        "rows_kernel", "queries_kernel", "sq_norms_kernel", "gradients_kernel", "grads_kernel",
    }  # fmt: skip
    assert names <= roofline.COSTS.keys() | few
    assert roofline.COSTS.keys() <= {roofline.kernel_name(v) for v in listing.variants()}


def test_the_page_has_the_predictions_of_the_model() -> None:
    """If this fails: python -m bench.roofline --markdown docs/triton.md"""
    page = (ROOT / "docs" / "triton.md").read_text()
    said = page.split(roofline.BEGIN)[1].split(roofline.END)[0]
    assert said.strip() == roofline.table().strip()
    assert "Predicted, never measured" in said


@pytest.mark.gpu
def test_a_problem_on_the_gpu() -> None:
    p = roofline.Problem("mean", 64, 20_000, 256, F32)
    rows = {row["run"]: row for row in gpu.measure(p, torch.device("cuda"), 3)}
    assert rows["memokern"]["error"] < gpu.TOLERANCE and "cached" in rows
    assert os.environ.get("TRITON_INTERPRET") == "0"
