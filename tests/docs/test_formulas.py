"""What the site makes of formulas that are written as text."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_extensions"))

import docstrings  # noqa: E402
import formulas  # noqa: E402
import pages  # noqa: E402


def in_dollars(text):
    return formulas.replaced(text, lambda tex: f"${tex}$")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"l_n = -\|x\|^2 / (2 s), rows", r"$l_{n} = -\lvert x\rvert ^{2} / (2\, s)$, rows"),
        ("with sigma_max^(1/rho) as", r"with $\sigma_{\max}^{1/\rho}$ as"),
        ("x0 = E[y | x] [*batch]", r"$x_0 = \mathbb{E}[y \mid x]$ [*batch]"),
        ("g = sqrt(2 (t + 1)).", r"$g = \sqrt{2 (t + 1)}$."),
        ("(see |x_b| <= 1)", r"(see $\lvert x_{b}\rvert \le 1$)"),
        ("<x, y> <= 2", r"$\langle x, y\rangle \le 2$"),
        ("i = 0..n-1, and", r"$i = 0\ldots n-1$, and"),
        ("With d1 <= d2 <= ... the", r"With $d_1 \le d_2 \le \ldots$ the"),
        ("0.5 mean(d2 ... d50) < 1", r"$0.5\, \mathrm{mean}(d_2 \ldots d_{50}) < 1$"),
        ("alpha mean - x = 0", r"$\alpha\, \mathrm{mean} - x = 0$"),
        ("At sigma = 0 eps is 0", r"At $\sigma = 0$ eps is 0"),
    ],
)
def test_a_formula_is_set(text, expected):
    assert in_dollars(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "the N x B matrix of a batch",
        "sigma, alpha: numbers that broadcast",
        "mean_error, t_noise and log_z",
        "float32 rows and/or uint8 - never both",
        "a path, -inf for none, and a value",
        "see arXiv 2501.15785, 1e-6 of them",
    ],
)
def test_a_sentence_is_left_alone(text):
    assert in_dollars(text) == text


def test_docstrings_keep_code_roles_and_arguments():
    lines = [
        "`x_t` of :func:`f`, [*batch], y_n:",
        "",
        "Args:",
        "    x_t: one of",
        "        - a |b|",
    ]
    assert docstrings.rewrite(lines)[:-1] == [
        r"`x_t` of :func:`f`, [\*batch], :math:`y_{n}`:",
        "",
        "Args:",
        "    x_t: one of",
        "",
        r"        - a \|b\|",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so t_n <= tau, `t_n`.", "so $t_{n} \\le \\tau$, `t_n`."),
        ("| a | \\|x\\|^2 + 1 |", "| a | $\\lvert x\\rvert ^{2} + 1$ |"),
        ("```python\nx = y + 1\n```\n", "```python\nx = y + 1\n```\n"),
        ("    pip install .\n    x = y", "    pip install .\n    x = y"),
        ("x:\n\n    x = y\n", "x:\n\n$$\n\\begin{gathered} x = y \\end{gathered}\n$$\n"),
        ("[x = y](a_b.md) log-sum-exp", "[x = y](a_b.md) log-sum-exp"),
    ],
)
def test_pages_are_set_but_for_code_and_links(text, expected):
    assert pages.rewrite(text) == expected
