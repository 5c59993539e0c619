"""The table's arithmetic: rates, shares of the machine's limits, and the targets."""

from __future__ import annotations

from typing import Any

from bench.cases import OURS
from bench.peers import ALL

MET, MISSED, DISTURBED, UNKNOWN = "met", "MISSED", "disturbed", "not measured"
WRONG = 1e-3  # error above which a time is marked "!": the speed of a wrong result


def figures(case: dict[str, Any], name: str) -> dict[str, float]:
    """Rates and, where the limits were measured, their shares and the ratio to the floor: the
    operations at the rate of a large sgemm, or one read of the rows, whichever takes longer."""
    run = case["runs"][name]
    operations = (2 if case["op"] == "nearest" else 4) * case["b"] * case["n"] * case["d"]
    nbytes, seconds = case["n"] * case["d"] * run["itemsize"], run["seconds"]
    out = {
        "ms": 1e3 * seconds,
        "gflops": operations / seconds / 1e9,
        "gbs": nbytes / seconds / 1e9,
    }
    if "sgemm" in case:
        floor = max(operations / case["sgemm"], nbytes / case["read"])
        out |= {
            "sgemm": operations / seconds / case["sgemm"],
            "read": nbytes / seconds / case["read"],
            "floor": seconds / floor,
        }
    return out


def undisturbed(case: dict[str, Any]) -> bool:
    return case.get("quiet", True) and all(run["quiet"] for run in case["runs"].values())


def fastest_peer(case: dict[str, Any]) -> str | None:
    peers = [name for name in case["runs"] if name in ALL - {OURS}]
    return min(peers, key=lambda name: case["runs"][name]["seconds"]) if peers else None


def value(case: dict[str, Any], target: dict[str, Any]) -> float | None:
    """The figure that a target is about; None where what it needs did not run."""
    runs, kind = case["runs"], target["kind"]
    if kind == "ratio":
        if target["slow"] not in runs or target["fast"] not in runs:
            return None
        return runs[target["slow"]]["seconds"] / runs[target["fast"]]["seconds"]
    if kind == "fastest":
        peer = fastest_peer(case)
        return runs[peer]["seconds"] / runs[OURS]["seconds"] if peer else None
    if kind == "error":
        return runs[target["fast"]]["error"]
    return figures(case, target["fast"]).get(kind)


def _quiet(case: dict[str, Any], target: dict[str, Any]) -> bool:
    """Whether others left alone what a target compares: a ratio of a disturbed time and another is
    no finding."""
    runs, kind = case["runs"], target["kind"]
    if kind == "error":
        return True
    names = {target["fast"], target["slow"]} & set(runs)
    if kind == "fastest":
        names.add(fastest_peer(case) or OURS)
    limits = case.get("quiet", True) or kind not in ("sgemm", "floor")
    return limits and all(runs[name]["quiet"] for name in names)


def verdict(case: dict[str, Any], target: dict[str, Any]) -> tuple[str, str]:
    """(what was measured and what it should be; met, MISSED, disturbed or not measured)."""
    found, goal = value(case, target), target["goal"]
    sign = "<=" if target["at_most"] else ">="
    what = {
        "sgemm": "of sgemm",
        "floor": "x floor",
        "error": "error",
        "fastest": f"fastest peer ({fastest_peer(case)}) / memokern",
        "ratio": f"{target['slow']} / {target['fast']}",
    }[target["kind"]]
    if found is None:
        return what, UNKNOWN
    met = found <= goal if target["at_most"] else found >= goal
    state = (MET if met else MISSED) if _quiet(case, target) else DISTURBED
    return f"{what} {_number(found)} ({sign} {goal:.4g})", state


def _number(x: float) -> str:
    return f"{x:.1e}" if 0 < x < 0.01 else f"{x:.2f}"


def verdicts(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(case, figure beside target, state) of every target, memory included."""
    out = [
        (case["name"], *verdict(case, target))
        for case in result["cases"]
        for target in case["targets"]
    ]
    for case in result["memory"]:
        taken, allowed = case["bytes"][OURS], case["allowed"]
        text = f"MB beyond inputs {taken / 1e6:.1f} (<= {allowed / 1e6:.4g})"
        state = MET if taken <= allowed else MISSED
        out.append((f"memory of {case['op']} B={case['b']} D={case['d']}", text, state))
    return out
