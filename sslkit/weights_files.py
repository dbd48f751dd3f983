"""Weights from a safetensors file, or from timm, to begin a run with."""
