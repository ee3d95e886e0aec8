"""InfoNCE + λ · condensation, with the GradCache engine of Sentence-Transformers.

GradCache embeds a batch in mini-batches without gradients, computes InfoNCE and its gradient with respect to every
embedding, then embeds each mini-batch again with gradients and backpropagates the cached ones. The condensation loss
uses the same passes: each embedding gets one more column, which holds the summed token losses of its row. The total
loss is linear in that column. Its cached gradient is λ / number of target tokens, whatever its value is. So the first
pass leaves the column 0 and runs no target tokens; the second computes embedding and token losses in one forward.

InfoNCE is in `infonce.py`, the forward of one mini-batch in `btok_hf/condensation.py`. The keys of a batch are listed
in `btok_hf/features.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import (
    CachedLossMixin,
    RandContext,
    _create_minibatch,
    _minibatch_ranges,
)
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from btok_hf.backbones import family_of
from btok_hf.condensation import backbone_and_head
from btok_hf.features import IGNORED, PIXEL_KEYS, TEXT_KEYS, HostFeatures, stacked
from btok_hf.sentence_transformer import BTokSentenceTransformer
from btok_hf.training.infonce import Side, infonce


class CondensationLoss(CachedLossMixin, torch.nn.Module):
    """InfoNCE over (query, positive[, negatives…]) plus the weighted condensation loss of the features with targets.

    The condensation loss is the sum of all token losses of the batch, divided by the number of supervised target
    tokens of all processes. It does not depend on the mini-batch size, on the number of processes, or on how target
    tokens are distributed over rows.

    Args:
        model (`BTokSentenceTransformer`): The model to train.
        temperature (`float`): Temperature of InfoNCE over cosine similarities.
        symmetric (`bool`): Average the query → candidates and positive → queries losses.
        matryoshka_dims (`list[int]`, *optional*): InfoNCE is the mean over embeddings cut to these sizes and
            normalised again (Matryoshka Representation Learning, arXiv 2205.13147). The full size must be among them.
            Default: the full size alone.
        mini_batch_size (`int`): Rows per forward. If every side of a batch fits, the batch is embedded once, with
            gradients; if all sides are texts and fit together, in one forward.
        mini_batch_num_tokens (`int`, *optional*): Tokens per forward instead, target tokens included. A row that is
            longer is a mini-batch of its own.
        gather_across_devices (`bool`): Share candidates between processes. Their numbers may differ.
        condensation_weight (`float`): λ. At 0, target tokens are not run at all.
        condensation_mask (`bool`): `False`: the target also sees the encoded side.

    `cached` tells whether the last batch took more than one mini-batch. After each backward pass, `infonce` and
    `condensation` (unweighted; `None` without targets) hold the losses of this process's batch:
    `infonce + condensation_weight * condensation` is the loss that was trained.

    Features may hold `hashes` and `rows`, as `CondensationCollator` makes them. Without `hashes` no candidate is
    masked.

    If no parameter of the vision tower is trained, its outputs of GradCache's first pass are kept in CPU memory and
    reused in the second: `tokens x hidden x bytes` of the batch's images and videos.

    Raises:
        ValueError: `matryoshka_dims` without the full size, with a size twice, or with one below 1.
    """

    def __init__(
        self,
        model: BTokSentenceTransformer,
        *,
        temperature: float = 0.02,
        symmetric: bool = False,
        matryoshka_dims: Sequence[int] | None = None,
        mini_batch_size: int = 8,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        condensation_weight: float = 5.0,
        condensation_mask: bool = True,
    ) -> None:
        super().__init__()
        config = model.config
        assert config is not None
        hidden_size = config.get_text_config().hidden_size
        if matryoshka_dims:
            dims = sorted(matryoshka_dims)
            if dims[0] < 1 or dims[-1] != hidden_size or len(set(dims)) < len(dims):
                raise ValueError(
                    f"matryoshka_dims must be different sizes of 1 or more, the largest of them the embedding's "
                    f"{hidden_size} dimensions, got {list(matryoshka_dims)}. Give for example "
                    f"{[hidden_size, hidden_size // 2, hidden_size // 4]}."
                )
            config.matryoshka_dimensions = sorted(matryoshka_dims)  # vLLM cuts embeddings only to these
        self.model = model
        self._inner = (model,)  # the trainer puts wrappers around `model`; in a tuple it is not registered twice
        self.temperature = temperature
        self.symmetric = symmetric
        self.matryoshka_dims = matryoshka_dims or [hidden_size]
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.gather_across_devices = gather_across_devices
        self.condensation_weight = condensation_weight
        self.condensation_mask = condensation_mask
        self.infonce: Tensor | None = None
        self.condensation: Tensor | None = None
        self.cached: bool | None = None
        # Of the current batch, one entry per side.
        self._hashes: list[Tensor | None] = []
        self._rows: list[Tensor | None] = []
        # Numbers of queries, positives and negatives, each per process; set if candidates are gathered.
        self._sizes: list[list[int]] = []
        self._per_token = 0.0

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of one process's batch.

        Args:
            sentence_features (`Iterable[dict[str, Tensor]]`): One dict per column (queries, positives, then columns of
                negatives), with the keys of `btok_hf.features.BatchFeatures`. `input_ids` and `attention_mask` have
                the shape `(rows, length)`. There are equally many queries and positives; where equal ones are encoded
                once, `rows` says which encoded row each of them is.
            labels (`Tensor`, *optional*): Not used; Sentence-Transformers passes it.

        Returns:
            `Tensor`: A scalar. InfoNCE is the mean over the queries of this process. In training with a batch of
            several mini-batches, the condensation loss is not in the value yet: it is computed in the backward pass,
            which runs GradCache's second pass.

        Raises:
            ValueError: With sharded parameters (FSDP2), the processes have unequally many mini-batches.
        """
        features = [dict(feature) for feature in sentence_features]
        self._hashes = [feature.pop("hashes", None) for feature in features]
        self._rows = [feature.pop("rows", None) for feature in features]
        for feature, rows in zip(features, self._rows):
            if rows is not None:
                feature["copies"] = rows.bincount(minlength=len(feature["input_ids"]))
        if not self.condensation_weight:
            for feature in features:
                feature.pop("target_ids", None)
                feature.pop("target_labels", None)
        self.condensation = self._start_condensation(features)
        for feature in features:
            # The token bounds of the rows: GradCache's engine counts mini_batch_num_tokens with them.
            lengths = feature["attention_mask"].sum(1)
            if "target_labels" in feature:
                # Tokens after the last supervised label are padding. Unsupervised tokens before it are run.
                real = (feature["target_labels"] != IGNORED).flip(2).cummax(2).values
                lengths = lengths + real.sum((1, 2))
            feature["cu_seq_lens_q"] = F.pad(lengths.cumsum(0), (1, 0))
        ranges = [_minibatch_ranges(x, self.mini_batch_size, self.mini_batch_num_tokens) for x in features]
        self.cached = any(len(column) > 1 for column in ranges)
        self._check_equal_work(sum(map(len, ranges)))
        # Sizes are read here, before the first kernel is queued: later, reading them would wait for the kernels.
        self._sizes = self._gather_batch_sizes(features) if self.gather_across_devices else []
        if torch.is_grad_enabled() and not self.cached:
            return self.calculate_loss([[side] for side in self._embed_once(features)])
        if torch.is_grad_enabled() and self._vision_is_frozen():
            for feature in features:
                feature["vision"] = {}
        return self.forward_cached(features)

    def _embed_once(self, features: Sequence[dict[str, Any]]) -> list[Tensor]:
        """Embeddings of every side with gradients, in one pass instead of two; in one forward, if it holds all sides.

        Only sides of texts share a forward, and only if there is one process: several must run equally many.
        """
        (model,) = self._inner
        sides = [{key: value for key, value in feature.items() if key != "cu_seq_lens_q"} for feature in features]
        rows = [len(side["input_ids"]) for side in sides]
        alone = not (distributed.is_available() and distributed.is_initialized())
        if alone and all(side.keys() <= TEXT_KEYS for side in sides):
            size, limit = sum(rows), self.mini_batch_size
            if self.mini_batch_num_tokens:
                size, limit = sum(int(side["cu_seq_lens_q"][-1]) for side in features), self.mini_batch_num_tokens
            if size <= limit:
                together = stacked(sides, model.tokenizer)
                return list(self.embed_minibatch(together, 0, sum(rows), True, False)[0].split(rows))
        # Sides with targets last: DDP takes for unused what the last forward before a backward pass does not use, and
        # an untied head is used for targets alone.
        order = sorted(range(len(sides)), key=lambda index: "target_ids" in sides[index])
        embedded = {index: self.embed_minibatch(sides[index], 0, rows[index], True, False)[0] for index in order}
        return [embedded[index] for index in range(len(sides))]

    def _vision_is_frozen(self) -> bool:
        (model,) = self._inner
        return not any(p.requires_grad for p in model.transformer.vision_tower.parameters())

    def _backbone(self) -> PreTrainedModel:
        (model,) = self._inner
        return backbone_and_head(model.transformer.model)[0]

    @property
    def _device(self) -> torch.device:
        return self._backbone().device

    def _gather_batch_sizes(self, features: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Numbers of queries, positives and negatives, each per process."""
        sizes = [len(x["input_ids"] if rows is None else rows) for x, rows in zip(features, self._rows)]
        return _gather_sizes([*sizes[:2], sum(sizes[2:])], self._device).tolist()

    def _check_equal_work(self, mini_batches: int) -> None:
        """Refuse unequal numbers of mini-batches with sharded parameters, where every forward needs all processes."""
        if not any(isinstance(p, DTensor) for p in self.model.parameters()):
            return
        work = _gather_sizes([mini_batches, int(bool(self.cached))], self._device)
        if (work != work[:, :1]).any():
            raise ValueError(
                f"The processes have {work[0].tolist()} mini-batches in this step. With sharded parameters (FSDP2) "
                "they must have equally many: set mini_batch_size and not mini_batch_num_tokens, and give "
                "every row of all datasets equally many negatives."
            )

    def _start_condensation(self, features: Sequence[dict[str, Any]]) -> Tensor | None:
        """Count the target tokens of all processes. Returns a zero to add the condensation loss to, or `None`."""
        counts = [
            (feature["target_labels"] != IGNORED).sum((1, 2)) * feature.get("copies", 1)
            for feature in features
            if "target_ids" in feature
        ]
        total = sum(part.sum() for part in counts)
        world_size = 1
        if distributed.is_available() and distributed.is_initialized():
            # Processes without targets take part too. DDP and FSDP average gradients over processes afterwards.
            total = torch.as_tensor(total, device=self._device, dtype=torch.float32)
            distributed.all_reduce(total)
            world_size = distributed.get_world_size()
        count = int(total)
        self._per_token = world_size / max(count, 1)
        return torch.zeros((), device=self._device) if count else None

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Embeddings of rows `begin` to `end` with the condensation column, shape `(rows, hidden + 1)`."""
        # `_create_minibatch` takes features with cu_seq_lens_q for packed ones; these are padded.
        padded = {key: value for key, value in sentence_feature.items() if key != "cu_seq_lens_q"}
        minibatch = _create_minibatch(padded, begin, end)
        copies, vision = minibatch.pop("copies", None), minibatch.pop("vision", None)
        config = self._backbone().config
        # `_create_minibatch` sliced them as if they had one entry per row.
        for key, counts in family_of(config).items_per_row(config, padded).items():
            ends = F.pad(counts.cumsum(0), (1, 0))
            minibatch[key] = padded[key][ends[begin] : ends[end]]
            if not len(minibatch[key]):
                del minibatch[key]
        # Targets are run in the second pass, for a batch that fits one mini-batch, and in evaluation.
        if with_grad or not torch.is_grad_enabled():
            minibatch["condensation_mask"] = self.condensation_mask
        else:
            minibatch.pop("target_ids", None)
            minibatch.pop("target_labels", None)
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            # RandContext saves the random state of the devices that its tensors are on.
            random_state = RandContext(torch.empty(0, device=self._device)) if copy_random_state else None
            if vision is None:
                output = self.model(HostFeatures(minibatch))
            else:
                memory = vision.pop(begin) if begin in vision else vision.setdefault(begin, [])
                for key in minibatch.keys() & PIXEL_KEYS if memory else ():
                    minibatch[key] = minibatch[key][..., :0]  # not read again
                with cached_vision(self._backbone(), memory):
                    output = self.model(HostFeatures(minibatch))
        embeddings = output["sentence_embedding"]
        losses = output.get("condensation_loss")
        if losses is None:
            losses = embeddings.new_zeros(len(embeddings))
        elif self.condensation is not None:
            shown = losses.detach() if copies is None else losses.detach() * copies.to(losses.device)
            self.condensation += shown.sum() * self._per_token
        return torch.cat([embeddings, losses[:, None]], 1), random_state

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """InfoNCE of the embedding columns plus λ times the condensation column."""
        columns = [torch.cat(column) for column in reps]
        columns = [x if rows is None else x[rows.to(x.device)] for x, rows in zip(columns, self._rows)]
        contrast = self._infonce([column[:, :-1] for column in columns])
        self.infonce = contrast.detach()
        condensation = torch.cat([column[:, -1] for column in columns]).sum() * self._per_token
        loss = contrast + self.condensation_weight * condensation
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _infonce(self, columns: list[Tensor]) -> Tensor:
        """InfoNCE of this process's queries against the candidates of all processes, a scalar."""
        hashes = [x.new_empty(len(x), 0, dtype=torch.long) for x in columns]
        if all(given is not None for given in self._hashes):
            hashes = [given.to(x.device) for x, given in zip(columns, self._hashes) if given is not None]
        # All negatives form one block, which may be empty: processes may have different numbers of them.
        sides = [
            Side(columns[0], hashes[0]),
            Side(columns[1], hashes[1]),
            Side(torch.cat([columns[0][:0], *columns[2:]]), torch.cat([hashes[0][:0], *hashes[2:]])),
        ]
        rows, first = len(columns[0]), 0
        if self.gather_across_devices:
            sides = [Side(_gather(x, n), _gather(hashed, n)) for (x, hashed), n in zip(sides, self._sizes)]
            first = sum(self._sizes[0][: distributed.get_rank()])
        return infonce(
            sides[0],
            sides[1],
            sides[2],
            torch.arange(first, first + rows, device=columns[0].device),
            dims=self.matryoshka_dims,
            temperature=self.temperature,
            symmetric=self.symmetric,
        )


def _gather_sizes(sizes: Sequence[int], device: torch.device) -> Tensor:
    """The sizes of all processes, shape `(len(sizes), processes)`."""
    mine = torch.tensor(sizes, device=device)
    gathered = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, mine)
    return torch.stack(gathered, 1)


