"""Formulas that are written as text, set by MathJax.

The project writes `l_n = -|x - alpha y_n|^2 / (2 sigma^2)` in docstrings and pages, which reads
well in a terminal. `spans` finds such runs in a sentence, cautiously: a run has only symbols of the
vocabulary below and at least one operator. `latex` takes one to TeX, symbol by symbol.
"""

from __future__ import annotations

import re
from collections.abc import Callable

GREEK = "alpha beta gamma Delta delta lambda Lambda mu phi pi rho sigma Sigma tau theta eta xi"
SYMBOLS = {name: f"\\{name}" for name in GREEK.split()}
SYMBOLS |= {"eps": r"\varepsilon", "integral": r"\int", "sum": r"\sum", "inf": r"\infty"}
SYMBOLS |= {
    "grad_x": r"\nabla_x",
    "log_z": r"\log Z",
    "x0": "x_0",
    "s0": "s_0",
    "dk": "d_k",
    "sqrt": r"\sqrt",
}
SYMBOLS |= {name: f"\\{name}" for name in ("log", "exp", "max", "min", "cos", "sin", "tan", "ln")}
ROMAN = "atan Cov div hypot logsumexp softmax tr"
SYMBOLS |= {name: rf"\operatorname{{{name}}}" for name in ROMAN.split()}
# Values, not functions: what is subtracted from them keeps its distance.
NAMED = "bias mean median noise path score value"
SYMBOLS |= {name: rf"\mathrm{{{name}}}" for name in NAMED.split()}
LONG = {("sigma", "data"), ("s", "target"), ("Z", "kept"), ("Z", "dropped")}
# English too: they make no formula, and none begins with one.
WORDS = {"inf", "value", "noise", "path", "bias"}
FUNCTIONS = {"log", "exp", "cos", "sin", "tan", "ln", "div", "tr", "sum"}
SIGNS = {"<=": r"\le ", ">=": r"\ge ", "!=": r"\neq ", "...": r"\ldots ", "..": r"\ldots "}
SIGNS |= {"->": r"\to ", "~": r"\sim ", "²": "^2", "…": r"\ldots "}
# These alone make no formula, and none begins or ends with them.
BINARY = {"=", "<=", ">=", "<", ">", "!=", "+", "/", "->", "~", "^", "_"}

TOKEN = re.compile(
    r"""(?P<space>[ \t\n]+)
      | (?P<number>\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![A-Za-z_]{2}|\.\d))
      | (?P<expect>E(?:_\w+)?\[[^\]\n]*\])
      | (?P<integral>integral\ of\b)
      | (?P<index>(?<=[)}|])_[A-Za-z0-9]+)
      | (?P<word>[A-Za-z][A-Za-z0-9]*(?:_\{[^}]*\}|_[A-Za-z0-9]+)?(?![A-Za-z0-9_]))
      | (?P<sign><=|>=|!=|->|\.\.\.|\.\.|[²…]|[-+=<>/^~(){}]|'(?![A-Za-z])|\\?\|)
      | (?P<comma>,(?=\s))
    """,
    re.VERBOSE,
)

# Words that are no symbols, whole: what follows a hyphen or an apostrophe belongs to them.
SKIPPED = re.compile(r"[\w.]+(?:[-/']\w+)*|\W")
HYPHENATED = re.compile(r"(?<![A-Za-z])[A-Za-z]{2,}(?:-[A-Za-z]+)+")


def word(text: str) -> str | None:
    """TeX of one name with its index, None if it is no symbol."""
    if text in SYMBOLS:
        return SYMBOLS[text]
    name, _, index = text.partition("_")
    if numbered := re.fullmatch(r"([A-Za-z])(\d)(\d?)", name):
        letter, one, two = numbered.groups()
        number = f"{{{one}{two}}}" if two else one
        return f"{letter}_{number}" if not index else None
    # x_t, but of two letters only differentials and products such as dx, xc, dk
    base = SYMBOLS.get(name) or (name if re.fullmatch(r"[A-Za-z]|d[a-zA-Z]|xc|yc", name) else None)
    if base is None or not index:
        return base
    index = index.strip("{}")
    # Longer ones are names of the code, as mean_error and t_noise.
    if len(index) > (2 if name in f"{ROMAN} {NAMED}".split() else 3) and (name, index) not in LONG:
        return None
    if name == "log" or (base.startswith("d") and len(name) == 2):
        return None
    inner = {"min": r"\min", "max": r"\max"}.get(index) or SYMBOLS.get(index, index)
    if len(index) > 3 and inner == index:
        inner = rf"\mathrm{{{index}}}"
    return f"{base}_{{{inner}}}"


