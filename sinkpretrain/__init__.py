"""Pre-training of Pythia-style language models with a dedicated attention sink."""

__version__ = "0.1.0"
