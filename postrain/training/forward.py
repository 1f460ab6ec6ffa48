"""What objectives compute their losses from: a model's forward pass over a packed batch, as functions of parameters.

An objective never sees a model. It takes one of the methods of ``Forward``, or any function of the same form.
Legend: B rows, T positions, S documents of a row at most, K outputs of a head.
"""

import dataclasses
from collections.abc import Sequence

import jax

from postrain.models.config import ModelConfig
from postrain.models.heads import HeadConfig, apply_heads
from postrain.models.transformer import compute_hidden_and_terms, unembedding
from postrain.objectives.logprobs import TokenLogprobs, compute_token_logprobs, compute_weighted_nll
from postrain.types import Batch, RowTerms


@dataclasses.dataclass(frozen=True)
class Forward:
    """A model as functions of ``(params, batch)``; ``params`` is the whole tree, adapters beside their kernels.

    Each also returns the ``RowTerms`` of the routers, None without experts.

    Attributes:
      model_config: of the model.
      chunk: tokens projected onto the vocabulary at a time.
    """

    model_config: ModelConfig
    chunk: int

    def nll(self, params: dict, batch: Batch) -> tuple[jax.Array, jax.Array, RowTerms | None]:
        """Sums weighted by ``batch.loss_mask``: -log p(target), and the targets that are the likeliest token.

        Both float32 []; only the first has a gradient, at three quarters of the cost of ``logprobs``.
        """
        hidden, terms = self._compute_hidden(params, batch)
        nll_sum, correct_sum = compute_weighted_nll(
            hidden, unembedding(params, self.model_config), batch.targets, batch.loss_mask, **self._projection
        )
        return nll_sum, correct_sum, terms

    def logprobs(self, params: dict, batch: Batch) -> tuple[TokenLogprobs, RowTerms | None]:
        """Of the target at every position where ``batch.loss_mask`` is not 0, float32 [B, T] each; 0 elsewhere."""
        hidden, terms = self._compute_hidden(params, batch)
        table = unembedding(params, self.model_config)
        found = compute_token_logprobs(hidden, table, batch.targets, batch.loss_mask, **self._projection)
        return found, terms

    def heads(
        self, params: dict, batch: Batch, heads: Sequence[HeadConfig]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array], RowTerms | None]:
        """Outputs of ``heads`` by name, float32 [B, T, K] or [B, S, K], and where they are: bool [B, T] or [B, S].

        S is that of the targets of the heads at position "last", ``batch.fields[name]`` [B, S].
        """
        hidden, terms = self._compute_hidden(params, batch)
        documents = max((batch.fields[head.name].shape[1] for head in heads if head.position == "last"), default=1)
        outputs, present = apply_heads(params, heads, hidden, batch.segment_ids, documents)
        return outputs, present, terms

    def _compute_hidden(self, params: dict, batch: Batch) -> tuple[jax.Array, RowTerms | None]:
        return compute_hidden_and_terms(params, self.model_config, batch.tokens, batch.segment_ids, batch.positions)

    @property
    def _projection(self) -> dict:
        config = self.model_config
        return {"vocab_size": config.vocab_size, "chunk": self.chunk, "softcap": config.logits_softcap}