def latex(text: str) -> str:
    """TeX of a formula in text. ValueError, with the place, if there is what it does not know."""
    out, place, depth = "", 0, 0
    while place < len(text):
        if text[place] in ",.;" and not text.startswith("..", place):
            out, place = out + text[place] + " ", place + 1
            continue
        found = TOKEN.match(text, place)
        if not found or not found[0]:
            raise ValueError(f"no formula at {text[place:]!r}")
        kind, token, place = found.lastgroup, found[0], found.end()
        if kind == "space":
            wide = "  " in token and "\n" not in token
            out += r" \quad " if wide else r"\, " if needs_space(out, text[place:]) else " "
        elif kind == "word":
            symbol = word(token)
            if symbol is None:
                raise ValueError(f"no symbol: {token!r}")
            out += symbol
        elif kind == "expect":
            head, _, body = token.partition("[")
            inside = r" \mid ".join(latex(part.strip()) for part in re.split(r"\s\|\s", body[:-1]))
            out += r"\mathbb{E}" + head[1:] + "[" + inside + "]"
        elif kind == "number":
            out += power_of_ten(token)
        elif kind == "integral":
            out += r"\int "
        elif kind == "index":
            out += "_{" + token[1:] + "}"
        elif token in ("|", r"\|"):
            depth, bar = (0, r"\rvert ") if depth else (1, r"\lvert ")
            out += bar
        elif token == "^":
            power = re.match(r"\(([^()]*)\)|\{([^}]*)\}|(-?[\w.]+'?)", text[place:])
            if not power:
                raise ValueError(f"no exponent at {text[place:]!r}")
            out += "^{" + latex(next(g for g in power.groups() if g)) + "}"
            place += power.end()
        elif token == "<" and place < len(text) and not text[place].isspace():
            out += r"\langle "
        elif token == ">" and not text[place - 2].isspace():
            out += r"\rangle "
        else:
            out += SIGNS.get(token, rf"\{token}" if token in "{}" else token)
    return re.sub(r"\\sqrt\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}", out)


def power_of_ten(number: str) -> str:
    """TeX of a number, 2e-6 as 2 times a power of ten."""
    digits, _, power = number.partition("e")
    if not power:
        return number
    return ("" if digits == "1" else rf"{digits} \cdot ") + f"10^{{{int(power)}}}"


def needs_space(before: str, after: str) -> bool:
    """Between two factors of a product, so that sum w l is not read as one word."""
    return bool(re.search(r"[\w})']$", before) and re.match(r"\w", after))


def spans(text: str) -> list[tuple[int, int]]:
    """Where text has formulas."""
    runs: list[list[re.Match[str]]] = [[]]
    place = 0
    while place < len(text):
        found = None if HYPHENATED.match(text, place) else TOKEN.match(text, place)
        good = found is not None and found[0] != ""
        if good and found is not None and found.lastgroup == "word":
            good = word(found[0]) is not None and not new_clause(text, found, runs[-1])
        if good and found is not None:
            if found.lastgroup != "comma" or opened(runs[-1]):
                runs[-1].append(found)
            else:
                runs.append([])
            place = found.end()
            continue
        runs.append([])
        skipped = SKIPPED.match(text, place)
        place = skipped.end() if skipped else place + 1
    return [s for run in runs for s in whole(run)]


