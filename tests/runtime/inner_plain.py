"""The methods inside the language model once more, in plain code: whole attention maps, no cache, numpy loops.

Written from the papers and the published code, not from `holov_export`; nothing of it is imported here but the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from holov_export.tensors import StitchedPrompt


@dataclass
class Plain:
    """A prompt and the new tokens behind it, sent through the layers without a cache.

    Attributes:
        cuts: layer -> tokens kept of each image. lengths: prompt tokens that each layer saw.
        kept: layer -> places in the prompt of each image's kept tokens, -1 for merged ones.
    """

    model: LlavaForConditionalGeneration
    prompt: StitchedPrompt
    new: list[int]
    cuts: dict[int, list[int]]
    recycle: bool = True
    lengths: list[int] = field(default_factory=list)
    kept: dict[int, list[list[int]]] = field(default_factory=dict)

    @property
    def llama(self) -> Any:
        return self.model.model.language_model

    def images(self) -> list[list[int]]:
        """Places in the prompt of each image's rows."""
        places = np.flatnonzero(self.prompt.input_ids == self.prompt.image_token_id).tolist()
        ends = np.cumsum(self.prompt.counts).tolist()
        return [places[end - count : end] for end, count in zip(ends, self.prompt.counts, strict=True)]

    def embeds(self) -> torch.Tensor:
        ids = torch.from_numpy(self.prompt.input_ids)
        rows = self.model.get_input_embeddings()(ids).clone()
        rows[ids == self.prompt.image_token_id] = torch.from_numpy(self.prompt.rows)
        return rows

    def map_of(self, layer: int, rows: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """[S, S]: the attention of a layer, mean over heads, by transformers' eager attention."""
        module, size = self.llama.layers[layer], len(rows)
        _, weights = module.self_attn(
            hidden_states=module.input_layernorm(rows[None]),
            position_embeddings=self.llama.rotary_emb(rows[None], torch.tensor([positions])),
            attention_mask=causal(size),
        )
        return weights[0].mean(0)

    def run_layer(self, layer: int, rows: torch.Tensor, positions: list[int], mask: torch.Tensor) -> torch.Tensor:
        angles = self.llama.rotary_emb(rows[None], torch.tensor([positions]))
        return self.llama.layers[layer](rows[None], attention_mask=mask, position_embeddings=angles)[0]

    def head(self, row: torch.Tensor) -> np.ndarray:
        return self.model.lm_head(self.llama.norm(row)).numpy()

    def logits(self, method: str) -> np.ndarray:
        """[V] of the token after the last new one."""
        with torch.no_grad():
            return self._logits(method)

    def _logits(self, method: str) -> np.ndarray:
        rows, images = self.embeds(), self.images()
        new = self.model.get_input_embeddings()(torch.tensor(self.new, dtype=torch.long))
        origin = list(range(len(rows)))
        before, positions = rows, list(origin)
        spans = [(image[0], len(image)) for image in images]
        raters = [self.raters(rows, start, length, spans) for start, length in spans]
        first_new = len(rows)
        for layer in range(len(self.llama.layers)):
            if layer in self.cuts:
                scores = self.scores(method, layer, before, rows, positions, spans, raters)
                rows, origin, spans = self.cut(layer, method, rows, origin, spans, scores)
                positions = list(range(len(rows))) if method != "fastv" else list(origin)
            self.lengths.append(len(rows))
            before = rows
            start = first_new if method == "fastv" else len(rows)
            both = torch.cat([rows, new])
            places = positions + [start + index for index in range(len(new))]
            out = self.run_layer(layer, both, places, causal(len(both)))
            rows, new = out[: len(rows)], out[len(rows) :]
        return self.head((new if len(new) else rows)[-1])

    def scores(
        self,
        method: str,
        layer: int,
        before: torch.Tensor,
        rows: torch.Tensor,
        positions: list[int],
        spans: list[tuple[int, int]],
        raters: list[list[int]],
    ) -> list[np.ndarray]:
        if method == "pyramiddrop":
            attention = self.map_of(layer, rows, positions)
        else:
            attention = self.map_of(layer - 1, before, positions)
        text = spans[-1][0] + spans[-1][1]
        found = []
        for (start, length), words in zip(spans, raters, strict=True):
            asking = [text + word for word in words] if method == "sparsevlm" else [len(positions) - 1]
            found.append(attention[asking, start : start + length].mean(0).numpy())
        return found

    def raters(self, rows: torch.Tensor, start: int, length: int, spans: list[tuple[int, int]]) -> list[int]:
        """Words behind the images whose mean softmax share over the image's rows is above the mean."""
        visual = rows[start : start + length].double().numpy()
        words = rows[spans[-1][0] + spans[-1][1] :].double().numpy()
        shares = np.zeros(len(words))
        for row in visual:
            products = np.array([float(row @ word) for word in words])
            weights = np.exp(products - products.max())
            shares += weights / weights.sum()
        found = [index for index in range(len(words)) if shares[index] > shares.mean()]
        return found or list(range(len(words)))

    def cut(
        self,
        layer: int,
        method: str,
        rows: torch.Tensor,
        origin: list[int],
        spans: list[tuple[int, int]],
        scores: list[np.ndarray],
    ) -> tuple[torch.Tensor, list[int], list[tuple[int, int]]]:
        pieces: list[torch.Tensor] = []
        places: list[int] = []
        after: list[tuple[int, int]] = []
        self.kept[layer] = []
        done = 0
        for (start, length), score, keep in zip(spans, scores, self.cuts[layer], strict=True):
            ranked = sorted(range(length), key=lambda index, score=score: (-score[index], index))
            stay = sorted(ranked[:keep])
            pieces += [rows[done:start], rows[[start + index for index in stay]]]
            places += origin[done:start]
            begin = len(places)
            mine = [origin[start + index] for index in stay]
            gone = ranked[keep:]
            if method == "sparsevlm" and self.recycle and gone:
                taken = gone[: int(len(gone) * 0.3) + 1]
                merged = clustered(rows[[start + index for index in taken]].numpy(), int(len(taken) / 10) + 1)
                pieces.append(torch.from_numpy(merged).to(rows.dtype))
                mine += [-1] * len(merged)
            places += mine
            self.kept[layer].append(mine)
            after.append((begin, len(mine)))
            done = start + length
        pieces.append(rows[done:])
        places += origin[done:]
        return torch.cat(pieces), places, after


def causal(size: int) -> torch.Tensor:
    """[1, 1, S, S]: 0 below and on the diagonal, minus infinity above."""
    return torch.full((size, size), float("-inf")).triu(1)[None, None]


def clustered(rows: np.ndarray, clusters: int) -> np.ndarray:
    """Density peaks by loops."""
    count, width = rows.shape
    distance = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            distance[i, j] = np.sqrt(((rows[i].astype(np.float64) - rows[j]) ** 2).sum() / width)
    density = np.array([np.exp(-np.mean(np.sort(distance[i])[:clusters] ** 2)) for i in range(count)])
    reach = np.zeros(count)
    for i in range(count):
        denser = [distance[i, j] for j in range(count) if density[j] > density[i]]
        reach[i] = min(denser) if denser else distance.max()
    prominence = reach * density
    centres = sorted(range(count), key=lambda index: (-prominence[index], index))[:clusters]
    members: list[list[int]] = [[] for _ in centres]
    for i in range(count):
        nearest = int(np.argmin([distance[i, centre] for centre in centres]))
        members[centres.index(i) if i in centres else nearest].append(i)
    return np.stack([rows[group].mean(0) for group in members])
