"""The command ``topt-vllm``."""
