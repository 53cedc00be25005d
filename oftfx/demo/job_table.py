"""The figures of the demo as a table."""

from __future__ import annotations

from typing import Any

import torch

COLUMNS = ("model", "runs in", "weights", "MiB", "perplexity", "gain kept %", "time 1x128, ratio")


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the final table.

    "Gain kept" is the share of the adapter's gain in log-likelihood, "time" the median of a forward as a ratio to the
    float32 base's.
    """
    rows, times = results["rows"], results["time_ratios"]
    base = torch.tensor(rows["NF4 base"]["perplexity"]).log()
    best = torch.tensor(rows["NF4 + adapter"]["perplexity"]).log()
    result: list[tuple[str, ...]] = []
    for name, row in rows.items():
        kept = float((base - torch.tensor(row["perplexity"]).log()) / (base - best))
        shown = "" if name in ("float32 base", "NF4 base") else f"{100 * kept:.1f}"
        kind = "float32" if "float" in name else "NF4"
        cells = (
            name,
            row["runs_in"],
            kind,
            f"{row['mib']:.0f}",
            f"{row['perplexity']:.2f}",
            shown,
            f"{times[name]:.2f}",
        )
        result.append(cells)
    return result
