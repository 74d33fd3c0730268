"""What Hypothesis draws for the fuzz tests: values of JSON and YAML, and files with damage."""

from __future__ import annotations

from hypothesis import strategies as st

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
