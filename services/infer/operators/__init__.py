"""Work around a model that needs no model: decoding, resizing, tokenizing, boxes, text. One operation per file.

`operation` says what one is, `parameters` reads those of a configuration, `table` has all of them by name. The runtime
`kernels` (`runtimes/kernels_runtime.py`) serves them as models, on their own or as steps of an ensemble.
"""
