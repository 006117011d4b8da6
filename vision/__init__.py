"""Vision: a room per method or task: `classification`, `gmm`, `medical`, `clicks`. Each room's names stand in its door."""
