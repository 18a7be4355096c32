"""Unpermute: ``y[t] = sum over a of weights[t, a] * y_slots[slot_of_choice[t, a]]``."""

import torch
from torch import Tensor

from octomoe.core.routing import Routing


def unpermute(y: Tensor, routing: Routing, weights: Tensor | None = None) -> Tensor:
    """Combine slots ``[S, D]`` into tokens ``[T, D]``; see `octomoe.unpermute`."""
    combined_TD = torch.zeros(
        (routing.num_tokens, y.shape[1]), dtype=torch.float32, device=y.device
    )
    if y.shape[0] == 0:
        return combined_TD.to(y.dtype)
    # The order of the sum is fixed: choice 0, 1, ... of each token.
    for a in range(routing.num_choices):
        slot_T = routing.slot_of_choice_TA[:, a].long()
        rows_TD = y[slot_T.clamp_min(0)].to(torch.float32)
        if weights is not None:
            rows_TD = rows_TD * weights[:, a, None].to(torch.float32)
        combined_TD += torch.where((slot_T < 0).unsqueeze(1), 0.0, rows_TD)
    return combined_TD.to(y.dtype)
