"""Reports of fine-tuning runs, side by side."""

from __future__ import annotations

from typing import Any


def report_table(reports: list[dict[str, Any]]) -> str:
    """Reports of several methods as one aligned text table: accuracy of the best (saved) and of the last evaluation."""
    rows = [["method", "best accuracy", "last", "trainable", "of total", "file", "seconds", "merge error"]]
    for r in reports:
        share = r["trainable_parameters"] / r["total_parameters"]
        error = "-" if r["merge_error"] is None else f"{r['merge_error']:.1e}"
        last = r.get("last", {}).get("accuracy")
        rows.append(
            [
                r["method"], f"{100 * r['accuracy']:.1f} %", "-" if last is None else f"{100 * last:.1f} %",
                f"{r['trainable_parameters']:,}", f"{100 * share:.1f} %", f"{r['file_size'] / 1024:,.0f} kB",
                f"{r['seconds']:.1f}", error,
            ]
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
