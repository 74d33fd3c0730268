"""What the commands say of texts that are longer than a prompt may be."""

from __future__ import annotations


def told_truncated(count: int, texts: int, max_tokens: int) -> str:
    """`count` of so many texts lost their middle."""
    return f"{count:,} of {texts:,} texts were cut to tasks.max_tokens: {max_tokens}"


def told_too_long(count: int, texts: int, max_tokens: int) -> str:
    """`count` of so many texts fit in no prompt."""
    return f"{count:,} of {texts:,} texts do not fit in tasks.max_tokens: {max_tokens}, and were left out"
