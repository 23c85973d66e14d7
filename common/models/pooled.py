"""A sequence classifier on the mean of an encoder's last hidden states.

Sentence encoders such as all-MiniLM-L6-v2 are trained with mean pooling (Reimers and Gurevych 1908.10084, section 3);
the pooling layer that transformers' BERT classifier puts before the head is no part of that training, and in their
checkpoints it is a random matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledClassifier(nn.Module):
    """An encoder, the mean of its last hidden states over the tokens that exist, and one linear layer.

    PEFT wraps it like a transformers classifier. The head is float32, and zero until an adapter is loaded or it is
    trained.

    Args:
        encoder: a transformers encoder whose output has ``last_hidden_state`` [B, T, d]; its own pooling layer, if it
            has one, is not used.
        num_labels: number of labels L.

    Attributes:
        encoder: as given.
        classifier: the head, d to L.
        config: the encoder's config.
    """

    encoder: Any
    config: Any

    def __init__(self, encoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        width: Any = self.config.hidden_size
        self.classifier = nn.Linear(width, num_labels)
        for parameter in self.classifier.parameters():
            nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        found: torch.device = self.encoder.device
        return found

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the encoder recomputes activations; PEFT asks."""
        return bool(self.encoder.is_activation_checkpointing)

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token embeddings."""
        found: nn.Module = self.encoder.get_input_embeddings()
        return found

    def enable_input_require_grads(self) -> None:
        """Let the token embeddings' output take gradients, as reentrant checkpointing needs."""
        self.encoder.enable_input_require_grads()

    def activation_checkpointing_enable(self, settings: dict[str, Any]) -> None:
        """Let the encoder recompute its activations in the backward pass."""
        self.encoder.activation_checkpointing_enable(settings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **settings: Any,
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids: [B, T] token ids, or None where ``inputs_embeds`` is given.
            attention_mask: [B, T], not zero where there is a token; all of them if None.
            inputs_embeds: [B, T, d] in place of ``input_ids``.
            labels: [B] classes; with them the output has the mean cross-entropy.
            return_dict: for callers of transformers' interface; the output is an object either way.
            settings: passed on to the encoder, where not None.

        Returns:
            An output with ``logits`` [B, L], float32.
        """
        passed_on = {name: value for name, value in settings.items() if value is not None}
        output = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **passed_on,
        )
        logits = self.classifier(mean_over_tokens(output.last_hidden_state, attention_mask))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


def mean_over_tokens(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean of ``hidden`` [B, T, d] over the positions where ``attention_mask`` [B, T] is not zero: [B, d], float32.

    A row without any token gives zeros.
    """
    states = hidden.float()
    if attention_mask is None:
        return states.mean(dim=1)
    kept = (attention_mask != 0).unsqueeze(-1)
    total = states.masked_fill(~kept, 0.0).sum(dim=1)
    mean: Tensor = total / kept.sum(dim=1).clamp(min=1)
    return mean
