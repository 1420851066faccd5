"""How much loss an error in a layer's output makes, measured: runs with only that layer sparse.

Over four orders of magnitude of the error, the divergence of the next token's distribution stays within a factor of
four of proportional to it (ten layers of SmolLM2, most within two to three). So each layer needs one factor, taken
where the layer is likely to end up: at the budget that loses this layer's share of one per cent, or at a smaller
one where rounding would hide that.

The divergence from dense attention is what the text's own loss would rise by on average if the model had written
the text, and on few rows it is far steadier than that loss.
"""

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration.head_errors import HeadErrors
from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.model import Subject
from topt_vllm.replay.replay import Replay
from topt_vllm.replay.top_theta import TopTheta

SENSITIVITY_ROWS = 256
# Of each layer: with every row kept, at the first k, and at the likely one.
SENSITIVITY_RUNS = 3
_FIRST_K = 16
_LOSS = 0.01
# Divergences that tell something are this many times what rounding makes.
_CLEAR = 4.0


def sensitivity(
    replay: Replay,
    subject: Subject,
    layer: int,
    ks: tuple[int, ...],
    thetas: list[Thetas],
    errors: HeadErrors,
) -> float:
    """Divergence over error energy of one layer (nats per unit of ``HeadErrors.layer_energy``).

    Args:
        replay: Of calibration text.
        subject: The model.
        layer: Index in the model.
        ks: Budgets, keys per query head, ascending.
        thetas: The layer's thresholds at each.
        errors: Its errors at each.
    """
    # With every row kept, too, the layer is computed another way than in the dense pass: that is rounding. In
    # bfloat16 it makes more than this layer's share of the loss, and a difference of the two may be nothing.
    floor = max(_divergence(replay, subject, layer, None), 0.0)
    energies = errors.layer_energy.tolist()

    def factor(index: int) -> float:
        if energies[index] <= 0:
            return 0.0
        excess = _divergence(replay, subject, layer, thetas[index]) - floor
        return max(excess, floor / _CLEAR) / energies[index]

    first = min(range(len(ks)), key=lambda index: abs(ks[index] - _FIRST_K))
    found = factor(first)
    share = max(_LOSS / len(subject.full_layers), _CLEAR * floor)
    likely = min(range(len(ks)), key=lambda index: abs(found * energies[index] - share))
    return found if likely == first else factor(likely)


def _divergence(replay: Replay, subject: Subject, layer: int, thetas: Thetas | None) -> float:
    """Of one sparse layer; None keeps every key."""
    rule = TopTheta({} if thetas is None else {layer: thetas})
    return replay.compare(RuleAttention(subject, {layer: rule}, replay.rows + 1)).losses().kl
