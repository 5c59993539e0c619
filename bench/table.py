"""The table's arithmetic and its print."""

from __future__ import annotations

from typing import Any

WRONG = 1e-3  # error above which a time is marked "!": the speed of a wrong result


def figures(
    b: int, n: int, d: int, itemsize: int, seconds: float, sgemm: float, read: float
) -> dict[str, float]:
    """Rates, their shares of the machine's, and the ratio to the floor: 4 B N D operations at the
    rate of a large sgemm, or one read of the rows, whichever takes longer."""
    operations, nbytes = 4 * b * n * d, n * d * itemsize
    floor = max(operations / sgemm, nbytes / read)
    return {
        "ms": 1e3 * seconds,
        "gflops": operations / seconds / 1e9,
        "gbs": nbytes / seconds / 1e9,
        "sgemm": operations / seconds / sgemm,
        "read": nbytes / seconds / read,
        "floor": seconds / floor,
    }


def render(result: dict[str, Any], markdown: bool = False) -> str:
    """One line per case and peer; markdown: one line per case, how many times faster we are."""
    lines = _ratios(result) if markdown else _figures(result)
    lines += ["", f"! error above {WRONG:g}: the speed of a wrong result"]
    lines += [f"not run: {name}: {why}" for name, why in result["skipped"].items()]
    return "\n".join(lines)


def _mark(entry: dict[str, float]) -> str:
    return "" if entry["error"] <= WRONG else "!"


def _figures(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['machine']['cpu']}: sgemm {result['sgemm'] / 1e9:.1f} GFLOP/s, "
        f"read {result['read'] / 1e9:.1f} GB/s",
        f"{'case':<24}{'peer':<10}{'ms':>10}{'times ours':>11}{'error':>9}"
        f"{'GFLOP/s':>9}{'GB/s':>7}{'sgemm':>7}{'read':>7}{'x floor':>9}",
    ]
    for case in result["cases"]:
        mine = case["peers"]["memokern"]["ms"]
        for name, f in case["peers"].items():
            lines.append(
                f"{case['name']:<24}{name + _mark(f):<10}{f['ms']:>10.4g}{f['ms'] / mine:>11.2f}"
                f"{f['error']:>9.0e}{f['gflops']:>9.1f}{f['gbs']:>7.1f}{f['sgemm']:>7.2f}"
                f"{f['read']:>7.2f}{f['floor']:>9.2f}"
            )
    return lines


def _ratios(result: dict[str, Any]) -> list[str]:
    cases = result["cases"]
    names = list(dict.fromkeys(k for c in cases for k in c["peers"] if k != "memokern"))
    lines = ["| case | memokern, ms | " + " | ".join(names) + " |"]
    lines.append("|" + " --- |" * (len(names) + 2))
    for case in cases:
        peers, mine = case["peers"], case["peers"]["memokern"]["ms"]
        cells = [
            f"{peers[k]['ms'] / mine:.2f}x{_mark(peers[k])}" if k in peers else "" for k in names
        ]
        start = f"| {case['name']} (N = {case['rows']}) | {mine:.4g} | "
        lines.append(start + " | ".join(cells) + " |")
    return lines


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Times after over times before. ValueError where the machines differ."""
    if old["machine"] != new["machine"]:
        keys = sorted({*old["machine"], *new["machine"]})
        pairs = [(k, old["machine"].get(k), new["machine"].get(k)) for k in keys]
        differ = "; ".join(f"{k}: {a} and {b}" for k, a, b in pairs if a != b)
        raise ValueError(f"figures of different machines are not compared ({differ})")
    before = {(c["name"], c["rows"]): c["peers"] for c in old["cases"]}
    lines = []
    for case in new["cases"]:
        known = before.get((case["name"], case["rows"]), {})
        for name, f in case["peers"].items():
            if name in known:
                a, b = known[name]["ms"], f["ms"]
                lines.append(f"{case['name']:<24}{name:<10}{a:>10.4g} -> {b:<10.4g}{b / a:>7.3f}")
    return "\n".join(lines) if lines else "no case is in both"
