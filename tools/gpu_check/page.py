"""The page: every line in words, from the result as JSON has it."""

from __future__ import annotations

from typing import Any


def is_wrong(line: dict[str, Any]) -> bool:
    """Whether a line tells of something wrong of ours."""
    if "status" in line:  # the tests
        return line["status"] != 0
    return "failed" in line or ("ratio" in line and not _right(line["ratio"]))


def _right(ratio: float | str) -> bool:
    """JSON has infinities as words."""
    return not isinstance(ratio, str) and ratio <= 1


def _number(x: float | str) -> str:
    return f"{x:.1e}" if not isinstance(x, str) else x


def smoke_line(line: dict[str, Any]) -> str:
    """One smoke test: the verdict first."""
    name = line["name"].removeprefix("smoke: ")
    if "failed" in line:
        return f"FAILED {name}: {line['failed']}"
    if "skipped" in line:
        return f"not run {name}: {line['skipped']}"
    verdict = "right " if _right(line["ratio"]) else "WRONG "
    error, allowed = _number(line["error"]), _number(line["allowed"])
    return f"{verdict} {name}: {line['output']} {error} (<= {allowed}), {line['seconds']} s"


def time_lines(entry: dict[str, Any]) -> list[str]:
    """A problem's lines of the table."""
    compiled = ", compiled" if entry["kind"] == "compiled" else ""
    found = []
    for run in entry["runs"]:
        head = f"| {entry['name']}{compiled} | {entry['rows']} | {run['run']} |"
        if "seconds" not in run:
            words = f"FAILED: {run['failed']}" if "failed" in run else run["skipped"]
            found.append(f"{head} {words.replace('|', '/')} | | | | | | | |")
            continue
        memory, product, bound = (
            "" if run[key] is None else f"{run[key]:.0%}"
            for key in ("of_memory", "of_product", "of_bound")
        )
        found.append(
            f"{head} {1000 * run['seconds']:.3g} | {run['gb_s']:.0f} | {memory} |"
            f" {run['tflop_s']:.1f} | {product} | {bound} | {run['peak'] / 2**20:.0f} |"
            f" {_number(run['error'])} |"
        )
    return found


HEAD = [
    "| operation | rows | run | ms | GB/s | of memory | TFLOP/s | of product | of bound | peak MiB"
    " | error |",
    "|" + " --- |" * 11,
]


def machine_line(machine: dict[str, Any]) -> str:
    """The device and what it was measured to do."""
    if not machine:
        return "The machine is not known yet."
    r = machine["rates"]
    rates = ", ".join(f"{name} {r[name] / 1e12:.3g} TFLOP/s" for name in ("half", "tf32", "fp32"))
    return (
        f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}, Python"
        f" {machine['python']}, {machine['cores']} cores. Measured: a copy"
        f" {r['memory'] / 1e9:.0f} GB/s; products of {rates}."
    )


def machine_facts(machine: dict[str, Any]) -> list[str]:
    """Who can compute there, and which peers are not installed."""
    left_out = [f"left out: {name}: {why}" for name, why in machine["left_out"].items()]
    return [*machine["backends"], *left_out]


def _state(result: dict[str, Any]) -> str:
    counts = f"{result['wrong']} wrong, {len(result['not_run'])} not run"
    words = f"{result['state']} after {result['seconds']:.0f} s of {result['minutes']:g} minutes"
    return f"State: {words}; {counts}."


def render(result: dict[str, Any]) -> str:
    """The page, in Markdown."""
    smoke = result["smoke"]
    wrong = [smoke_line(line) for line in smoke if is_wrong(line)]
    lines = ["# What the GPU said", ""]
    if result["rehearsed"]:
        lines += ["A rehearsal without a GPU, on tiny problems: no figure here means anything.", ""]
    lines += [machine_line(result["machine"]), "", _state(result), ""]
    if result["machine"]:
        lines += [*(f"- {fact}" for fact in machine_facts(result["machine"])), ""]
    left = sum("skipped" in line for line in smoke)
    counts = f"{len(smoke) - len(wrong) - left} right, {len(wrong)} wrong"
    counts += f", {left} not run" if left else ""
    lines += [f"## Smoke tests against float64: {counts}", ""]
    lines += [f"- {line}" for line in wrong]
    lines += [f"- {smoke_line(line)}" for line in smoke if not is_wrong(line)]
    tests = result["tests"]
    if tests is not None:
        lines += ["", f"## Tests: {tests['summary']}", "", *(f"- {t}" for t in tests["failures"])]
    lines += ["", "## Times", "", *_explained(), "", *HEAD]
    lines += [line for entry in result["times"] for line in time_lines(entry)]
    if result["not_run"]:
        lines += ["", "## Not run", "", *(f"- {name}" for name in result["not_run"])]
    return "\n".join(lines) + "\n"


def _explained() -> list[str]:
    return [
        "Medians, each beside the others in turns, nothing of the rows in the L2 cache. of memory:"
        " the bytes of the rows, once, over the time, as a share of the rate of a copy. of product:"
        " two products (one for nearest) over the time, as a share of the rate of a large product,"
        " of 16-bit numbers or for float32 rows of tf32. of bound: the time that data sheets and"
        " the launches allow (`tools/roofline.py`) over the time. Peers know float32 rows only."
    ]
