"""Compiled kernels on disk: found again, made anew where anything differs or is damaged, and done
without where the folder cannot be written."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from memokern.backends.cuda.core import cache, compiler, sources
from memokern.backends.cuda.core.variant import Variant
from memokern.util import env

ONE = Variant("sweep/one.cu", ("one",), (("MK_ROWS", 1),))


@pytest.fixture
def made(tmp_path: Path, monkeypatch) -> list[tuple[str, str]]:
    """What was compiled, in order, with a cache of the test's own."""
    found: list[tuple[str, str]] = []

    def compile_variant(variant: Variant, arch: str) -> compiler.Compiled:
        found.append((variant.name, arch))
        return compiler.Compiled(f"{variant.name} for {arch}".encode() * 100, "")

    monkeypatch.setenv(env.CUDA_CACHE, str(tmp_path / "kernels"))
    monkeypatch.setattr(compiler, "compile_variant", compile_variant)
    monkeypatch.setattr(compiler, "version", lambda: "13.0")
    monkeypatch.setattr(sources, "digest", lambda: "aa")
    return found


def test_a_kernel_is_compiled_once(made) -> None:
    first = cache.machine_code(ONE, "sm_90a")
    assert cache.machine_code(ONE, "sm_90a") == first and len(made) == 1
    names = [p.name for p in cache.folder().iterdir()]
    assert names == [cache.key(ONE, "sm_90a")] and names[0].startswith("one.sm_90a.")


def test_whatever_changes_the_machine_code_changes_the_key(made, monkeypatch) -> None:
    keys = {cache.key(ONE, "sm_90a"), cache.key(ONE, "sm_100a")}
    keys.add(cache.key(ONE._replace(macros=(("MK_ROWS", 2),)), "sm_90a"))
    keys.add(cache.key(ONE._replace(program="scan/one.cu"), "sm_90a"))
    monkeypatch.setattr(compiler, "version", lambda: "13.1")
    keys.add(cache.key(ONE, "sm_90a"))
    monkeypatch.setattr(sources, "digest", lambda: "bb")
    keys.add(cache.key(ONE, "sm_90a"))
    monkeypatch.setattr(compiler, "STANDARD", "c++20")
    keys.add(cache.key(ONE, "sm_90a"))
    assert len(keys) == 7


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "another format", "a pickle"])
def test_a_damaged_entry_is_made_anew(made, damage: str) -> None:
    code = cache.machine_code(ONE, "sm_90a")
    path = cache.folder() / cache.key(ONE, "sm_90a")
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-1], "empty": b"", "another format": b"memokern cubin 0\n" + whole,
        "changed": whole[:-1] + bytes([whole[-1] ^ 1]),
        "a pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
    }[damage]  # fmt: skip
    path.write_bytes(broken)
    assert cache.machine_code(ONE, "sm_90a") == code and len(made) == 2
    assert path.read_bytes() == whole == cache.packed(code)


def test_a_folder_that_cannot_be_written_is_one_warning(made, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(env.CUDA_CACHE, str(tmp_path / "file" / "kernels"))
    cache._tell.cache_clear()
    said = r"cannot be written .*MEMOKERN_CUDA_CACHE names another folder"
    with pytest.warns(RuntimeWarning, match=said) as found:
        assert cache.machine_code(ONE, "sm_90a") == cache.machine_code(ONE, "sm_90a")
    assert len(found) == 1 and len(made) == 2
    assert not cache.writable(cache.folder()) and cache.writable(tmp_path / "new" / "folder")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_processes_that_compile_the_same_kernel_at_once(made, monkeypatch) -> None:
    """Each finds no entry, compiles, and leaves a whole file, whoever comes last."""
    count, (ready, tell), (go, start) = 4, os.pipe(), os.pipe()
    plain = compiler.compile_variant

    def when_all_are_here(variant: Variant, arch: str) -> compiler.Compiled:
        os.write(tell, b".")
        os.read(go, 1)
        return plain(variant, arch)

    monkeypatch.setattr(compiler, "compile_variant", when_all_are_here)
    children = []
    for _ in range(count):
        with warnings.catch_warnings():  # of a fork beside threads, which the child does not use
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = cache.machine_code(ONE, "sm_90a")
            os._exit(0 if code == plain(ONE, "sm_90a").code else 1)
        children.append(child)
    for _ in range(count):
        os.read(ready, 1)
    os.write(start, b"." * count)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * count
    assert [p.name for p in cache.folder().iterdir()] == [cache.key(ONE, "sm_90a")]
    monkeypatch.setattr(compiler, "compile_variant", plain)
    assert cache.machine_code(ONE, "sm_90a") and not made


def test_the_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(env.CUDA_CACHE, " ")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "memokern" / "cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "memokern" / "cuda"


def test_what_is_kept(made) -> None:
    assert cache.kept(cache.folder()) == cache.Kept({}, 0)
    for arch, variant in (("sm_90a", ONE), ("sm_100a", ONE), ("sm_90a", ONE._replace(macros=()))):
        cache.machine_code(variant, arch)
    (cache.folder() / ".one.sm_90a.0123.0-1-2.tmp.cubin").write_text("being written")
    (cache.folder() / "something else").write_text("")
    found = cache.kept(cache.folder())
    assert found.kernels == {"sm_100a": 1, "sm_90a": 2}
    assert found.bytes == sum(
        p.stat().st_size for p in cache.folder().iterdir() if p.name.startswith("one.")
    )


def test_the_digest_is_that_of_every_source(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "common").mkdir()
    for path in ("common/abi.h", "one.cu", "README.md"):
        (tmp_path / path).write_text(path)
    monkeypatch.setattr(sources, "folder", lambda: tmp_path)
    assert sources.files(tmp_path) == ["common/abi.h", "one.cu"]

    def digest() -> str:
        sources.digest.cache_clear()
        return sources.digest()

    first = digest()
    (tmp_path / "README.md").write_text("changed")
    assert digest() == first
    (tmp_path / "common" / "abi.h").write_text("changed")
    assert digest() != first
    sources.digest.cache_clear()
