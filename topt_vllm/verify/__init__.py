"""Checks that an installation serves a model as it should: ``topt-vllm verify``."""
