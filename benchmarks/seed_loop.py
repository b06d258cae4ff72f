"""The control of the training benchmarks: the training loop that the seeds describe.

[CPX] is a row of the vocabulary (the embedding matrix is resized). Every step runs the full model
over the full prompt and its head over every position, the gradient of the embedding matrix is
masked to the one row, and AdamW holds the full matrix and the linear head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SeedLoop:
    """Takes over its model: resizing the embeddings changes it."""

    def __init__(self, model: Any, labels: int = 1, learning_rate: float = 1e-2) -> None:
        self.model = model.requires_grad_(False)
        self.cpx = model.get_input_embeddings().num_embeddings
        model.resize_token_embeddings(self.cpx + 1, mean_resizing=False)
        self.embeddings = model.get_input_embeddings().weight.requires_grad_(True)
        self.embeddings.register_hook(self._masked)
        self.head = nn.Linear(self.embeddings.shape[1], labels)
        trained = [self.embeddings, *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The head's logits at the last position, where [CPX] is appended."""
        token = torch.full_like(ids[:, :1], self.cpx)
        ids = torch.cat([ids, token], dim=1)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        output = self.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        logits: Tensor = self.head(output.hidden_states[-1][:, -1].float())
        return logits

    def step(self, ids: Tensor, labels: Tensor) -> float:
        loss = nn.functional.binary_cross_entropy_with_logits(self.logits(ids), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def epoch(self, ids: Tensor, labels: Tensor, batch_size: int) -> list[float]:
        pairs = zip(ids.split(batch_size), labels.split(batch_size), strict=True)
        return [self.step(batch, targets) for batch, targets in pairs]

    def _masked(self, gradient: Tensor) -> Tensor:
        mask = torch.zeros_like(gradient)
        mask[self.cpx] = 1.0
        return gradient * mask

    def trainable_bytes(self) -> int:
        """The bytes of the optimizer's parameters, their gradients and Adam's two states."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [
            t
            for state in self.optimizer.state.values()
            for t in state.values()
            if isinstance(t, Tensor) and t.dim()
        ]
        gradients = [p.grad for p in held if p.grad is not None]
        return sum(t.numel() * t.element_size() for t in [*held, *gradients, *states])
