"""SIMS on Ray: self-improving diffusion models with synthetic data (arXiv 2408.16333), distributed end to end."""

__version__ = "0.1.0"
