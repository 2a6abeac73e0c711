"""Everything that turns a model into a quantized one and runs it: numerics, methods, models, formats, inference, pipeline."""
