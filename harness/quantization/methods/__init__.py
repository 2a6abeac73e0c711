"""Methods, one file per paper, found by name. `protocols` is their contract; `checks`, `evidence`, `folding` are shared tools."""
