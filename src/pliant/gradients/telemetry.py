"""What selective training did, kept as tensors on their device until somebody asks."""

from __future__ import annotations

from torch import Tensor


class Telemetry:
    """The last step, and the sums of all."""

    def __init__(self) -> None:
        self._valid: Tensor | None = None
        self._losses_N: Tensor | None = None

    def trained(self, valid_BT: Tensor, losses_N: Tensor) -> None:
        self._valid, self._losses_N = valid_BT.sum(), losses_N.detach()

    def metrics(self) -> dict[str, float]:
        if self._valid is None or self._losses_N is None:
            return {}
        tokens, valid = len(self._losses_N), int(self._valid)
        return {
            "tokens_selected": float(tokens),
            "tokens_total": float(valid),
            "ratio": tokens / max(1, valid),
            "loss_selected": float(self._losses_N.mean()),
        }
