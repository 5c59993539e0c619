"""The rules of the tree, as functions that take sources as text, {path: source}, and return what
breaks them, one line each. ``test_structure.py`` applies them to the repository, and to small trees
that break each rule on purpose.

    python tests/structure_rules.py

prints what breaks a rule now.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

Sources = dict[str, str]

# From the bottom to the top: a module imports from the lines above its own, or from its own folder.
# Most layers are folders. Single files stand where what they are about stands: validate.py, which
# checks the arguments of the public functions, needs a TrainingSet and is needed for results;
# __init__.py of the package collects public names, so only what is built for people may use it.
LAYERS = (
    ("util",),
    ("calls",),
    ("backends",),
    ("ops",),
    ("index",),
    ("data",),
    ("validate",),
    ("strategies",),
    ("results",),
    ("sweep",),
    ("conditional", "partial"),
    ("functional", "distributed"),
    ("by_row",),
    ("explaining",),
    ("processes", "regularizers", "memorization", "kde"),
    ("edm_network", "given"),
    ("denoiser",),
    ("samplers", "likelihood"),
    ("training", "integrations"),
    ("__init__",),
    ("apps",),
    ("__main__",),
)
RANKS = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

# The compiled module, which has no source in the package; the cpu backend alone may import it.
COMPILED = "_C"
# Who may call a backend, or ask who would.
IMPORT_BACKENDS = ("backends/", "ops/", "index/", "strategies/", "apps/info.py")
# Who may use names that PyTorch keeps for itself.
USE_TORCH_INTERNALS = ("ops/", "util/torch_internals.py")
# What torch.nn.Module means for subclasses to override, whatever the underscore says.
MODULE_HOOKS = {"_apply", "_buffers", "_load_from_state_dict"}
# What every named tuple has.
TUPLE_METHODS = {"_asdict", "_fields", "_make", "_replace"}
MOST_POSITIONAL = 8
# Schemas of torch.library, and click's one parameter per option.
MANY_POSITIONAL = ("ops/", "apps/cli/")
MOST_LINES = 400


class Module(NamedTuple):
    """A module of the package. path: below the package; name: "" for the package itself."""

    path: str
    name: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """The folder at the top of the package that it is in, or the file that it is."""
        return self.path.split("/")[0].removesuffix(".py")


def modules(sources: Sources) -> dict[str, Module]:
    """Dotted names below the package -> modules, of sources {path below the package: text}."""
    found = {}
    for path, text in sources.items():
        name = path.removesuffix(".py").replace("/", ".")
        name = name.removesuffix("__init__").removesuffix(".")
        found[name] = Module(path, name, _parsed(path, text))
    return found


@functools.cache
def _parsed(path: str, text: str) -> ast.Module:
    """The module's tree, parsed once for all rules."""
    return ast.parse(text, path)


@functools.cache
def _nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    """All that is in a module, walked through once for all rules."""
    return tuple(ast.walk(tree))


class Import(NamedTuple):
    """A name taken from a module of the package. target: the module's dotted name; what: the name
    taken, "" for the module itself."""

    target: str
    what: str
    line: int


