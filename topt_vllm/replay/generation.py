"""Text that a model writes behind a dense prompt, a token a step, under rules or densely."""

from collections.abc import Callable, Iterable

import torch

from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.capture import Asked, selected
from topt_vllm.replay.dense_pass import DensePass, attended


def generate(
    prompt: DensePass,
    token: int,
    count: int,
    choose: Callable[[int, torch.Tensor], int],
    attention: RuleAttention | None = None,
    steps: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[int]:
    """Generates tokens; a step reads K and V of what came before, and runs the model over one token.

    Args:
        prompt: The dense pass over all of the prompt but its last token; of a model without states.
        token: That one.
        count: Tokens to generate.
        choose: From a step, 0 for the first, and log probabilities, float32 [vocabulary], to the next token.
        attention: Of the generated rows; None for dense attention. Its rules need no rows before (``in_order``).
        steps: Wraps the numbers of the steps, to show progress.
    """
    cache = {layer: [_with_room(kept, count) for kept in tensors] for layer, tensors in prompt.cache.items()}
    newest = prompt.length

    def function(asked: Asked) -> torch.Tensor:
        window = prompt.subject.window_of(asked.layer)
        seen = slice(max(0, newest - window + 1) if window else 0, newest + 1)
        for kept, new in zip(cache[asked.layer], (asked.key, asked.value), strict=True):
            kept[:, newest] = new[0, :, 0]
        key, value = (kept[:, seen] for kept in cache[asked.layer])
        call = asked.call(key=key, value=value, first=newest - seen.start, window=window)
        return attended(attention, asked, call)[None]

    tokens = [token]
    with torch.inference_mode(), selected(prompt.model.model, function):
        for step in steps(range(count)):
            newest = prompt.length + step
            inputs = torch.tensor([tokens[-1:]], device=prompt.model.device)
            tokens.append(choose(step, prompt.model.next_token(inputs, newest)))
    return tokens[1:]


def _with_room(kept: torch.Tensor, count: int) -> torch.Tensor:
    """[Hkv, n, D] with ``count`` rows more."""
    return torch.cat([kept, kept.new_empty(len(kept), count, kept.shape[2])], dim=1)
