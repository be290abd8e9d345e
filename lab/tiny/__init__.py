"""The small language: data, a model of 0.7M parameters, scores, and a demonstration that takes minutes."""
