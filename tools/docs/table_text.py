"""Tables as Markdown."""

import re


def markdown(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return unbroken("\n".join([*lines, *("| " + " | ".join(r) + " |" for r in rows)]))


def unbroken(text):
    """No line ends between a figure and its unit."""
    return re.sub(r"(\d) (%|ms|MiB|/)", "\\1\N{NO-BREAK SPACE}\\2", text)
