"""Runs a request of ``topt-vllm verify`` on vLLM's V2 model runner on a CPU; test_verify.py starts it as a process.

That runner samples with Triton kernels, which run in Triton's interpreter here. vLLM (0.31 to 0.33) asks whether
Triton has a CPU backend, and the interpreter needs none.
"""

import os
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

from triton.backends import backends

from topt_vllm.verify.engine_main import main

if __name__ == "__main__":
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    main()
