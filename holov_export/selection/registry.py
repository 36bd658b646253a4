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
from holov_export.selection.baselines import ClsTopkRule, FirstRule, RandomRule, UniformRule
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
    return _rule(policy, grid, grid[0] * grid[1])


def packed_rule_from_policy(policy: SelectionPolicy, tokens: int) -> nn.Module:
    """The rule for pictures of unequal numbers of tokens, `tokens` at most; it must be given crops.

    Raises:
        ValueError: the rule needs all pictures to be alike.
    """
    if not policy.packs:
        raise ValueError(f"'{policy.method}' cannot select where pictures have unequal numbers of tokens")
    return FirstRule() if isinstance(policy, NoSelection) else _rule(policy, None, tokens)


def _rule(policy: SelectionPolicy, grid: tuple[int, int] | None, tokens: int) -> nn.Module:
    """The rule for fixed crops of a grid, or for crops that are data."""
    if isinstance(policy, HolovPolicy):
        return HolovRule(policy, grid)
    if isinstance(policy, HolovOfficialPolicy):
        return HolovOfficialRule(policy, grid)
    if isinstance(policy, HolovPaperPolicy) and grid is not None:
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
        return RandomRule(policy, tokens)
    if isinstance(policy, UniformPolicy):
        return UniformRule()
    raise ValueError(f"'{policy.method}' has no rule")
