"""posttrain: SFT, preference optimisation and RL as one gated, resumable pipeline."""

__version__ = "0.1.0"
