"""What Hypothesis draws for the fuzz tests, and how often: values of JSON and YAML, and files with damage.

FUZZ_EXAMPLES=N tries N examples of each property, drawn anew at every call; the default few are always the same. One
that takes more than ten seconds fails: nothing that is read may hang.
"""

from __future__ import annotations

import os
from datetime import timedelta

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

ASKED = os.environ.get("FUZZ_EXAMPLES")
fuzz = settings(
    max_examples=int(ASKED or 40),
    derandomize=ASKED is None,
    deadline=timedelta(seconds=10),
    database=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if ASKED is None else [])],
    suppress_health_check=list(HealthCheck),
)

# what has broken readers: surrogates, NUL, line ends of Unicode, numbers without end, references
NASTY = [
    "\x00",
    "\ud800",
    "\\ud800",
    "\\uD83D",
    "\u2028",
    "\x85",
    "\ufeff",
    "9" * 5000,
    "1e999",
    "NaN",
    "-0",
    "{",
    "[",
    "]",
]
NASTY += [
    "}",
    '"',
    ":",
    "&a ",
    "*a",
    "<<: ",
    "!!int ",
    "!!timestamp x",
    "!!binary é",
    "!!python/none ",
    "? ",
    "---",
    "...",
]
NASTY += [
    "%YAML 9.9",
    "\t",
    "[" * 3000,
    '{"a":' * 1000,
    "../..",
    "/",
    "~",
    "null",
    "true",
    "0x1F",
    "1_000",
    "'",
    "|",
    ">",
]

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(NASTY),
    st.integers(min_value=10**300, max_value=10**310),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with some of them changed, lost, repeated, cut off or replaced by nasty ones."""
    data = whole
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 40)))
        kind = draw(st.sampled_from(["replace", "nasty", "lose", "repeat", "cut", "flip"]))
        if kind == "replace":
            data = data[:start] + draw(st.binary(max_size=20)) + data[stop:]
        elif kind == "nasty":
            data = data[:start] + draw(st.sampled_from(NASTY)).encode(errors="surrogatepass") + data[stop:]
        elif kind == "lose":
            data = data[:start] + data[stop:]
        elif kind == "repeat":
            data = data[:stop] + data[start:stop] * draw(st.integers(1, 50)) + data[stop:]
        elif kind == "cut":
            data = data[:start]
        elif start < len(data):
            data = data[:start] + bytes([data[start] ^ (1 << draw(st.integers(0, 7)))]) + data[start + 1 :]
    return data
