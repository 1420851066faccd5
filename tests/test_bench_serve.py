"""The arithmetic of the serving benchmark."""

import pytest

from topt_vllm.benchmarks.client import Stream, summarise


def test_only_the_time_in_which_all_requests_decode_counts():
    early = Stream(0.0, [1.0, 2.0, 3.0, 3.5, 4.0], [1, 2, 3, 4, 5])
    late = Stream(0.0, [3.0, 3.5, 4.0, 9.0], [1, 2, 4, 5])
    result = summarise([early, late])
    # From 3.0 to 4.0: two tokens of the first, three of the second (two of them in one chunk).
    assert (result.tokens, result.seconds, result.decode_tokens_per_second) == (5, 1.0, 5.0)
    assert result.itl_ms_median == 500.0
    assert result.ttft_ms_median == 2000.0


def test_answers_that_never_overlap_are_an_error():
    with pytest.raises(ValueError, match="--max-tokens"):
        summarise([Stream(0.0, [1.0, 2.0], [1, 2]), Stream(0.0, [3.0, 4.0], [1, 2])])
