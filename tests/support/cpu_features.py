"""What vLLM can do on this CPU, for tests of it."""

import pytest
import torch

HAS_FP8_CACHES = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
NO_FP8_CACHES = "vLLM has fp8 caches on CPUs with AVX-512 or AMX alone"

needs_fp8_caches = pytest.mark.skipif(not HAS_FP8_CACHES, reason=NO_FP8_CACHES)
