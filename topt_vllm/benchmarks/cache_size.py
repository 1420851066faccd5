"""How large an engine's KV cache has to be, said to both backends alike, whatever the platform would choose."""

from topt_vllm.table.identity import ModelIdentity

# K and V, then what is rounded up to blocks, V sums, and a screen of K: less than half as much again.
_SLACK = 1.5
_LEAST = 256 << 20


def cache_bytes(identity: ModelIdentity, tokens: int, dtype: str) -> int:
    """Bytes in which so many tokens of all sequences fit; an element has 16 bits unless ``dtype`` is float32."""
    element = 4 if dtype in ("float32", "float") else 2
    row = 2 * element * identity.num_layers * identity.num_kv_heads * identity.head_dim
    return max(_LEAST, int(_SLACK * tokens * row))
