"""What `cv_jax.tools.export` writes: formats.py the files, card.py what they say of the network.

onnx_graph.py makes ONNX of a JAX function.
"""
