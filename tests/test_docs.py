"""What the documents show is true: docstring examples, README commands, environment variables."""

import doctest
import importlib
import pkgutil
import re
import shlex
import textwrap
from pathlib import Path

import click.testing
import pytest
import torch.distributed

import memokern
from memokern.apps.cli import main
from memokern.util import env
from tests.integrations import clients

ROOT = Path(__file__).parent.parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(memokern.__path__, "memokern.")
    if not m.name.endswith(("__main__", "._C"))
)


@pytest.mark.parametrize("name", ["memokern", *MODULES])
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "memokern.integrations.diffusers":  # its base class is diffusers' own
        module = clients.client("diffusers", name)
    else:
        module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=FLAGS)
    assert result.failed == 0


@pytest.mark.parametrize("name", [n for n in memokern.__all__ if n not in ("Nearest", "Posterior")])
def test_public_names_have_an_example(name):
    assert ">>>" in (getattr(memokern, name).__doc__ or ""), name


def readme_blocks(language, page="README.md"):
    text = (ROOT / page).read_text()
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.S)
    return [textwrap.dedent(block) for block in blocks]


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = readme_blocks("python")
    assert blocks
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)


# Other projects' packages run this one's, in tests/integrations.
PAGES = sorted(
    str(page.relative_to(ROOT / "docs").with_suffix(""))
    for page in (ROOT / "docs").rglob("*.md")
    if "```python" in page.read_text() and page.stem != "integrations"
)
LONG_PAGES: set[str] = set()


def test_pages_have_examples():
    assert len(PAGES) > 6
    assert set(PAGES) >= LONG_PAGES


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.long] * (p in LONG_PAGES)) for p in PAGES]
)
def test_examples_of_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = readme_blocks("python", f"docs/{page}.md")
    scope: dict = {}
    try:
        for block in blocks:
            exec(compile(block, page, "exec"), scope)
    finally:  # a page on several machines leaves its group, of which a process has one
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_thread")
def test_messages_of_the_faq_are_those_of_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = "".join(readme_blocks("pycon", "docs/faq.md"))
    assert session.count("Traceback") > 10
    test = doctest.DocTestParser().get_doctest(session, {}, "docs/faq.md", None, 0)
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test).failed == 0


COMMAND_PAGES = ["README.md", "docs/command-line.md", "docs/tasks/sample.md"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", COMMAND_PAGES)
def test_commands_of_pages_run(page, tmp_path, monkeypatch):
    """Each `memokern ...` line of a page, in an empty folder, in the page's order."""
    monkeypatch.chdir(tmp_path)
    lines = [line for block in readme_blocks("sh", page) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("memokern ")]
    assert commands
    for command in commands:
        result = click.testing.CliRunner().invoke(main, command[1:])
        assert result.exit_code == 0, (command, result.output)


# The pages whose blocks in a language are run by the tests above, and docs/integrations.md by
# tests/integrations/test_page.py. What cannot be run, such as a make target, is indented.
RUN = {
    "python": {"README.md", "docs/integrations.md", *(f"docs/{page}.md" for page in PAGES)},
    "pycon": {"docs/faq.md"},
    "sh": set(COMMAND_PAGES),
}


def test_every_block_of_code_is_run_by_a_test():
    fenced = re.compile(r"^( *)```([^\n]*)\n.*?^\1```$", re.S | re.M)
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "csrc").rglob("*.md")]
    blocks = [
        (language, str(page.relative_to(ROOT)))
        for page in pages
        for _, language in fenced.findall(page.read_text())
        if not language.startswith("{")  # a directive of the site
    ]
    assert len(blocks) > 50
    assert [block for block in blocks if block[1] not in RUN.get(block[0], ())] == []


def test_readme_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:    |`)make ([\w-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test", "bench"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_environment_page_lists_every_variable():
    page = set(re.findall(r"`(MEMOKERN_\w+)`", (ROOT / "docs" / "environment.md").read_text()))
    assert page == {env.BACKEND, env.ISA, env.PRECISION, env.AUTOTUNE, env.CUDA_CACHE}
    package = Path(memokern.__file__).parent
    used = {v for p in package.rglob("*.py") for v in re.findall(r"MEMOKERN_\w+", p.read_text())}
    assert used == page
