"""KV connectors that carry what TOPTHETA stores beside K and V."""

from typing import Any

from topt_vllm.config import ConfigError


def refuse_connector(transfer: Any) -> None:
    """Checks an engine's ``--kv-transfer-config``.

    Raises:
        ConfigError: Its connector isn't known to carry V sums.
    """
    raise ConfigError(
        "TOPTHETA doesn't work with a KV connector (--kv-transfer-config): blocks that arrive from elsewhere "
        "carry no V sums, which the compensation needs. Remove the connector or choose another backend."
    )