def imports(module: Module, known: dict[str, Module]) -> Iterator[Import]:
    """What a module takes from the package, wherever in it the import stands."""

    def below(dotted: str) -> str | None:
        if dotted == "memokern":
            return ""
        return dotted.removeprefix("memokern.") if dotted.startswith("memokern.") else None

    for node in _nodes(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                target = below(alias.name)
                if target is not None:
                    yield Import(target, "", node.lineno)
        elif isinstance(node, ast.ImportFrom):
            source = below(node.module or "") if node.level == 0 else _relative(module, node)
            if source is None:
                continue
            for alias in node.names:
                inner = f"{source}.{alias.name}".removeprefix(".")
                if inner in known or inner == COMPILED:
                    yield Import(inner, "", node.lineno)
                else:
                    yield Import(source, alias.name, node.lineno)
        elif isinstance(node, ast.Call) and _dotted(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            target = below(str(first.value)) if isinstance(first, ast.Constant) else None
            if target is not None:
                yield Import(target, "", node.lineno)


def _relative(module: Module, node: ast.ImportFrom) -> str:
    folder = module.path.split("/")[: -node.level]
    return ".".join([*folder, *(node.module or "").split(".")]).strip(".")


def _dotted(node: ast.expr) -> str:
    """a.b.c of such an expression, "" of another."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


# --- imports ------------------------------------------------------------------------------------


def unplaced(sources: Sources) -> list[str]:
    """Modules that no layer names."""
    return [m.path for m in modules(sources).values() if m.part not in RANKS]


def upward_imports(sources: Sources) -> list[str]:
    """Imports from a layer above, or beside, the module's own."""
    known, broken = modules(sources), []
    for module in known.values():
        here = RANKS.get(module.part, len(LAYERS))
        for found in imports(module, known):
            part = found.target.split(".")[0] or "__init__"
            if part in (module.part, COMPILED):
                continue
            if part not in RANKS:
                broken.append(f"{module.path}:{found.line} imports {part}, which has no layer")
            elif RANKS[part] >= here:
                broken.append(f"{module.path}:{found.line} imports {found.target or 'memokern'}")
    return broken


def import_cycles(sources: Sources) -> list[str]:
    """Modules that import each other, directly or through others."""
    known = modules(sources)
    edges = {
        name: {i.target for i in imports(module, known) if i.target in known} - {name}
        for name, module in known.items()
    }
    done: set[str] = set()
    broken: list[str] = []

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            broken.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in sorted(edges[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(known):
        visit(name, [])
    return broken


def backend_imports(sources: Sources) -> list[str]:
    """Imports of a backend by another, or by a layer that has no business with backends."""
    known, broken = modules(sources), []
    for module in known.values():
        for found in imports(module, known):
            where, *inner = found.target.split(".")
            said = f"{module.path}:{found.line} imports {found.target or 'memokern'}"
            if where == COMPILED and not module.path.startswith("backends/cpu/"):
                broken.append(said)
            if where != "backends":
                continue
            if not module.path.startswith(IMPORT_BACKENDS):
                broken.append(said)
            if module.part == "backends":
                mine = module.path.split("/")[1].removesuffix(".py")
                theirs = inner[0] if inner else ""
                if theirs not in (mine, "protocol"):
                    broken.append(said)
    return broken


# --- private names ------------------------------------------------------------------------------


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _defined(tree: ast.Module) -> set[str]:
    """Every name that a module gives to something: a function, a class, a variable, a field."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if _dotted(node.value) in ("self", "cls") else set()
    return found


def crossing_names(sources: Sources) -> list[str]:
    """Names with an underscore that are used outside the module that defines them: imported from
    another module of the package, or read from an object whose class is elsewhere."""
    known, broken = modules(sources), []
    for module in known.values():
        for found in imports(module, known):
            name = found.what or found.target.split(".")[-1]
            if _is_private(name) and found.target != COMPILED:
                broken.append(f"{module.path}:{found.line} imports {name} of {found.target}")
        mine = _defined(module.tree) | TUPLE_METHODS | MODULE_HOOKS
        foreign = _names_of_torch(module.tree)
        for node in _nodes(module.tree):
            if not isinstance(node, ast.Attribute) or not _is_private(node.attr):
                continue
            if node.attr not in mine and _dotted(node).split(".")[0] not in foreign:
                broken.append(f"{module.path}:{node.lineno} uses .{node.attr}")
    return broken


def _names_of_torch(tree: ast.Module) -> set[str]:
    """What a module calls torch, and what it takes from it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    found.add(alias.asname or "torch")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def torch_internals(sources: Sources) -> list[str]:
    """Private names of PyTorch outside the files that are there for them."""
    broken = []
    for module in modules(sources).values():
        if module.path.startswith(USE_TORCH_INTERNALS):
            continue
        foreign = _names_of_torch(module.tree)
        for node in _nodes(module.tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute) and _dotted(node).split(".")[0] in foreign:
                names = [_dotted(node)] if _is_private(node.attr) else []
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names if a.name.split(".")[0] == "torch"]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                names = [f"{node.module}.{a.name}" for a in node.names]
            for name in names:
                if any(_is_private(part) for part in name.split(".")):
                    broken.append(f"{module.path}:{node.lineno} uses {name}")
    return broken


# --- size ---------------------------------------------------------------------------------------


def positional_counts(sources: Sources) -> list[tuple[int, str]]:
    """How many positional parameters each function has, self left out, and where it is. Compiled
    kernels, whose arguments are pointers and sizes, are not counted."""
    found = []
    for module in modules(sources).values():
        methods = {
            id(inner): any(_dotted(d) == "staticmethod" for d in inner.decorator_list)
            for node in _nodes(module.tree)
            if isinstance(node, ast.ClassDef)
            for inner in node.body
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for node in _nodes(module.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if any(_is_jit(decorator) for decorator in node.decorator_list):
                continue
            count = len(node.args.posonlyargs) + len(node.args.args)
            count -= not methods.get(id(node), True)
            found.append((count, f"{module.path}:{node.lineno} {node.name}"))
    return found


def _is_jit(decorator: ast.expr) -> bool:
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return _dotted(target).split(".")[-1] == "jit"


def crowded_functions(sources: Sources) -> list[str]:
    """Functions with more positional parameters than anybody keeps in order."""
    return [
        f"{where} has {count} positional parameters"
        for count, where in positional_counts(sources)
        if count > MOST_POSITIONAL and not where.startswith(MANY_POSITIONAL)
    ]


def long_files(sources: Sources) -> list[str]:
    """Files that cannot be held in mind."""
    lengths = {path: len(text.splitlines()) for path, text in sources.items()}
    return [f"{path} has {n} lines" for path, n in lengths.items() if n > MOST_LINES]


# --- operations ---------------------------------------------------------------------------------

# What the base class makes of another operation of the same backend.
DERIVED = {"posterior": "posterior_state"}


def unanswered_operations(
    backend: object, base: type, operations: Sequence[str], calls: Sequence[object]
) -> list[str]:
    """Operations that a backend neither has nor refuses, with a reason in one line, for such
    calls."""
    broken = []
    for operation in operations:
        needed = (operation, DERIVED.get(operation))
        has = any(
            getattr(type(backend), name) is not getattr(base, name)
            for name in needed
            if name is not None
        )
        for call in calls:
            reason = backend.refuses(operation, call)  # type: ignore[attr-defined]
            if reason is None and not has:
                broken.append(f"{type(backend).__name__} neither has nor refuses {operation}")
            elif reason is not None and (not reason.strip() or "\n" in reason):
                broken.append(f"{type(backend).__name__} gives no line of reason for {operation}")
    return sorted(set(broken))


# --- csrc ---------------------------------------------------------------------------------------

_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)
_TORCH_HEADERS = ("torch/", "ATen/", "c10/", "caffe2/")


def wrong_includes(sources: Sources) -> list[str]:
    """Includes of {path below csrc: text}: of torch, which csrc never sees; of pybind11 outside
    bind/; of cpu/ in cuda/ and the other way; of either in include/, on which both build."""
    broken = []
    for path, text in sources.items():
        folder = path.split("/")[0]
        for header in _INCLUDE.findall(text):
            parts = _resolved(path, header)
            said = f"{path} includes {header}"
            if header.startswith(_TORCH_HEADERS) or header == "Python.h":
                broken.append(said)
            if header.startswith("pybind11/") and folder != "bind":
                broken.append(said)
            other = {"cpu": {"cuda"}, "cuda": {"cpu"}, "include": {"cpu", "cuda", "bind"}}
            if other.get(folder, set()) & set(parts):
                broken.append(said)
    return broken


def _resolved(path: str, header: str) -> list[str]:
    """The folders on the way to a header, from csrc or from beside the file that includes it."""
    if not header.startswith("."):
        return header.split("/")[:-1]
    here = path.split("/")[:-1]
    for part in header.split("/")[:-1]:
        here = here[:-1] if part == ".." else here if part == "." else [*here, part]
    return here


PYTHON_RULES = (
    unplaced,
    upward_imports,
    import_cycles,
    backend_imports,
    crossing_names,
    torch_internals,
    crowded_functions,
    long_files,
)


def read(root: Path, *suffixes: str) -> Sources:
    """{path below root: text} of the files with these suffixes."""
    return {
        path.relative_to(root).as_posix(): path.read_text()
        for path in sorted(root.rglob("*"))
        if path.suffix in suffixes
    }


if __name__ == "__main__":
    repository = Path(__file__).resolve().parents[1]
    package = read(repository / "memokern", ".py")
    for rule in PYTHON_RULES:
        print(f"{rule.__name__}:", *(rule(package) or ["none"]), sep="\n  ")
    native = read(repository / "csrc", ".h", ".hpp", ".cpp", ".cu", ".cuh")
    print("wrong_includes:", *(wrong_includes(native) or ["none"]), sep="\n  ")
    counts = Counter(count for count, _ in positional_counts(package))
    print("positional parameters:", dict(sorted(counts.items())))
