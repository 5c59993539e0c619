"""Help and completion: what a person at a shell sees of the command line."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import click
import pytest

from memokern.apps.cli import main, pages
from tests.apps.cli_calls import call

COMMANDS = sorted(main.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_all_options_once_and_an_example(name) -> None:
    done = call(name, "--help")
    assert done.exit_code == 0
    command = main.commands[name]
    for param in command.params:
        for option in (o for o in param.opts if o.startswith("--")):
            lines = [line for line in done.output.splitlines() if line.startswith("  -")]
            heads = [line.strip().partition("  ")[0] for line in lines]
            found = [head for head in heads if option in head.replace(",", " ").split()]
            assert len(found) == 1, (option, found)
        assert isinstance(param, click.Argument) or param.help, param.name
    assert f"Examples:\n  memokern {name}" in done.output
    assert "RANGE" not in done.output and not re.search(r"\d{10}", done.output)
    assert ("\nTraining:\n" in done.output) == (name == "train")


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_of_options_that_exist(name) -> None:
    for line in main.commands[name].described()[1]:
        words = [word for word in shlex.split(line.split(">")[0]) if word != "memokern"]
        assert words[0] == name
        known = {o for p in main.commands[name].params for o in p.opts}
        assert {word for word in words if word.startswith("-") and word != "-"} <= known, line


def test_a_manual_page_has_the_sections_of_one() -> None:
    done = call("help", "sample")
    assert done.exit_code == 0
    heads = [line for line in done.output.splitlines() if line and not line.startswith(" ")]
    assert [head for head in heads if not head.startswith("OPTIONS")] == [
        "NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "EXIT STATUS",
    ]  # fmt: skip
    assert "OPTIONS: DATA" in heads and heads[-3] == "OPTIONS: OUTPUT"
    whole = call("help").output
    assert all(f"\n    {name} " in whole for name in COMMANDS)
    wrong = call("help", "sampel")
    assert wrong.exit_code == 2 and "no command 'sampel'" in wrong.stderr


def test_sections_name_parameters_that_exist() -> None:
    """A parameter that gets another name does not drop out of its section."""
    there = {param.name for command in main.commands.values() for param in command.params}
    named = [name for names in pages.SECTIONS.values() for name in names]
    assert len(named) == len(set(named)) and set(named) <= there, set(named) - there


# What is typed, and some of what Tab then offers.
TYPED = {
    "sam": ["sample"],
    "sample --solver e": ["euler", "exponential"],
    "sample --seed 3 --sol": ["--solver"],
    "memorization here.npy --repo": ["--report"],
    "memorization her": ["here.npy"],
    "index --basis p": ["pca"],
    "reproduce rat": ["rate"],
    "help rep": ["reproduce"],
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is missing")
def test_tab_completes_in_bash(tmp_path) -> None:
    made = call("completion", "bash")
    assert made.exit_code == 0
    (tmp_path / "script").write_text(made.output)
    (tmp_path / "here.npy").touch()
    lines = ["source ./script", "complete -p memokern >&2"]
    for typed in TYPED:
        words = ["memokern", *shlex.split(typed)]
        lines += [
            f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()",
            f"_shtab_memokern memokern {words[-1]} {words[-2]} 2>/dev/null; echo ${{COMPREPLY[*]}}",
        ]
    ran = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "-F _shtab_memokern memokern" in ran.stderr
    offered = dict(zip(TYPED, (line.split() for line in ran.stdout.splitlines()), strict=True))
    assert offered == TYPED


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_their_script(shell, tmp_path) -> None:
    made = call("completion", shell)
    assert made.exit_code == 0 and "memokern" in made.output
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(made.output)
        checked = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, b"")
    assert call("completion", "csh").exit_code == 2
