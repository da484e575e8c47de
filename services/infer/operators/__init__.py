"""Pre- and postprocessing operators: decoding, resizing, tokenizing, boxes, text. One operation per file.

`operation` has the protocol of an operation, `parameters` reads the parameters of a configuration, `table` lists all
operations by name. The runtime `kernels` (`kernels_runtime`) serves operations as models, alone or as ensemble steps.
"""
