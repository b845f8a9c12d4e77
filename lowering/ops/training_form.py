"""An operator that becomes another one where a gradient is needed.

`torch.library.register_autograd` can keep an operator's inputs and outputs for its gradient, nothing in between. An
operator whose gradient wants more has a second form that returns it, and the first is only a name for it under
autograd: graphs for inference hold the first, joint graphs for training the second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dscompile.lowering.inductor import below_autograd
from dscompile.lowering.ops.library import NAMESPACE

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # Registrations live as long as this object.


def define_training_form(name: str, form: str) -> None:
    """Under autograd, `dsinfra::name` calls `dsinfra::form`, of the same arguments, and returns its first result."""
    namespace = getattr(torch.ops, NAMESPACE)
    op, training_op = getattr(namespace, name).default, getattr(namespace, form).default

    def autograd_kernel(*args: Any) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return training_op(*args)[0]
        with below_autograd():
            return op(*args)

    _LIBRARY.impl(name, autograd_kernel, "Autograd")
