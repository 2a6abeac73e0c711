"""The pass over a model's blocks, with one block on the device at a time."""
