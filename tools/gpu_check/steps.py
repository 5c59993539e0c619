"""What is done, in the order of its importance. Nothing here needs PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

F32, BF16, F16, U8 = "float32", "bfloat16", "float16", "uint8"
TYPES = (U8, BF16, F32, F16)


class Smoke(NamedTuple):
    """An operation that is compared with float64.

    sigma: None is one at which thousands of rows share the weight. layout: how the rows lie:
    "plain", "strided" (an odd address and an odd stride) or "far" (beyond 2^31 numbers). backend:
    who is asked, "" for the one that the run is of.
    """

    operation: str
    rows: str
    b: int
    n: int
    d: int
    weighting: str = "gaussian"
    sigma: float | None = None
    layout: str = "plain"
    backend: str = ""

    @property
    def name(self) -> str:
        """In words."""
        text = f"{self.operation} {self.rows} B={self.b} N={self.n:,} D={self.d}"
        text += "" if self.weighting == "gaussian" else f" {self.weighting}"
        text += "" if self.sigma is None else f" sigma={self.sigma:g}"
        text += "" if self.layout == "plain" else f" {self.layout}"
        return text + (f" by {self.backend}" if self.backend else "")


class Problem(NamedTuple):
    """An operation whose time is measured, on b queries and n rows of d numbers."""

    operation: str  # mean | nearest | pruned | backward | rows' gradient
    rows: str
    b: int
    n: int
    d: int
    sigma: float | None = None

    @property
    def name(self) -> str:
        """In words, without the type of the rows."""
        text = f"{self.operation} B={self.b} N={self.n:,} D={self.d}"
        return text + ("" if self.sigma is None else f" sigma={self.sigma:g}")

    @property
    def is_big(self) -> bool:
        """Whether its rows take more than 2^33 numbers, so that few fit on a device at a time."""
        return self.n * self.d > 1 << 33


class Step(NamedTuple):
    """What a worker is asked for. limit: seconds after which it is taken to hang.

    kind: "machine" measures what the device can do; "smoke" checks; "warm" runs a problem once, so
    that its kernels are compiled; "time" times it beside the peers; "compiled" beside the peers
    that PyTorch compiles.
    """

    kind: str
    case: Smoke | Problem | None
    limit: float

    @property
    def name(self) -> str:
        """What names it on the page."""
        if self.case is None:
            return self.kind
        if isinstance(self.case, Problem):
            return f"{self.kind}: {self.case.name} {self.case.rows}"
        return f"{self.kind}: {self.case.name}"

    def message(self) -> dict[str, Any]:
        """For a worker, as JSON."""
        case = None if self.case is None else self.case._asdict()
        return {"kind": self.kind, "case": case}


def step_of(message: dict[str, Any]) -> Step:
    """What :meth:`Step.message` says."""
    make = Smoke if message["kind"] == "smoke" else Problem
    case = None if message["case"] is None else make(**message["case"])
    return Step(message["kind"], case, 0.0)


def cuda_smoke() -> list[Smoke]:
    """What the CUDA kernels take where they run at all: so many rows that they are asked first."""
    cases = [Smoke("posterior", t, 13, 20_003, 3072) for t in TYPES]
    cases += [Smoke("gradients", t, 13, 20_003, 784) for t in TYPES]
    cases += [
        *(Smoke("state", t, 13, 20_003, 300) for t in (U8, F32)),
        *(Smoke("posterior", t, 13, 20_003, 784, sigma=0.0) for t in (U8, F32)),
        *(Smoke(kind, t, 13, 20_003, 784, "log") for kind in ("posterior", "gradients")
          for t in (U8, F32)),
        Smoke("posterior", F32, 9, 20_003, 3072, sigma=0.01),
        Smoke("posterior", BF16, 13, 20_003, 784, layout="strided"),
        Smoke("gradients", F32, 13, 20_003, 777, layout="strided"),
        Smoke("posterior", U8, 30, 20_003, 3072),
        Smoke("posterior", U8, 2, 20_003, 12_288),
        Smoke("posterior", U8, 2, 700_003, 3072, sigma=1.0, layout="far"),
        *(Smoke("posterior", t, 4099, 5003, d) for t in TYPES for d in (2, 7)),
        *(Smoke("posterior", F32, 300, 1030, 2, sigma=s) for s in (0.0, 1e-3)),
        Smoke("posterior", F32, 300, 1030, 3, "log"),
        *(Smoke("nearest", t, b, 20_003, 784) for t in TYPES for b in (1, 4)),
        *(Smoke("listed", t, 19, 3001, 300) for t in TYPES),
        *(Smoke("listed gradients", t, 5, 1030, 100) for t in TYPES),
        *(Smoke("bound_scan", t, 40, 20_003, 300) for t in TYPES),
        Smoke("nearest", BF16, 1, 700_003, 3072, layout="far"),
    ]  # fmt: skip
    return [case._replace(backend="cuda") for case in cases]


def smoke() -> list[Smoke]:
    """One of each kind for each type of rows first, then awkward sizes."""
    kinds = [
        *(("posterior", 65, 4099, 3072), ("posterior", 1, 5000, 3072), ("posterior", 70, 3001, 16)),
        *(("nearest", 20, 3001, 784), ("gradients", 17, 2100, 300), ("state", 19, 2050, 200)),
        *(("listed", 19, 3001, 300), ("listed gradients", 5, 1030, 100)),
        *(("bound_scan", 19, 3001, 300), ("pruned", 19, 3001, 300)),
    ]
    cases = [Smoke(operation, t, *size) for operation, *size in kinds for t in TYPES]
    cases += [Smoke("rows' gradient", t, 17, 1030, 300) for t in (F32, BF16, F16)]
    cases += cuda_smoke()
    cases += [Smoke("posterior", t, 19, 515, 300, sigma=0.0) for t in TYPES]
    cases += [Smoke("posterior", t, 19, 1030, 100, weighting="log") for t in TYPES]
    cases += [
        Smoke("posterior", F32, 4096, 5000, 2),
        Smoke("posterior", F32, 64, 5000, 64),
        Smoke("posterior", BF16, 257, 2050, 256),
        Smoke("posterior", F32, 9, 1030, 3072, sigma=0.01),
        Smoke("posterior", U8, 9, 1030, 3072, sigma=0.01),
        Smoke("posterior", BF16, 17, 1030, 784, layout="strided"),
        Smoke("posterior", F32, 17, 1030, 777, layout="strided"),
        Smoke("posterior ieee", F32, 17, 2050, 300),
        Smoke("posterior", F32, 1, 1, 1),
        Smoke("posterior", F32, 3, 7, 5, sigma=0.0),
        Smoke("state", F32, 19, 515, 300, sigma=0.0),
        Smoke("state", BF16, 19, 515, 13, weighting="log"),
        Smoke("gradients", F32, 65, 515, 3072),
        Smoke("gradients", F32, 9, 1030, 13, weighting="log"),
        Smoke("rows' gradient", F32, 9, 515, 13, weighting="log"),
        Smoke("nearest", U8, 1, 5000, 3072),
        Smoke("nearest", F32, 100, 5000, 2),
        Smoke("posterior", U8, 2, 700_003, 3072, sigma=1.0, layout="far"),
        Smoke("nearest", U8, 2, 700_003, 3072, layout="far"),
    ]
    # Where the CUDA kernels run they are asked first, and Triton's are to be seen as well.
    kinds = [("nearest", 4, 3001, 784), ("listed", 19, 3001, 300), ("bound_scan", 19, 3001, 300)]
    kinds += [("listed gradients", 5, 1030, 100), ("posterior", 4099, 3001, 2)]
    cases += [
        Smoke(operation, t, *size, backend="triton") for operation, *size in kinds for t in TYPES
    ]
    return cases


def problems() -> list[Problem]:
    """What is timed. 3072 features are an image of CIFAR-10, 12,288 one of ImageNet at 64 x 64."""
    wide = [
        *((1, U8), (64, BF16), (256, F32), (64, U8), (1, F32)),
        *((256, BF16), (1, BF16), (64, F32), (256, U8)),
    ]
    n, d = 50_000, 3072
    return [
        *(Problem("mean", t, b, n, d) for b, t in wide),
        *(Problem("mean", F32, 4096, n, few) for few in (16, 2, 64)),
        Problem("nearest", F32, 64, n, d),
        Problem("pruned", U8, 64, n, d, 0.3),
        Problem("backward", F32, 64, n, d),
        Problem("nearest", U8, 64, n, d),
        Problem("pruned", U8, 64, n, d, 1.1),
        Problem("rows' gradient", F32, 64, n, d),
        Problem("mean", F32, 64, n, d, 0.002),
        Problem("mean", U8, 1, 1_281_167, 12_288),
        Problem("mean", U8, 64, 1_281_167, 12_288),
        *(Problem("mean", t, 8, n, d) for t in (U8, BF16, F32)),
        *(Problem("mean", t, b, n, 256) for b in (64, 1, 4096) for t in (F32, BF16)),
        Problem("backward", BF16, 64, n, d),
        Problem("mean", F32, 1, 100, 2),
    ]


# Compiled for many seconds each, and therefore last: the problems that PyTorch's compiler may win.
COMPILED = [
    Problem("mean", F32, 64, 50_000, 3072),
    Problem("mean", F32, 4096, 50_000, 16),
    Problem("mean", F32, 1, 50_000, 3072),
    Problem("mean", F32, 4096, 50_000, 64),
]


def smaller(case: Any) -> Any:
    """The case as it is rehearsed."""
    if isinstance(case, Problem):
        dim = 48 if case.operation == "pruned" else 24
        return case._replace(b=min(case.b, 4), n=min(case.n, 300), d=min(case.d, dim))
    return case._replace(b=min(case.b, 5), n=min(case.n, 70), d=min(case.d, 270))


class Plan(NamedTuple):
    """The steps of a run, in order; each list is done before the next is begun."""

    smoke: list[Step]
    warm: list[Step]  # by the processes that the smoke tests leave idle
    time: list[Step]


def plan(rehearsed: bool, only: str) -> Plan:
    """only: words that a step's name must have, or must not where they begin with -."""

    def is_asked_for(name: str) -> bool:
        return all(w[1:] not in name if w[0] == "-" else w in name for w in only.split())

    def steps(kind: str, cases: list[Any], limit: float) -> list[Step]:
        if rehearsed:  # Triton's interpreter is slow
            cases, limit = [smaller(case) for case in cases], 10 * limit
        found = [Step(kind, case, limit) for case in cases]
        unique = list(dict.fromkeys(found))  # small ones may be alike
        return [step for step in unique if is_asked_for(step.name)]

    timed = problems()
    return Plan(
        steps("smoke", smoke(), 60),
        steps("warm", [p for p in timed if not p.is_big], 60),
        [*steps("time", timed, 90), *steps("compiled", COMPILED, 120)],
    )
