"""Exports a trained network: formats.py writes the files, card.py their model cards.

onnx_graph.py converts a JAX function to ONNX.
"""
