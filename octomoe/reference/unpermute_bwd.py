"""Gradients of unpermute: ``dy_slots[s] = weight * dy[token]``, ``dweights = <y[slot], dy>``."""

from torch import Tensor
from torch.nn.functional import pad

from octomoe.core.routing import Routing
from octomoe.reference.permute import permute


def unpermute_bwd(
    dy: Tensor, y: Tensor, routing: Routing, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """``[S, D]`` and ``[T, A]`` of ``dy [T, D]`` and ``y [S, D]``; see `octomoe.unpermute_bwd`."""
    permuted = permute(dy, routing)
    assert isinstance(permuted, Tensor)
    dy_SD = permuted.float()
    # An element more, which -1 finds: slots of no token, and choices without a slot, get zero.
    weight_S = pad(weights.float().reshape(-1), (0, 1))[routing.choice_of_slot_S.long()]
    product_S = (y.float() * dy_SD).sum(dim=1)
    dweights_TA = pad(product_S, (0, 1))[routing.slot_of_choice_TA.long()]
    return (dy_SD * weight_S.unsqueeze(1)).to(dy.dtype), dweights_TA
