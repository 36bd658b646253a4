"""Optimiser, losses and batches with which `train_demo_model.py` trains the demo model.

Shapes: B scenes, N = 144 image tokens, K kept tokens, D = 128 width, P prefix length (`<s> user :` and the
kept image tokens), S packed length, A answer positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import demo_scenes as ds
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # Source: openai/CLIP, clip/clip.py
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FEATURE_LAYER = 4  # index of the layer whose output is hidden_states[-2] of the six-layer tower
NEIGHBOURS = (
    ((1, 0), (-1, 0), (0, 1), (0, -1)),
    ((1, 1), (-1, -1), (1, -1), (-1, 1)),
    ((2, 0), (-2, 0), (0, 2), (0, -2)),
)
ASK_TOKENS = ("assistant", ":")


class Muon:
    """Momentum whose update is orthogonalised by five Newton-Schulz steps, for 2-D weights.
    Source: Keller Jordan, kellerjordan.github.io/posts/muon (coefficients); arXiv 2502.16982 (scale)."""

    def __init__(self, weights: Iterable[nn.Parameter], momentum: float = 0.95, decay: float = 0.02) -> None:
        self.momentum, self.decay = momentum, decay
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for weight in weights:
            shapes.setdefault(tuple(weight.shape), []).append(weight)
        self.groups = list(shapes.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape) for g in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with learning rate `rate`; gradients are left in place."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([w.grad if w.grad is not None else torch.zeros_like(w) for w in group])
            buffer.mul_(self.momentum).add_(gradient)
            update = orthogonal(gradient + self.momentum * buffer) * (0.2 * max(gradient.shape[1:]) ** 0.5)
            for weight, change in zip(group, update, strict=True):
                weight.mul_(1 - rate * self.decay).add_(change, alpha=-rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """[G, R, C] -> [G, R, C] with singular values near one."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Optimizer:
    """Muon for the inner matrices of `model`, AdamW for the rest (embeddings, heads, norms, biases)."""

    def __init__(self, model: nn.Module, outer: Sequence[str]) -> None:
        """`outer`: parts of parameter names that AdamW takes although they are matrices."""
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        inner = [p for n, p in named if p.ndim == 2 and not any(part in n for part in outer)]
        ids = {id(p) for p in inner}
        self.all = [p for _, p in named]
        self.muon = Muon(inner)
        rest = [p for p in self.all if id(p) not in ids]
        self.adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def step(self, rate: float) -> None:
        """Clips the gradients to norm 1, updates with learning rate `rate`, clears the gradients."""
        nn.utils.clip_grad_norm_(self.all, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.muon.step(rate)
        for weight in self.all:
            weight.grad = None


def learning_rate(step: int, steps: int, peak: float, hold: float) -> float:
    """Linear warm-up over 40 steps, `peak` for the share `hold` of the steps, then linear to zero."""
    warm = min(1.0, (step + 1) / 40)
    return peak * warm * min(1.0, (steps - step) / max(1.0, steps * (1 - hold)))


def pixels_from_images(images: np.ndarray) -> Tensor:
    """Uint8 [B, 84, 84, 3] -> normalised float32 [B, 3, 84, 84], as the processor does."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


@torch.no_grad()
def start_tower(tower: nn.Module) -> None:
    """Sine position embedding in the first 32 channels, and queries and keys of layers 0 to 2 with which
    each head looks at one neighbour. Training may change all of it; the architecture stays CLIP's."""
    frequency = torch.pi * (torch.arange(8) + 0.5) / 8
    place = torch.arange(ds.GRID)[:, None] * frequency
    axis = torch.cat([place.sin(), place.cos()], 1)  # [12, 16]
    rows, columns = torch.meshgrid(torch.arange(ds.GRID), torch.arange(ds.GRID), indexing="ij")
    table = tower.embeddings.position_embedding.weight
    table.normal_(std=0.02)
    table[1:, :32] = torch.cat([axis[columns.flatten()], axis[rows.flatten()]], 1)
    tower.embeddings.patch_embedding.weight.normal_(std=0.05)
    tower.embeddings.class_embedding.normal_(std=0.3)
    for layer, offsets in zip(tower.encoder.layers, NEIGHBOURS, strict=False):
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        for head, (dx, dy) in enumerate(offsets):
            block = slice(32 * head, 32 * head + 32)
            turn = torch.zeros(32, 32)
            for start, offset in ((0, dx), (16, dy)):
                sine, cosine = (frequency * offset).sin().diag(), (frequency * offset).cos().diag()
                turn[start : start + 8, start : start + 8] = cosine
                turn[start : start + 8, start + 8 : start + 16] = sine
                turn[start + 8 : start + 16, start : start + 8] = -sine
                turn[start + 8 : start + 16, start + 8 : start + 16] = cosine
            query[block, :32] = 0.8 * turn
            key[block, :32] = 0.8 * torch.eye(32)


def tower_features(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of layer -2 with CLS first [B, 1 + N, D], and the pooled CLS of the last layer [B, D]."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    features = hidden
    for index, layer in enumerate(tower.encoder.layers):
        hidden = layer(hidden, None)
        if index == FEATURE_LAYER:
            features = hidden
    return features, tower.post_layernorm(hidden[:, 0])


@torch.no_grad()
def cls_attention(tower: nn.Module, pixels: Tensor) -> Tensor:
    """Attention of CLS to the N patches in the layer that makes hidden_states[-2], mean over heads [B, N]."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:FEATURE_LAYER]:
        hidden = layer(hidden, None)
    layer = tower.encoder.layers[FEATURE_LAYER]
    hidden = layer.layer_norm1(hidden)
    attention = layer.self_attn
    query = attention.q_proj(hidden[:, 0]).view(-1, 4, 1, 32)
    key = attention.k_proj(hidden).view(len(hidden), -1, 4, 32).transpose(1, 2)
    return (query @ key.mT * 32**-0.5).softmax(-1).mean(1)[:, 0, 1:]


@dataclass(frozen=True)
class TowerTargets:
    """Labels of B images. digit, color int64 [B, N]; center [B, N, 2]; presence [B, 10] in 0..1;
    count int64 [B] from 0; bound int64 [B, 5], the digit in each colour or 10."""

    digit: Tensor
    color: Tensor
    center: Tensor
    presence: Tensor
    count: Tensor
    bound: Tensor


def targets_from_scenes(batch: ds.SceneBatch) -> TowerTargets:
    """The labels with which the tower is trained."""
    presence = np.zeros((len(batch.count), 11), np.float32)
    bound = np.full((len(batch.count), len(ds.COLORS) + 1), 10)
    rows = np.arange(len(batch.count))
    for slot in range(batch.labels.shape[1]):
        presence[rows, batch.labels[:, slot]] = 1  # -1 lands in the spare last column
        bound[rows, batch.colors[:, slot]] = batch.labels[:, slot]
    count = np.minimum(batch.count - 1, 3)
    arrays = (
        batch.patch_digit,
        batch.patch_color,
        batch.patch_center,
        presence[:, :10],
        count,
        bound[:, :-1],
    )
    return TowerTargets(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))


class TowerLosses(nn.Module):
    """The tower with throw-away heads: patch labels on layer -2, scene labels on CLS of layer -2 and of the
    last layer. They stand in for CLIP's pre-training."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        width, colors = 128, len(ds.COLORS)
        self.norm, self.cls_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patch_head = nn.Linear(width, 11 + colors + 1 + 2)
        self.cls_heads = nn.ModuleList(nn.Linear(width, 10 + 4 + 11 * colors) for _ in range(2))

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Patch outputs [B, N, 19] and, of each of the two CLS tokens, outputs [B, 69]."""
        features, pooled = tower_features(self.tower, pixels)
        inputs = (self.cls_norm(features[:, 0]), pooled)
        scene = [head(x) for head, x in zip(self.cls_heads, inputs, strict=True)]
        return self.patch_head(self.norm(features[:, 1:])), scene

    def patch_loss(self, outputs: Tensor, targets: TowerTargets) -> Tensor:
        """Digit class + colour + centre, inked patches weighing as much as four empty ones."""
        digit, color, center = outputs.split([11, 6, 2], -1)
        inked = (targets.digit < 10).float()
        weight = 0.25 + 0.75 * inked
        terms = F.cross_entropy(digit.flatten(0, 1), targets.digit.flatten(), reduction="none")
        terms = terms + F.cross_entropy(color.flatten(0, 1), targets.color.flatten(), reduction="none")
        distance = (center - targets.center).abs().sum(-1)
        return (terms.view_as(weight) * weight).sum() / weight.sum() + (distance * inked).sum() / inked.sum()

    def scene_loss(self, outputs: list[Tensor], targets: TowerTargets) -> Tensor:
        """Which digits, how many, which digit in which colour; mean over the two CLS tokens."""
        total = torch.zeros(())
        for out in outputs:
            presence, count, bound = out[:, :10], out[:, 10:14], out[:, 14:].unflatten(1, (-1, 11))
            total = total + 2 * F.binary_cross_entropy_with_logits(presence, targets.presence)
            total = total + 0.5 * F.cross_entropy(count, targets.count)
            total = total + F.cross_entropy(bound.flatten(0, 1), targets.bound.flatten())
        return total / len(outputs)


def tower_scores(patch: Tensor, scene: list[Tensor], targets: TowerTargets) -> dict[str, float]:
    """Shares right: digit and colour of inked patches; at CLS of layer -2 digit set, count, colour to digit."""
    inked = targets.digit < 10
    digit, color = patch[..., :11].argmax(-1), patch[..., 11:17].argmax(-1)
    out = scene[0]
    bound = out[:, 14:].unflatten(1, (-1, 11)).argmax(-1)
    shown = targets.bound < 10
    scores = {
        "patch_digit": (digit == targets.digit)[inked],
        "patch_color": (color == targets.color)[inked],
        "cls_digit_set": ((out[:, :10] > 0) == (targets.presence > 0.5)).all(-1),
        "cls_count": out[:, 10:14].argmax(-1) == targets.count,
        "cls_color_to_digit": (bound == targets.bound)[shown],
    }
    return {name: right.float().mean().item() for name, right in scores.items()}


# ---------------------------------------------------------------- language model: ten questions per image


class PackedLayout:
    """Where the ten questions of a scene lie behind one image prefix. Each question sees the image and
    itself only and its positions restart behind the image, so a pack equals ten separate LLaVA prompts."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.vocabulary = vocabulary
        self.prefix = [vocabulary[w] for w in ("<s>", "user", ":")]
        self.end = vocabulary["</s>"]
        words = (
            "presence",
            "presence",
            "count",
            "leftmost",
            "topmost",
            "color",
            "color",
            "what",
            "leftmost",
            "read",
        )
        examples = {
            "presence": "is there a 7?",
            "count": "how many digits are there?",
            "leftmost": "what is the leftmost digit?",
            "topmost": "what is the topmost digit?",
            "color": "which digit is red?",
            "what": "what color is the 3?",
            "read": "read the digits from left to right",
        }
        asked = [len(self.ids(examples[w])) + len(ASK_TOKENS) for w in words]
        self.answer_room = [ds.MAX_DIGITS if w == "read" else 1 for w in words]  # tokens, without </s>
        self.lengths = [a + r for a, r in zip(asked, self.answer_room, strict=True)]
        starts = np.cumsum([0, *self.lengths])
        self.total = int(starts[-1])
        self.block = torch.repeat_interleave(torch.arange(10), torch.tensor(self.lengths))
        self.offset = torch.cat([torch.arange(n) for n in self.lengths])
        spans = [range(s + a - 1, s + a + r) for s, a, r in zip(starts, asked, self.answer_room, strict=False)]
        self.answers = torch.tensor([i for span in spans for i in span])  # positions that predict
        self.slot = torch.tensor([k for k, span in enumerate(spans) for _ in span])
        lookup = [w in ("presence", "what") for w in words]  # find a named digit: learned last, so it counts more
        self.weight = torch.where(torch.tensor(lookup)[self.slot], 2.5, 1.0)

    @cache  # noqa: B019 (a few dozen distinct sentences, one layout per run)
    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of plain words and digits, without specials."""
        return tuple(self.vocabulary[w] for w in text.replace("?", " ?").split())

    def pack(self, scenes: Sequence[Sequence[ds.Question]]) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, total] and targets int64 [B, A], -100 where nothing is to be predicted."""
        ask = [self.vocabulary[w] for w in ASK_TOKENS]
        all_ids, all_targets = [], []
        for questions in scenes:
            ids: list[int] = []
            targets: list[int] = []
            for q, room in zip(questions, self.answer_room, strict=True):
                answer = self.ids(q.answer)
                spare = room - len(answer)
                ids += [*self.ids(q.question), *ask, *answer, *[self.end] * spare]
                targets += [*answer, self.end, *[-100] * spare]
            all_ids.append(ids)
            all_targets.append(targets)
        return torch.tensor(all_ids), torch.tensor(all_targets)

    def mask_and_positions(self, kept: int) -> tuple[Tensor, Tensor]:
        """Bool mask [1, 1, S, S] (true = may look) and position ids [1, S] behind `kept` image tokens."""
        prefix = len(self.prefix) + kept
        block = torch.cat([torch.full((prefix,), -1), self.block])
        causal = torch.ones(len(block), len(block)).tril().bool()
        visible = causal & ((block[None] == block[:, None]) | (block[None] == -1))
        positions = torch.cat([torch.arange(prefix), prefix + self.offset])
        return visible[None, None], positions[None]


class Reader(nn.Module):
    """Projector and language model of a LLaVA, run on packed questions."""

    def __init__(self, llava: nn.Module, layout: PackedLayout) -> None:
        super().__init__()
        self.projector = llava.model.multi_modal_projector
        self.language = llava.model.language_model
        self.head = llava.lm_head
        self.layout = layout
        self.plans: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.decode = self._decode

    def plan(self, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, cosines and sines for `kept` image tokens."""
        if kept not in self.plans:
            mask, positions = self.layout.mask_and_positions(kept)
            cosine, sine = self.language.rotary_emb(torch.zeros(1), positions)
            self.plans[kept] = (mask, cosine.clone(), sine.clone())
        return self.plans[kept]

    def _decode(self, tokens: Tensor, ids: Tensor, mask: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        embed = self.language.embed_tokens
        start = embed(torch.tensor(self.layout.prefix)).expand(len(ids), -1, -1)
        hidden = torch.cat([start, self.projector(tokens), embed(ids)], 1)
        for layer in self.language.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=(cosine, sine))
        hidden = hidden[:, len(self.layout.prefix) + tokens.shape[1] :][:, self.layout.answers]
        return self.head(self.language.norm(hidden))

    def alignment_loss(self, tokens: Tensor, batch: ds.SceneBatch) -> Tensor:
        """How far projected features [B, N, D] of inked patches point away from the embeddings of the words for
        their digit and colour, as cross-entropy of cosines. It stands in for LLaVA's captions."""
        digit, color = (torch.from_numpy(labels) for labels in (batch.patch_digit, batch.patch_color))
        inked = digit < 10
        projected = F.normalize(self.projector(tokens[inked]), dim=-1)
        words = F.normalize(self.language.embed_tokens.weight, dim=-1)
        loss = torch.zeros(())
        for names, labels in ((range(10), digit), (ds.COLOR_NAMES, color)):
            ids = torch.tensor([self.layout.vocabulary[str(name)] for name in names])
            loss = loss + F.cross_entropy(10 * projected @ words[ids].mT, labels[inked])
        return loss

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Image features [B, K, D], packed ids [B, total] -> logits [B, A, V] at the answer positions."""
        return self.decode(tokens, ids, *self.plan(tokens.shape[1]))


def answer_loss(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of logits [B, A, V] and targets [B, A] (-100: none), weighted by answer position [A]."""
    terms = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    known = (targets != -100).float() * weight
    return (terms.view_as(known) * known).sum() / known.sum()


def kept_patches(batch: ds.SceneBatch, kept: int, rng: np.random.Generator) -> Tensor:
    """Random patch indices [B, K] in raster order. In 60 % of the images the draw prefers inked patches,
    by no selection rule's score; every digit keeps one inked patch, so every question stays answerable."""
    noise = rng.gumbel(size=batch.ink.shape)
    bias = rng.uniform(0, 1.5, (len(noise), 1)) * (rng.random((len(noise), 1)) < 0.6)
    scores = noise + bias * np.log(batch.ink + 0.02)
    rows = np.arange(len(noise))
    for slot in range(batch.labels.shape[1]):
        mine = batch.patch_digit == batch.labels[:, slot, None]
        pick = np.where(mine, noise, -np.inf).argmax(1)
        any_ink = mine.any(1)
        scores[rows[any_ink], pick[any_ink]] = 1e9
    chosen = np.sort((-scores).argsort(1)[:, :kept], 1)
    return torch.from_numpy(chosen)


def gathered(features: Tensor, index: Tensor) -> Tensor:
    """Rows of features [B, N, D] at index [B, K] -> [B, K, D]."""
    return features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
