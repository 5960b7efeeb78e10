"""Which layer a parameter belongs to, counted from the pixels, or words, to the classes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pipeline.models.errors import ModelError
from pipeline.models.layers import encoder_layers


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """Number of the layer of every parameter, by its name, as BEiT counts them (Bao et al., 2021, arXiv 2106.08254).

    0 is what comes before the first encoder layer: patch or word embedding, class token, position embedding. 1 to L are
    the encoder layers of all levels in turn; what lies between two (NesT's aggregation, HVT's pool, the new position
    embedding of either) belongs to the one behind it, whose input it makes, as the patch embedding makes that of the
    first. L + 1 is what follows the last layer: final norm and heads.

    Args:
        model: gives its parts by `in_order()`.

    Raises:
        ModelError: `in_order()` leaves out a parameter or a layer, or has a parameter twice.
    """
    layers = {id(layer) for layer in encoder_layers(model)}
    numbers: dict[int, int] = {}

    def belong(parameters: Iterable[nn.Parameter], number: int) -> None:
        for parameter in parameters:
            if id(parameter) in numbers:
                raise ModelError(f"in_order() of {type(model).__name__} has a parameter of layer {number} twice")
            numbers[id(parameter)] = number

    layer, between = 0, list[nn.Parameter]()
    for part in model.in_order():  # type: ignore[operator]
        own = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        if id(part) not in layers:
            between += own
            continue
        layer += 1
        belong(between, layer if layer > 1 else 0)
        belong(own, layer)
        between = []
    belong(between, layer + 1)
    left_out = [name for name, parameter in model.named_parameters() if id(parameter) not in numbers]
    if left_out or layer != len(layers):
        what = left_out[0] if left_out else "an encoder layer"
        raise ModelError(f"in_order() of {type(model).__name__} leaves out {what}")
    return {name: numbers[id(parameter)] for name, parameter in model.named_parameters()}
