"""The table in print: text for a terminal, Markdown for docs/performance.md, and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import loops, table
from bench.cases import OURS, TINY

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
# Cases that are timed beside other calls of ours, so that no column of peers is theirs.
BESIDE_OURS = ("backward", "posterior")
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def text(result: dict[str, Any]) -> str:
    """One line per case and run, then the targets, memory, accuracy, and what did not run."""
    lines = [
        _machine(result),
        f"{'case':<34}{'':<18}{'ms':>10}{'times ours':>11}{'error':>9}{'GFLOP/s':>9}{'GB/s':>7}"
        f"{'sgemm':>7}{'read':>7}{'x floor':>9}{'spread':>8}",
    ]
    for case in result["cases"]:
        first = next(iter(case["runs"].values()))["seconds"]
        for name, run in case["runs"].items():
            f = table.figures(case, name)
            shares = "".join(
                f"{f[k]:>{w}.2f}" if k in f else " " * w
                for k, w in (("sgemm", 7), ("read", 7), ("floor", 9))
            )
            lines.append(
                f"{case['name']:<34}{name + _mark(run):<18}{f['ms']:>10.4g}"
                f"{run['seconds'] / first:>11.2f}{run['error']:>9.0e}{f['gflops']:>9.1f}"
                f"{f['gbs']:>7.1f}{shares}{run['spread']:>8.2f}"
            )
    found = table.verdicts(result)
    lines += ["", "targets", *(f"{state:<13}{name:<34}{what}" for name, what, state in found)]
    states = [state for *_, state in found]
    counts = (f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines += [f"{len(states)} targets: {', '.join(counts)}", ""]
    for case in result["memory"]:
        taken = "  ".join(f"{k} {v / 1e6:.1f}" for k, v in case["bytes"].items())
        lines.append(f"MB beyond inputs, {case['op']} B={case['b']} D={case['d']}: {taken}")
    for what in ("mean", "score"):
        for case in result["accuracy"]:
            errors = "  ".join(f"{k} {v:.1e}" for k, v in case[what].items())
            lines.append(f"error of the {what}, sigma {case['sigma']:<6} {errors}")
    lines += [loops.line(entry) for entry in result.get("loops", ())]
    return "\n".join([*lines, "", *_notes(result)])


def on(machine: dict[str, Any]) -> str:
    """The machine in words, with the instruction set of its kernels."""
    isa = machine["isa"] or "no compiled kernels"
    return f"{machine['cpu']}, {machine['threads']} threads, {isa}, torch {machine['torch']}"


def _machine(result: dict[str, Any]) -> str:
    parts = [on(result["machine"])]
    for key, unit in (("sgemm", "GFLOP/s"), ("read", "GB/s")):
        found = sorted(case[key] / 1e9 for case in result["cases"] if key in case)
        if found:
            parts.append(f"{key} {found[0]:.0f} to {found[-1]:.0f} {unit}")
    return "; ".join(parts)


def _mark(run: dict[str, Any]) -> str:
    return ("" if run["error"] <= table.WRONG else "!") + ("" if run["quiet"] else "~")


def _notes(result: dict[str, Any]) -> list[str]:
    runs = [run for case in result["cases"] for run in case["runs"].values()]
    marks = "".join(map(_mark, runs))
    notes = []
    if "!" in marks:
        notes.append(f"! error above {table.WRONG:g}: the speed of a wrong result")
    if "~" in marks:
        notes.append("~ other processes disturbed every round: time it again with --update")
    for case in result["cases"]:
        if OURS in case["runs"] and case["b"] * case["n"] * case["d"] < TINY:
            micro = 1e6 * case["runs"][OURS]["seconds"]
            notes.append(f"overhead per call: {micro:.0f} us, nearly all of {case['name']}")
    return notes + [f"not run: {name}: {why}" for name, why in result["skipped"].items()]


def markdown(result: dict[str, Any]) -> str:
    """The page's table: each case with its targets, and how many times longer peers take."""
    n = max((case["n"] for case in result["cases"]), default=0)
    columns = [c for c in result["cases"] if OURS in c["runs"] and c["op"] not in BESIDE_OURS]
    names = list(dict.fromkeys(k for c in columns for k in c["runs"] if k != OURS))
    lines = [
        f"Measured on {_machine(result)} (lowest and highest over the run). N = {n:,} where "
        "none is given.",
        "",
        f"| case | ms | figure (target) | {' | '.join(names)} |",
        "|" + " --- |" * (len(names) + 3),
    ]
    for case in columns:
        runs, mine = case["runs"], case["runs"][OURS]
        cells = [_times(runs[k], mine) if k in runs else "" for k in names]
        goals = "; ".join(_goal(case, t) for t in case["targets"])
        lines.append(f"| {case['name']} | {_ms(mine)} | {goals} | {' | '.join(cells)} |")
    others = [case for case in result["cases"] if case not in columns]
    if others:
        lines += ["", "| case | times, ms | figure (target) |", "| --- | --- | --- |"]
    for case in others:
        times = ", ".join(f"{k} {_ms(r)}" for k, r in case["runs"].items())
        goals = "; ".join(_goal(case, t) for t in case["targets"])
        lines.append(f"| {case['name']} | {times} | {goals} |")
    lines += _memory(result) + _accuracy(result)
    return "\n".join([*lines, "", *(f"{note}  " for note in _notes(result))]).rstrip()


