"""data.yaml and label files no one should trust."""

from __future__ import annotations

from collections.abc import Iterator

from case import Case


def aliases(depth: int, line: str) -> str:
    """depth levels, each naming the one before it several times."""
    return "".join(line.format(this=f"a{i}", last=f"a{i - 1}") for i in range(1, depth))


def yamls() -> Iterator[Case]:
    """data.yaml files."""
    unreadable, wrong = "not a readable YAML", "has a list where a name or a path belongs"
    laughs = "a0: &a0 [lol, lol]\n" + aliases(40, "{this}: &{this} [*{last}, *{last}, *{last}]\n")
    merges = "a0: &a0 {k: 1}\n" + aliases(40, "{this}: &{this} {{<<: [*{last}, *{last}, *{last}]}}\n")
    for what, content, words in (
        ("a billion laughs as names", laughs + "names: *a39\n", wrong),
        ("a billion laughs as a name", laughs + "names: [*a39, b]\n", wrong),
        ("a billion laughs as images", laughs + "names: [a]\ntrain: *a39\n", wrong),
        ("a billion laughs as path", laughs + "names: [a]\npath: *a39\n", wrong),
        ("a billion laughs as nc", laughs + "names: [a]\nnc: *a39\n", "says nc a list"),
        ("a billion laughs unused", laughs + "names: [a]\n", None),
        ("merges without end", merges + "names: [a]\n", unreadable),
        ("itself", "names: &a [*a]\n", wrong),
        ("itself as a mapping", "&a {names: *a}\n", "class numbers"),
        ("a key of itself", "? &a [*a]\n: 1\n", unreadable),
        ("deep lists", "names: " + "[" * 50_000, unreadable),
        ("deep mappings", "names: " + "{a: " * 5_000, unreadable),
        ("python object", "names: !!python/object/apply:os.system ['id']\n", unreadable),
        ("python name", "names: !!python/name:os.system\n", unreadable),
        ("python module", "!!python/module:antigravity\n", unreadable),
        ("another tag", "names: !local [a]\n", unreadable),
        ("an impossible date", "names: [2001-99-99]\n", None),
        ("bytes that are none", "names: [!!binary '%%%']\n", unreadable),
        ("a set of lists", "names: !!set {[a]: 1}\n", unreadable),
        ("a number of 5000 digits", "nc: " + "9" * 5000 + "\nnames: [a]\n", "says nc a long text"),
        ("a number of 10000 hex digits", "nc: 0x" + "f" * 10_000 + "\nnames: [a]\n", "says nc a long text"),
        ("a name of 10000 hex digits", "names: [0x" + "f" * 10_000 + "]\n", None),
        ("minutes without end", "nc: 1" + ":59" * 300_000 + "\nnames: [a]\n", "says nc a long text"),
        ("tagged minutes without end", "nc: !!int '1" + ":59" * 300_000 + "'\nnames: [a]\n", unreadable),
        ("a quarter of a million names", "names:\n" + "- a\n" * 250_000, unreadable),
        ("two mebibytes", "#" * (2 << 20), unreadable), ("a tab", "names:\n\t- a\n", unreadable),
        ("no text", b"\xff\xfe\x00", unreadable), ("UTF-16", "names: [a]".encode("utf-16"), None),
        ("escapes", "names: [\"\\e[31mred\", \"<script>\"]\n", None), ("an escape", "names: [\x1b]\n", unreadable),
        ("nothing", "", "has no names"), ("null", "names: null\n", "not a list"),
        ("empty names", "names: {}\n", "not a"),
        ("other numbers", "names: {1: a, 2: b}\n", "class numbers"), ("mixed keys", "names: {0: a, b: c}\n", "numbers"),
        ("images nowhere", "names: [a]\ntrain: \"no\\0where\"\n", None),
        ("images with an escape", "names: [a]\ntrain: \"\\e[31m\"\n", None),
        ("two documents", "names: [a]\n---\nnames: [b]\n", unreadable),
    ):  # fmt: skip
        yield Case(f"yaml: {what}", content.encode() if isinstance(content, str) else content, words)


def labels() -> Iterator[Case]:
    """Label files of one image with 80 classes."""
    row, share = "a class and four numbers", "shares of the image"
    for what, content, words in (
        ("nothing", "", None), ("one object", "0 0.5 0.5 0.1 0.1\n", None), ("CRLF", "0 0.5 0.5 0.1 0.1\r\n", None),
        ("text", "cat 0.5 0.5 0.1 0.1", row), ("NaN", "0 nan 0.5 0.1 0.1", row),
        ("infinity", "0 1e999 0.5 0.1 0.1", row),
        ("10^300", "0 1e300 0.5 0.1 0.1", share), ("-10^300", "0 0.5 0.5 0.1 -1e300", share),
        ("pixels", "0 320 240 64 64", share), ("class 10^300", "1e300 0.5 0.5 0.1 0.1", "is not one of"),
        ("class -1", "-1 0.5 0.5 0.1 0.1", "is not one of"), ("class 80", "80 0.5 0.5 0.1 0.1", "is not one of"),
        ("class 0.5", "0.5 0.5 0.5 0.1 0.1", "is not one of"), ("an escape", "\x1b[31m 0.5 0.5 0.1 0.1", row),
        ("a row of a megabyte", "0 " + "0.5 " * 250_001, row),
        ("a polygon of a megabyte", "0" + " 0.5" * 250_000, None),
        ("100000 rows", "0 0.5 0.5 0.1 0.1\n" * 100_000, None),
        ("100001 rows", "0 0.5 0.5 0.1 0.1\n" * 100_001, "more than 100000 labels"),
        ("9 MB", "0 0.5 0.5 0.1 0.1\n" * 500_000, "not a readable label file: it is longer than 8 MiB"),
        ("no text", b"\xff\xfe\x00", "not a readable label"),
        ("4300 digits", "9" * 5000 + " 0.5 0.5 0.1 0.1", row),
        ("zeros", bytes(1000), "not a readable label file: it is not text"),
    ):  # fmt: skip
        yield Case(f"labels: {what}", content.encode() if isinstance(content, str) else content, words)
