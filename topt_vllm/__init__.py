"""Top-Theta sparse attention (arXiv 2502.08363) for vLLM."""

from topt_vllm.version import __version__

__all__ = ["__version__"]
