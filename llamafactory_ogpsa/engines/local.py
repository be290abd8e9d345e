"""Gradients of one process: `param.grad` of every trainable parameter."""

import torch


class LocalEngine:
    """The trainable parameters of a model in one process and their accumulated gradients.

    Attributes:
        names: the names of the trainable parameters; tied parameters appear once.
        parameters: the parameters, in the same order.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Look up the trainable parameters of `model`.

        Raises:
            ValueError: the model has no trainable parameter.
        """
        trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        if not trainable:
            raise ValueError("the model has no trainable parameter")
        self.names = [name for name, _ in trainable]
        self.parameters = [param for _, param in trainable]

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.parameters[0].device

    def gradients(self) -> list[torch.Tensor | None]:
        """Return the accumulated gradients, None where a parameter has none; writing to them changes the step."""
        return [param.grad for param in self.parameters]

    def clear(self) -> None:
        """Drop all gradients, as `zero_grad(set_to_none=True)` does."""
        for param in self.parameters:
            param.grad = None
