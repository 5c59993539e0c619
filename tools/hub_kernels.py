"""The layout of a Hugging Face Kernels repository, made of the package.

`kernels` imports a kernel from a folder outside of the path of modules, under a name that no other
version has. So the package is written there with that name in its imports, and with a namespace of
operations that has it too; the name ends in a digest of what was written. What cannot run from
there is left out: the command line, the integrations, and the compiled kernels of the CPU, for
which the reference steps in. What remains is Python, Triton and CUDA sources, the same for every
machine:

    OUT/README.md
    OUT/build/torch-cuda/__init__.py, metadata.json, backends/cuda/sources/...
    OUT/build/torch-rocm/...      the same for AMD's GPUs (Triton)
    OUT/build/torch-cpu/...       and to look at it without a GPU

    python -m tools.hub_kernels build/hub

and then, in Python: kernels.get_local_kernel(pathlib.Path("build/hub"))
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

import memokern

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cuda", "rocm", "cpu")
LEFT_OUT = ("apps", "integrations", "__main__.py", "py.typed")
SUFFIXES = (".py", ".npz")
CUDA_SUFFIXES = (".h", ".cuh", ".cu")
# Where the package says its own name to Python or to PyTorch: imports, modules by name, operations.
NAMED = re.compile(
    r"""(^\s*(?:from|import)\ )memokern\b          # an import
    |((?:import_module\(f?|Library\(|register_(?:fake|vmap)\(f?)")memokern(?=\.|"|::)
    |(torch\.ops\.)memokern\b""",
    re.MULTILINE | re.VERBOSE,
)
README = """---
library_name: kernels
license: apache-2.0
---

# memokern

Fused kernels (Triton, CUDA C++) for exact scores of Gaussian mixtures centred on a training set:
the closed-form minimiser of a diffusion model's loss. Made of memokern {version} by
`python -m tools.hub_kernels`.

    from kernels import get_local_kernel
    memokern = get_local_kernel(Path("."))
    p = memokern.posterior(x, rows, sigma=2.0)
    p.score, p.mean, p.log_density

It needs numpy, scipy, safetensors and tqdm beside PyTorch {torch}; the CUDA kernels need cuda-core
and NVRTC, and Triton's need Triton. `pip install memokern` brings the CPU's compiled kernels too.
"""


def sources() -> dict[str, bytes]:
    """What goes into each variant, by path: modules, the digits, the CUDA kernels' sources."""
    package, cuda = Path(memokern.__file__).parent, ROOT / "csrc" / "cuda"
    found = {
        path.relative_to(package).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.suffix in SUFFIXES and path.relative_to(package).parts[0] not in LEFT_OUT
    }
    kernels = {
        f"backends/cuda/sources/{path.relative_to(cuda).as_posix()}": path.read_bytes()
        for path in sorted(cuda.rglob("*"))
        if path.suffix in CUDA_SUFFIXES
    }
    if not kernels:
        raise FileNotFoundError(f"no CUDA sources in {cuda}")
    licence = {"LICENSE": (ROOT / "LICENSE").read_bytes()}
    return found | kernels | licence


def renamed(text: str, name: str) -> str:
    """A module of the package as a module of the package `name`.

    Example:
        >>> renamed("from memokern.util import env\\nx = torch.ops.memokern", "_a")
        'from _a.util import env\\nx = torch.ops._a'
    """
    return NAMED.sub(lambda found: f"{found[1] or found[2] or found[3]}{name}", text)


def write(out: Path) -> list[Path]:
    """Writes the repository into a folder that is empty or was written by this before, and returns
    the folders of its variants.

    Raises: FileExistsError for a folder with something else in it.
    """
    if out.exists() and any(out.iterdir()) and not (out / "build").is_dir():
        raise FileExistsError(f"{out} has something else in it: choose another folder")
    files = sources()
    digest = hashlib.sha256()
    for path, content in files.items():
        digest.update(path.encode() + b"\0" + content + b"\0")
    shutil.rmtree(out / "build", ignore_errors=True)
    made = []
    for backend in BACKENDS:
        # Kernels of two backends are one file in two places, and may be imported side by side.
        name = f"_memokern_{backend}_{digest.hexdigest()[:10]}"
        folder = out / "build" / f"torch-{backend}"
        for path, content in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix == ".py":
                content = renamed(content.decode(), name).encode()
            target.write_bytes(content)
        metadata = {
            "name": "memokern",
            "id": name,
            "version": int(memokern.__version__.split(".")[0]) + 1,  # a whole number >= 1
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        made.append(folder)
    torch = next(
        line.strip(' ",').removeprefix("torch")
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.strip().startswith('"torch>=')
    )
    text = README.format(version=memokern.__version__, torch=torch)
    (out / "README.md").write_text(text)
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the layout of a Kernels repository.")
    parser.add_argument("out", type=Path, help="its folder")
    for folder in write(parser.parse_args().out):
        print(folder)


if __name__ == "__main__":
    main()
