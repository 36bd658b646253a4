"""One selection rule as an ONNX graph of its own: what decides, without the encoder around it.

Built through the same translations and passes as the vision graph, for comparisons and measurements. Nothing of a
bundle comes from here.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, nn

from holov_export.export.onnx_from_graph import quiet_exporter
from holov_export.export.passes import clean
from holov_export.export.translations import translation_table
from holov_export.policies import FeatureSource, SelectionPolicy
from holov_export.selection.registry import rule_from_policy


class RuleAlone(nn.Module):
    """A rule with the inputs that the vision graph would give it.

    (saliency [B, N], features [B, N, D], quota [B], budget [1]) -> (positions [B, N], counts [B][, merged [B, N]]).
    """

    def __init__(self, policy: SelectionPolicy, grid: tuple[int, int]) -> None:
        super().__init__()
        self.reads = policy.features is not FeatureSource.NONE
        self.merges = policy.merges
        self.selection = rule_from_policy(policy, grid)

    def forward(self, saliency: Tensor, features: Tensor, quota: Tensor, budget: Tensor) -> tuple[Tensor, ...]:
        _check_budget(budget, saliency.shape[-1])
        chosen = self.selection(saliency, features if self.reads else None, quota, budget)
        found = (chosen.positions, chosen.counts)
        return (*found, chosen.merged) if self.merges else found


class StepsAlone(nn.Module):
    """The steps of a greedy rule: (saliency, features, quota, budget) -> the state after them, see `selection.greedy`.

    The quota is an input for the sake of one signature; steps do not read it.
    """

    def __init__(self, policy: SelectionPolicy, grid: tuple[int, int]) -> None:
        super().__init__()
        self.selection = rule_from_policy(policy, grid)

    def forward(self, saliency: Tensor, features: Tensor, quota: Tensor, budget: Tensor) -> Tensor:
        _check_budget(budget, saliency.shape[-1])
        state: Tensor = self.selection.steps(saliency, features, budget)  # type: ignore[operator]
        return state


def onnx_from_rule(module: RuleAlone | StepsAlone, tokens: int, width: int, opset: int) -> ir.Model:
    """The graph of a rule for N tokens of D features; batch and budget are dynamic.

    Inputs are `saliency`, `features`, `quota`, `budget`, whether the rule reads them or not.
    """
    arguments = (torch.rand(2, tokens), torch.rand(2, tokens, width), torch.tensor([1, 1]), torch.tensor([1]))
    batch = torch.export.Dim.DYNAMIC
    names = ["saliency", "features", "quota", "budget"]
    merges = isinstance(module, RuleAlone) and module.merges
    outputs = ["state"] if isinstance(module, StepsAlone) else ["positions", "counts", *(["merged"] if merges else [])]
    with quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=outputs,
            dynamic_shapes={"saliency": {0: batch}, "features": {0: batch}, "quota": {0: batch}, "budget": None},
            custom_translation_table=translation_table(opset),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    shape = program.model.graph.inputs[0].shape
    assert shape is not None
    clean(program.model, {str(getattr(shape[0], "value", shape[0])): "batch"})
    return program.model


def _check_budget(budget: Tensor, tokens: int) -> None:
    size = budget.item()
    torch._check(size >= 1)
    torch._check(size <= tokens)
