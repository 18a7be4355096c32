"""Gradients of unpermute: ``dy_slots[s] = weight * dy[token]``, ``dweights = <y[slot], dy>``."""

from torch import Tensor
from torch.nn.functional import pad

from octomoe.core.routing import Routing, weights_of_slots
from octomoe.reference.permute import permute


def unpermute_bwd(
    dy: Tensor, y: Tensor, routing: Routing, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """``[S, D]`` and ``[T, A]`` of ``dy [T, D]`` and ``y [S, D]``; see `octomoe.unpermute_bwd`."""
    permuted = permute(dy, routing)
    assert isinstance(permuted, Tensor)
    dy_SD = permuted.float()
    weight_S = weights_of_slots(weights.float(), routing)
    product_S = (y.float() * dy_SD).sum(dim=1)
    # An element more, which -1 finds: choices without a slot get zero.
    dweights_TA = pad(product_S, (0, 1))[routing.slot_of_choice_TA.long()]
    return (dy_SD * weight_S.unsqueeze(1)).to(dy.dtype), dweights_TA
