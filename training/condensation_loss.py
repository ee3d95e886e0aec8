"""InfoNCE + λ · condensation, through the GradCache engine of Sentence-Transformers.

GradCache embeds a batch in mini-batches without gradients, computes InfoNCE and its gradient with respect to every
embedding, then embeds each mini-batch again with gradients and feeds the cached ones in. The condensation loss rides
along: each embedding gets one more column that holds the summed token losses of its row. The total is linear in that
column, so its cached gradient (λ / number of target tokens) is right whatever its value. The first pass therefore
leaves it 0 and runs no target tokens; the second computes embedding and token losses in one forward.

InfoNCE is this file's own because candidates are masked by content: where a batch holds the right answer of a query
more than once, as label datasets do, the copies would be negatives of themselves.
"""

from contextlib import contextmanager, nullcontext
from functools import partial, wraps

import torch
from sentence_transformers.base.losses.gradcache import (
    CachedLossMixin,
    RandContext,
    _create_minibatch,
    _minibatch_ranges,
)
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from btok_hf.condensation import backbone_and_head
from btok_hf.features import IGNORED, PIXEL_KEYS, HostFeatures

SCORE_ROWS = 1024  # queries whose scores against all candidates are alive at once


class CondensationLoss(CachedLossMixin, torch.nn.Module):
    """InfoNCE over (query, positive[, negatives…]) plus the weighted condensation loss of the features with targets.

    The condensation loss is the sum of all token losses of the batch over the number of supervised target tokens of
    all processes: it does not depend on the mini-batch size, on the number of processes, or on how target tokens
    spread over rows.

    Args:
        model (`BTokSentenceTransformer`): The model to train.
        temperature (`float`): Of InfoNCE over cosine similarities.
        symmetric (`bool`): Average the query → candidates and positive → queries losses.
        matryoshka_dims (`list[int]`, *optional*): InfoNCE is the mean over embeddings cut to these numbers of
            dimensions and normalised again (Matryoshka Representation Learning, arXiv 2205.13147). Default: whole.
        mini_batch_size (`int`): Rows per forward. A batch that fits is embedded once, with gradients.
        mini_batch_num_tokens (`int`, *optional*): Tokens per forward instead, those of targets counted; a longer row
            is a mini-batch of its own.
        gather_across_devices (`bool`): Share candidates between processes. Their numbers may differ.
        condensation_weight (`float`): λ. At 0 the targets are not run at all.
        condensation_mask (`bool`): `False`: the target also sees the encoded side.

    `cached` tells whether the last batch took more than one mini-batch. After each backward pass, `infonce` and
    `condensation` (unweighted; `None` without targets) hold the loss values of this process's batch, so that
    `infonce + condensation_weight * condensation` is the loss that was trained.

    Features may hold what `CondensationCollator` makes: `hashes`, int64 of shape `(batch, 2)`, without which no
    candidate is masked, and `rows`, int64 of shape `(batch,)`, where fewer rows are encoded than the batch has.

    Where nothing in the vision tower is trained, its outputs of GradCache's first pass are kept in CPU memory and used
    again in the second: `tokens x hidden x bytes` of the batch's images and videos.
    """

    def __init__(
        self,
        model,
        *,
        temperature=0.02,
        symmetric=False,
        matryoshka_dims=None,
        mini_batch_size=8,
        mini_batch_num_tokens=None,
        gather_across_devices=False,
        condensation_weight=5.0,
        condensation_mask=True,
    ):
        super().__init__()
        hidden_size = model.config.get_text_config().hidden_size
        if matryoshka_dims and not all(0 < dim <= hidden_size for dim in matryoshka_dims):
            raise ValueError(
                f"matryoshka_dims must lie between 1 and the embedding's {hidden_size} dimensions, "
                f"got {matryoshka_dims}. Remove those outside."
            )
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
        self.infonce = self.condensation = self.cached = None
        # Of the batch in work: hashes and encoded rows of each side, queries, positives and negatives of each process.
        self._hashes = self._rows = self._sizes = None
        self._per_token = 0.0

    def forward(self, sentence_features, labels=None):
        features = [dict(feature) for feature in sentence_features]
        self._hashes = [feature.pop("hashes", None) for feature in features]
        self._rows = [feature.pop("rows", None) for feature in features]
        for feature, rows in zip(features, self._rows):
            if rows is not None:
                feature["copies"] = rows.bincount(minlength=len(feature["input_ids"]))
        if not self.condensation_weight:
            for feature in features:
                feature.pop("target_ids", None), feature.pop("target_labels", None)
        self.condensation = self._start_condensation(features)
        for feature in features:
            # The bounds of the packed rows: what the engine counts a token budget by.
            lengths = feature["attention_mask"].sum(1)
            if "target_labels" in feature:
                # Padding stands behind a row's last supervised token; the unsupervised ones before it are run.
                real = (feature["target_labels"] != IGNORED).flip(2).cummax(2).values
                lengths = lengths + real.sum((1, 2))
            feature["cu_seq_lens_q"] = F.pad(lengths.cumsum(0), (1, 0))
        ranges = [_minibatch_ranges(x, self.mini_batch_size, self.mini_batch_num_tokens) for x in features]
        self.cached = any(len(column) > 1 for column in ranges)
        self._check_equal_work(sum(map(len, ranges)))
        # Before the first kernel is queued, for which reading the answer would have to wait.
        self._sizes = self._gather_batch_sizes(features) if self.gather_across_devices else None
        if torch.is_grad_enabled() and not self.cached:
            # One forward with gradients instead of two.
            sides = [(feature, *column[0]) for feature, column in zip(features, ranges)]
            return self.calculate_loss([[self.embed_minibatch(*side, True, False)[0]] for side in sides])
        if torch.is_grad_enabled() and self._vision_is_frozen():
            for feature in features:
                feature["vision"] = {}
        return self.forward_cached(features)

    def _vision_is_frozen(self):
        return not any(p.requires_grad for p in self._backbone().visual.parameters())

    def _backbone(self):
        (model,) = self._inner
        return backbone_and_head(model[0].model)[0]

    @property
    def _device(self):
        return self._backbone().device

    def _gather_batch_sizes(self, features):
        """Numbers of queries, positives and negatives of each process, `list[list[int]]`."""
        sizes = [len(x["input_ids"] if rows is None else rows) for x, rows in zip(features, self._rows)]
        return _gather_sizes([*sizes[:2], sum(sizes[2:])], self._device).tolist()

    def _check_equal_work(self, mini_batches):
        """With sharded parameters every forward takes all processes: unequally many would hang."""
        if not any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in self.model.parameters()):
            return
        work = _gather_sizes([mini_batches, self.cached], self._device)
        if (work != work[:, :1]).any():
            raise ValueError(
                f"The processes have {work[0].tolist()} mini-batches in this step. With sharded parameters (FSDP, "
                "ZeRO-3) they must have equally many: set mini_batch_size and not mini_batch_num_tokens, and give "
                "every row of all datasets equally many negatives."
            )

    def _start_condensation(self, features):
        """Count the target tokens of all processes; returns a zero to sum the condensation loss into, or `None`."""
        counts = [
            (feature["target_labels"] != IGNORED).sum((1, 2)) * feature.get("copies", 1)
            for feature in features
            if "target_ids" in feature
        ]
        count = sum(part.sum() for part in counts)
        world_size = 1
        if distributed.is_available() and distributed.is_initialized():
            # Every process takes part, targets or not. The gradients are averaged over processes afterwards.
            count = torch.as_tensor(count, device=self._device, dtype=torch.float32)
            distributed.all_reduce(count)
            world_size = distributed.get_world_size()
        count = int(count)
        self._per_token = world_size / max(count, 1)
        return torch.zeros((), device=self._device) if count else None

    def embed_minibatch(self, sentence_feature, begin, end, with_grad, copy_random_state, random_state=None):
        """Embeddings of rows `begin` to `end` with the condensation column, shape (rows, hidden + 1)."""
        # With the bounds of packed rows the engine would take the rows themselves for packed.
        padded = {key: value for key, value in sentence_feature.items() if key != "cu_seq_lens_q"}
        minibatch = _create_minibatch(padded, begin, end)
        copies, vision = minibatch.pop("copies", None), minibatch.pop("vision", None)
        if "second_per_grid_ts" in minibatch and "num_videos_per_sample" in padded:
            # One for each video, which the engine takes for one for each row.
            videos = F.pad(padded["num_videos_per_sample"].cumsum(0), (1, 0))
            minibatch["second_per_grid_ts"] = padded["second_per_grid_ts"][videos[begin] : videos[end]]
        # True in the second pass, for a batch that fits one mini-batch, and in evaluation.
        if with_grad or not torch.is_grad_enabled():
            minibatch["condensation_mask"] = self.condensation_mask
        else:
            minibatch.pop("target_ids", None), minibatch.pop("target_labels", None)
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            # Any tensor on the device tells which random states to keep.
            random_state = RandContext(torch.empty(0, device=self._device)) if copy_random_state else None
            if vision is None:
                output = self.model(HostFeatures(minibatch))
            else:
                memory = vision.pop(begin) if begin in vision else vision.setdefault(begin, [])
                for key in minibatch.keys() & PIXEL_KEYS if memory else ():
                    minibatch[key] = minibatch[key][:0]  # nobody looks at them again
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

    def calculate_loss(self, reps, labels=None, *, with_backward=False):
        """InfoNCE of the embedding columns plus λ times the condensation column."""
        columns = [torch.cat(column) for column in reps]
        columns = [x if rows is None else x[rows.to(x.device)] for x, rows in zip(columns, self._rows)]
        infonce = self._infonce([column[:, :-1] for column in columns])
        self.infonce = infonce.detach()
        condensation = torch.cat([column[:, -1] for column in columns]).sum() * self._per_token
        loss = infonce + self.condensation_weight * condensation
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _infonce(self, columns):
        """InfoNCE of this process's queries against the candidates of all processes, a scalar."""
        hashes = [x.new_empty(len(x), 0, dtype=torch.long) for x in columns]
        if all(given is not None for given in self._hashes):
            hashes = [given.to(x.device) for x, given in zip(columns, self._hashes)]
        # Negatives are one block, which may be empty: processes need not have equally many.
        parts = [
            (columns[0], hashes[0]),
            (columns[1], hashes[1]),
            (torch.cat([columns[0][:0], *columns[2:]]), torch.cat([hashes[0][:0], *hashes[2:]])),
        ]
        rows, first = len(columns[0]), 0
        if self.gather_across_devices:
            parts = [tuple(_gather(tensor, n) for tensor in part) for part, n in zip(parts, self._sizes)]
            first = sum(self._sizes[0][: distributed.get_rank()])
        (queries, query_ids), (positives, positive_ids), (negatives, negative_ids) = parts

        own = torch.arange(first, first + rows, device=queries.device)
        total = 0.0
        for dim in self.matryoshka_dims:
            vectors = [F.normalize(x[:, :dim], dim=1) for x in (queries, positives, negatives)]
            block_loss = partial(self._block_loss, *vectors, query_ids, positive_ids, negative_ids)
            for block in own.split(SCORE_ROWS):
                # Recomputed in the backward pass, so that not all scores of a large batch are alive at once.
                total = total + checkpoint(block_loss, block, use_reentrant=False, preserve_rng_state=False)
        return total / (rows * len(self.matryoshka_dims))

    def _block_loss(self, queries, positives, negatives, query_ids, positive_ids, negative_ids, block):
        """Summed InfoNCE of the queries with indices `block`, without candidates that would be false negatives."""
        false = _any_equal(positive_ids[block], positive_ids) | _any_equal(query_ids[block], query_ids)
        false.scatter_(1, block[:, None], False)  # a query's own positive stays
        to_positives = (queries[block] @ positives.T / self.temperature).masked_fill(false, -torch.inf)
        to_negatives = (queries[block] @ negatives.T / self.temperature).masked_fill(
            _any_equal(positive_ids[block], negative_ids), -torch.inf
        )
        right = to_positives.gather(1, block[:, None])[:, 0]
        normaliser = torch.cat([to_positives, to_negatives], 1).logsumexp(1)
        if self.symmetric:
            to_queries = (positives[block] @ queries.T / self.temperature).masked_fill(false, -torch.inf)
            normaliser = (normaliser + to_queries.logsumexp(1)) / 2
        return (normaliser - right).sum()