class _AllGather(torch.autograd.Function):
    """Stacks the tensors of all processes. Backward sums the gradients that all processes computed for a tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        gathered = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, tensor.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        distributed.all_reduce(grad)
        return grad[distributed.get_rank()]


def _gather(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all processes in the order of processes; `sizes` are their numbers of rows."""
    padded = F.pad(tensor, (0, 0, 0, max(sizes) - len(tensor)))
    return torch.cat([part[:size] for part, size in zip(_AllGather.apply(padded), sizes)])


@contextmanager
def cached_vision(backbone: PreTrainedModel, memory: list) -> Iterator[None]:
    """Inside the context, take the vision tower's outputs from `memory`; if it is empty, compute them and store them.

    For a frozen tower that sees the same images twice, as in GradCache's two passes.

    Args:
        backbone (`PreTrainedModel`): The stock backbone.
        memory (`list`): Outputs in the order of the tower's calls, on the CPU: embeddings and, with Qwen3-VL, the
            features for the first layers (deepstack).
    """
    earlier = iter(list(memory))
    filling = not memory

    def remember(method: Callable) -> Callable:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if filling:
                # By attribute: in transformers 5.17 the merged states of SmolVLM are no item of the output. The states
                # before merging are four times as large, and not read.
                output = {**vars(method(*args, **kwargs)), "last_hidden_state": None}
                memory.append(tree_map_only(Tensor, lambda x: x.cpu(), output))
            else:
                output = tree_map_only(Tensor, lambda x: x.to(backbone.device), next(earlier))
            return SimpleNamespace(**output)

        return call

    names = [name for name in ("get_image_features", "get_video_features") if hasattr(backbone, name)]
    for name in names:
        setattr(backbone, name, remember(getattr(backbone, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(backbone, name)
