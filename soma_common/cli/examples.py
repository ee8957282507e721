"""The examples at the end of a command's help."""

from __future__ import annotations


def examples(*pairs: str) -> str:
    """Commands and what each is for, by turns, as an epilog that is not wrapped."""
    lines = [f"  {command}\n      {purpose}" for command, purpose in zip(pairs[::2], pairs[1::2], strict=True)]
    return "\b\nExamples:\n" + "\n".join(lines)
