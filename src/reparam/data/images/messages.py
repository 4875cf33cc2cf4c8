"""How names, numbers and sizes are put into messages."""

from __future__ import annotations


def shown(text: str, most: int = 80) -> str:
    """A name that someone else chose, as one printable line of limited length."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain if len(plain) <= most else f"{plain[: most // 2]}…{plain[-most // 2 :]}"


def some(bad: list[tuple[str, str]]) -> str:
    """The first few of these names, each with its reason."""
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return ", ".join(f"{name} ({reason})" for name, reason in bad[:5]) + more


def plural(n: int, noun: str) -> str:
    """``n`` and the noun, with an s unless ``n`` is 1."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


def by(size: tuple[int, int]) -> str:
    """A size as height × width."""
    return f"{size[0]}×{size[1]}"


def amount(count: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.3g} MiB"
