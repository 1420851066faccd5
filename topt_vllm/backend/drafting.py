"""Drafts of the served model itself: sparse rows propose tokens, dense rows verify them.

vLLM loads the class that ``--speculative-config`` names and asks it for tokens after each step (``custom_class`` of
its V1 model runner, 0.31 to 0.33). It reserves no slots for such a drafter and hands it no batch: this one drafts
into what is left of each request's last block, and takes block tables from the runner that TOPTHETA's worker names.
K and V of a drafted token, which come from sparse rows, are written again by the step that verifies it, and lie
behind every context until then; so weights and cache are there once.
"""

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from topt_vllm.backend import compat, requests
from topt_vllm.config import ConfigError


class SparseDrafter:
    """Decodes a few tokens greedily under the table's thresholds; vLLM's interface of a custom proposer.

    Args:
        vllm_config: Of the engine.

    Raises:
        ConfigError: Another attention backend runs, which would draft what it verifies.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        if not compat.is_chosen(vllm_config):
            raise ConfigError(
                f"--speculative-config names {compat.DRAFTER}, which drafts with sparse attention, but another "
                "attention backend runs. Add --attention-backend TOPTHETA."
            )
        self._vllm_config = vllm_config
        self._tokens = vllm_config.speculative_config.num_speculative_tokens
        self._max_model_len = vllm_config.model_config.max_model_len
        self._model: Any = None
        self._runner: Any = None

    def load_model(self, model: Any) -> None:
        """Takes the served model, which is the drafter too.

        Raises:
            RuntimeError: Another worker than TOPTHETA's runs it.
        """
        self._model = model
        self._runner = requests.runner("drafting")

    @torch.inference_mode()
    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens: np.ndarray,
        token_ids: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Tokens that may follow, by request of the step that has just run.

        Args:
            sampled_token_ids: What the step gave each request; nothing within a prompt.
            num_tokens: int [S], tokens of each request, those included.
            token_ids: int [S, n], the tokens.
            slot_mappings: Of that step; not needed.
        """
        tables = self._runner.input_batch.block_table.block_tables
        count = len(sampled_token_ids)
        # The first row is that of the last token, which has no K and V yet.
        first = torch.from_numpy(num_tokens[:count].astype(np.int64)) - 1
        slots = np.min([table.num_blocks_per_row[:count] * table.block_size for table in tables], axis=0)
        room = torch.minimum(torch.from_numpy(slots) - first, self._max_model_len - 1 - first)
        room.clamp_(max=self._tokens)
        drafts: list[list[int]] = [[] for _ in range(count)]
        for index in range(self._tokens):
            rows = [row for row in range(count) if sampled_token_ids[row] and room[row] > index]
            if not rows:
                break
            last = [drafts[row][-1] if index else int(token_ids[row, first[row]]) for row in rows]
            for row, token in zip(rows, self._next(rows, last, first[rows] + index, index), strict=True):
                drafts[row].append(token)
        return drafts

    def _next(self, rows: list[int], tokens: list[int], positions: torch.Tensor, index: int) -> list[int]:
        """The likeliest next tokens of some rows of the runner's batch; positions int64 [rows]."""
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        tables = self._runner.input_batch.block_table.block_tables
        for table, groups in zip(tables, self._runner.attn_groups, strict=True):
            common = _batch(table.get_cpu_tensor()[rows], table.block_size, positions)
            for group in groups:
                built = compat.drafting_metadata(group, common, index)
                metadata |= dict.fromkeys(group.layer_names, built)
                slots |= dict.fromkeys(group.layer_names, common.slot_mapping)
        with set_forward_context(metadata, self._vllm_config, num_tokens=len(rows), slot_mapping=slots):
            hidden = self._model(
                input_ids=torch.tensor(tokens, dtype=torch.int32),
                positions=positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        found: list[int] = self._model.compute_logits(hidden).argmax(dim=-1).tolist()
        return found


def _batch(blocks: torch.Tensor, block_size: int, positions: torch.Tensor) -> CommonAttentionMetadata:
    """One row of each request.

    Args:
        blocks: int32 [S, blocks], block tables.
        block_size: Slots of a block.
        positions: int64 [S], of the rows.
    """
    starts = torch.arange(len(positions) + 1, dtype=torch.int32)
    block = blocks.gather(1, (positions // block_size)[:, None])[:, 0].long()
    lengths = (positions + 1).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(positions),
        num_actual_tokens=len(positions),
        max_query_len=1,
        max_seq_len=int(lengths.max()),
        block_table_tensor=blocks,
        slot_mapping=block * block_size + positions % block_size,
    )