def _any_equal(hashes, others):
    """Which pairs agree in a column, shape (len(hashes), len(others))."""
    return (hashes[:, None] == others).any(-1)


def _gather_sizes(sizes, device):
    """The sizes of all processes, shape (len(sizes), processes)."""
    mine = torch.tensor(sizes, device=device)
    gathered = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, mine)
    return torch.stack(gathered, 1)


class _AllGather(torch.autograd.Function):
    """The tensors of all processes, stacked; a process's gradient is the sum of what all of them computed for it."""

    @staticmethod
    def forward(ctx, tensor):
        gathered = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, tensor.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        distributed.all_reduce(grad)
        return grad[distributed.get_rank()]


def _gather(tensor, sizes):
    """The rows of all processes, which have `sizes` of them, in the order of processes."""
    padded = F.pad(tensor, (0, 0, 0, max(sizes) - len(tensor)))
    return torch.cat([part[:size] for part, size in zip(_AllGather.apply(padded), sizes)])


@contextmanager
def cached_vision(backbone, memory):
    """Inside, what the vision tower gives is taken from `memory`; if that is empty, it is computed and put there.

    For a frozen tower that sees the same images twice, as in GradCache's two passes.

    Args:
        backbone (`PreTrainedModel`): The stock backbone.
        memory (`list`): Outputs in the order of the tower's calls, on the CPU: embeddings and, of Qwen3-VL, the
            features that go into the first layers.
    """
    earlier = iter(list(memory))
    filling = not memory

    def remember(method):
        @wraps(method)
        def call(pixels, *args, **kwargs):
            if not filling:
                return tree_map(lambda x: x.to(pixels.device), next(earlier))
            output = method(pixels, *args, **kwargs)
            # What comes before merging is four times as large, and nobody reads it.
            output["last_hidden_state"] = output["pooler_output"]
            memory.append(tree_map(lambda x: x.cpu(), output))
            return output

        return call

    names = ("get_image_features", "get_video_features")
    for name in names:
        setattr(backbone, name, remember(getattr(backbone, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(backbone, name)
