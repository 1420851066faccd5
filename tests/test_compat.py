"""What stands in for parts that older vLLM versions lack."""

from enum import Enum

from topt_vllm.backend.compat import _add_member


def test_an_enum_takes_another_member_as_if_it_had_been_written_there():
    class Backends(Enum):
        ONE = "package.One"

    added = _add_member(Backends, "TWO", "package.Two")
    assert isinstance(added, Backends)
    assert list(Backends) == [Backends.ONE, added]
    assert Backends["TWO"] is Backends("package.Two") is Backends.TWO is added
    assert (added.name, added.value) == ("TWO", "package.Two")
    assert {added: 1}[Backends.TWO] == 1
