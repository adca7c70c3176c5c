"""Mixture-of-experts stacks taken apart into one linear layer per expert, so that each is a layer like any other.

transformers keeps the experts of a block as 3-D parameters (`gate_up_proj` (E, 2·intermediate, hidden) and
`down_proj` (E, hidden, intermediate)). Apart, expert e's matrices are named `….experts.<e>.gate_up_proj` and
`….experts.<e>.down_proj`; the routing stays the block's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from allocator.errors import BitrankError


class UnsupportedExpertsError(BitrankError):
    """The stack is laid out in a way that is not taken apart here (transposed, interleaved, biased, ungated)."""


class Expert(nn.Module):
    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        super().__init__()
        self.gate_up_proj = _linear(gate_up_proj)
        self.down_proj = _linear(down_proj)


class ExpertList(nn.ModuleList):
    """Stands in for a fused experts module; same call, one pair of linear layers per expert.

    `gate_up_proj` is an empty tensor that carries the name of the stack, so that loading a checkpoint of experts
    apart without the plug-in fails on its shape instead of leaving the stack at random.
    """

    act_fn: Callable[[Tensor], Tensor]

    def __init__(self, stack: nn.Module) -> None:
        gate_ups, downs = stack.get_parameter("gate_up_proj"), stack.get_parameter("down_proj")
        super().__init__(Expert(gate_up, down) for gate_up, down in zip(gate_ups, downs, strict=True))
        assert callable(stack.act_fn)
        self.act_fn = stack.act_fn
        self.gate_up_proj = nn.Parameter(gate_ups.new_empty(0), requires_grad=False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, k) -> (tokens, hidden)."""
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= len(self):
                continue
            expert = self[index]
            token, slot = torch.where(top_k_index == index)
            gate, up = expert.gate_up_proj(hidden_states[token]).chunk(2, dim=-1)
            routed = expert.down_proj(self.act_fn(gate) * up) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, routed.to(output.dtype))
        return output


def unstack_experts(model: nn.Module) -> None:
    """Replace every expert stack of `model` in place; raises `UnsupportedExpertsError` naming one it cannot."""
    for name, module in list(model.named_modules()):
        if getattr(module, "gate_up_proj", None) is None or not isinstance(module.gate_up_proj, nn.Parameter):
            continue
        if module.gate_up_proj.dim() != 3:
            continue
        plain = (
            getattr(module, "is_concatenated", False)
            and getattr(module, "has_gate", False)
            and not getattr(module, "is_transposed", True)
            and not getattr(module, "has_bias", True)
            and not getattr(module, "has_post_expert_norm", False)
        )
        if not plain:
            raise UnsupportedExpertsError(
                f"{name} ({type(module).__name__}) stacks its experts in a layout bitrank cannot take apart;"
                " choose a model whose experts are plain gated linear layers"
            )
        model.set_submodule(name, ExpertList(module))


def _linear(weight_OI: Tensor) -> nn.Linear:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.detach().clone(), requires_grad=False)
    return linear