def new_clause(text: str, found: re.Match[str], run: list[re.Match[str]]) -> bool:
    """Whether a name does not belong to the run before it: an article, or what follows "= 0"."""
    words = [t[0] for t in run if t.lastgroup == "word"]
    if found[0] in ("a", "A", "I") and not (words and words[-1] in FUNCTIONS):
        return bool(re.match(r"\s+[A-Za-z]", text[found.end() :]))
    return "".join(t[0] for t in run[-4:]).replace("\n", " ").endswith("= 0 ")


def opened(run: list[re.Match[str]]) -> bool:
    """Whether a bracket, or an inner product, is open."""
    texts = [t[0] for t in run]
    inner = [t for t in run if t[0] in "<>" and (t[0] == "<") == is_bracket(t)]
    return texts.count("(") > texts.count(")") or bool(inner and inner[-1][0] == "<")


def is_bracket(sign: re.Match[str]) -> bool:
    """Of a < or a >: whether no space is inside of it, as in `<x, y>`; there is one in `x < y`."""
    beside = sign.end() if sign[0] == "<" else sign.start() - 1
    return not sign.string[beside : beside + 1].isspace()


def whole(run: list[re.Match[str]]) -> list[tuple[int, int]]:
    """The run without what hangs over at its ends, if the rest is a formula."""

    def hangs(token: re.Match[str], first: bool) -> bool:
        if token[0] in "<>":
            return not is_bracket(token) or (token[0] == "<") != first
        if first and token[0] in WORDS:
            return bool(re.match(r"\s+\w", token.string[token.end() :]))
        ends = BINARY if first else BINARY | {"-"}
        if first and token[0] == "-" and re.search(r"\w\s*$", token.string[: token.start()]):
            return True  # what it is subtracted from is no symbol
        return token.lastgroup in ("space", "comma") or token[0] in ends | {"..", "..."}

    while run and (hangs(run[0], True) or run[0][0] == "'"):
        run = run[1:]
    while run and hangs(run[-1], False) and not goes_on(run):
        run = run[:-1]
    # A bracket without its other one belongs to the sentence.
    open_at: list[int] = []
    for i, token in enumerate(run):
        if token[0] == "(":
            open_at.append(i)
        elif token[0] == ")" and not open_at:
            return [*whole(run[:i]), *whole(run[i + 1 :])]
        elif token[0] == ")":
            open_at.pop()
    if open_at:
        # What it takes in may be more than symbols: then what is before it is not whole.
        before, after = run[: open_at[0]], run[open_at[0] + 1 :]
        return (
            whole(after)
            if before and before[-1].lastgroup == "word"
            else [
                *whole(before),
                *whole(after),
            ]
        )
    texts = [t[0] for t in run]
    if texts.count("|") % 2 or texts.count(r"\|") % 2:
        return []
    return [(run[0].start(), run[-1].end())] if run and says_something(run) else []


def goes_on(run: list[re.Match[str]]) -> bool:
    """Whether a run ends as `d1 <= d2 <= ...`."""
    texts = [t[0] for t in run if t.lastgroup != "space"]
    return run[-1][0] == "..." and len(texts) > 2 and texts[-2] in {"<=", ">=", "<", ">"}


def says_something(run: list[re.Match[str]]) -> bool:
    """Whether a run has an operator or an index and a symbol, and is no sentence by chance."""
    words = [t[0] for t in run if t.lastgroup in ("word", "expect")]
    signs = {t[0] for t in run if t.lastgroup == "sign"}
    if all(w in WORDS for w in words):
        return False
    if len(run) == 1:  # y_n, not sigma_min, which is an argument where it stands alone
        return bool(re.fullmatch(r"\w+_\w\w?", words[0])) and words[0] != "log_z"
    return bool(signs & {"=", "<=", ">=", "<", ">", "+", "-", "/", "^", "²"}) or "_" in str(words)


def replaced(text: str, write: Callable[[str], str]) -> str:
    """The text with write(TeX) in the place of each formula."""
    out, last = "", 0
    for first, end in spans(text):
        try:
            tex = latex(text[first:end])
        except ValueError:
            continue
        out += text[last:first] + write(re.sub(r"\s+", " ", tex).strip())
        last = end
    return out + text[last:]
