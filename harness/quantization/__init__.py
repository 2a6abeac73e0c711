"""Everything that turns a model into a quantized one and runs it: numerics, methods, models, formats, inference, pipeline;
`calibration` draws the data, `export` writes folders for other libraries, `diagnosis` finds damaged linears.
"""