def _goal(case: dict[str, Any], target: dict[str, Any]) -> str:
    what, state = table.verdict(case, target)
    if state in (table.DISTURBED, table.UNKNOWN):
        return "~"
    return what if state == table.MET else f"**{what}, missed**"


def _ms(run: dict[str, Any]) -> str:
    return f"{1e3 * run['seconds']:.4g}" if run["quiet"] else "~"


def _times(run: dict[str, Any], mine: dict[str, Any]) -> str:
    """How many times longer; nothing where either was disturbed."""
    if not (run["quiet"] and mine["quiet"]):
        return "~"
    return f"{run['seconds'] / mine['seconds']:.2f}{_mark(run)}"


def _memory(result: dict[str, Any]) -> list[str]:
    if not result["memory"]:
        return []
    names = list(dict.fromkeys(k for c in result["memory"] for k in c["bytes"]))
    lines = ["", f"| MB beyond the inputs | {' | '.join(names)} | at most |"]
    lines.append("|" + " --- |" * (len(names) + 2))
    for case in result["memory"]:
        cells = [f"{case['bytes'][k] / 1e6:.1f}" if k in case["bytes"] else "" for k in names]
        title = f"{case['op']} B={case['b']} D={case['d']}"
        lines.append(f"| {title} | {' | '.join(cells)} | {case['allowed'] / 1e6:.1f} |")
    return lines


def _accuracy(result: dict[str, Any]) -> list[str]:
    if not result["accuracy"]:
        return []
    names = list(result["accuracy"][0]["score"])
    lines = ["", f"| relative error of the score, sigma | {' | '.join(names)} |"]
    lines.append("|" + " --- |" * (len(names) + 1))
    for case in result["accuracy"]:
        cells = [f"{case['score'][k]:.0e}" if k in case["score"] else "" for k in names]
        lines.append(f"| {case['sigma']:g} | {' | '.join(cells)} |")
    return lines


def write(path: Path, block: str) -> None:
    """The block as a file; in a file that has the two marks, what is between them."""
    old = path.read_text() if path.exists() else ""
    if BEGIN in old and END in old:
        head, tail = old.split(BEGIN)[0], old.split(END, 1)[1]
        block = f"{head}{BEGIN}\n{block}\n{END}{tail}"
    else:
        block += "\n"
    path.write_text(block)


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Times after over times before. ValueError where the machines differ."""
    if old["machine"] != new["machine"]:
        keys = sorted({*old["machine"], *new["machine"]})
        pairs = [(k, old["machine"].get(k), new["machine"].get(k)) for k in keys]
        differ = "; ".join(f"{k}: {a} and {b}" for k, a, b in pairs if a != b)
        raise ValueError(f"figures of different machines are not compared ({differ})")
    before = {(c["name"], c["n"]): c["runs"] for c in old["cases"]}
    lines = []
    for case in new["cases"]:
        known = before.get((case["name"], case["n"]), {})
        for name, run in case["runs"].items():
            if name in known:
                a, b = 1e3 * known[name]["seconds"], 1e3 * run["seconds"]
                lines.append(f"{case['name']:<34}{name:<11}{a:>10.4g} -> {b:<10.4g}{b / a:>7.3f}")
    return "\n".join(lines) if lines else "no case is in both"
