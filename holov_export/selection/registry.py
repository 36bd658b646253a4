"""From a policy to the torch rule that carries it out."""

from __future__ import annotations

from torch import nn

from holov_export.policies import (
    CdprunerUnconditionalPolicy,
    ClsTopkPolicy,
    DartPolicy,
    DivprunePolicy,
    HolovOfficialPolicy,
    HolovPaperPolicy,
    HolovPlusPolicy,
    HolovPolicy,
    NoSelection,
    RandomPolicy,
    ScopePolicy,
    SelectionPolicy,
    UniformPolicy,
    VisionzipPolicy,
)
from holov_export.selection.baselines import ClsTopkRule, RandomRule, UniformRule
from holov_export.selection.cdpruner import CdprunerUnconditionalRule
from holov_export.selection.dart import DartRule
from holov_export.selection.divprune import DivpruneRule
from holov_export.selection.holov import HolovOfficialRule, HolovPaperRule, HolovRule
from holov_export.selection.holov_plus import HolovPlusRule
from holov_export.selection.scope import ScopeRule
from holov_export.selection.visionzip import VisionzipRule


def rule_from_policy(policy: SelectionPolicy, grid: tuple[int, int]) -> nn.Module:
    """The rule (see `rule.Rule`) for a grid of (rows, columns) tokens.

    Raises:
        ValueError: a plain encoder has none (`vision.plain`).
    """
    if isinstance(policy, NoSelection):
        raise ValueError(f"'{policy.method}' is no rule")
    if isinstance(policy, HolovPolicy):
        return HolovRule(policy, grid)
    if isinstance(policy, HolovOfficialPolicy):
        return HolovOfficialRule(policy, grid)
    if isinstance(policy, HolovPaperPolicy):
        return HolovPaperRule(policy, grid)
    if isinstance(policy, HolovPlusPolicy):
        return HolovPlusRule(policy, grid)
    if isinstance(policy, ScopePolicy):
        return ScopeRule(policy)
    if isinstance(policy, DivprunePolicy):
        return DivpruneRule()
    if isinstance(policy, CdprunerUnconditionalPolicy):
        return CdprunerUnconditionalRule()
    if isinstance(policy, DartPolicy):
        return DartRule(policy)
    if isinstance(policy, VisionzipPolicy):
        return VisionzipRule(policy)
    if isinstance(policy, ClsTopkPolicy):
        return ClsTopkRule()
    if isinstance(policy, RandomPolicy):
        return RandomRule(policy, grid)
    if isinstance(policy, UniformPolicy):
        return UniformRule()
    raise ValueError(f"'{policy.method}' has no rule")
