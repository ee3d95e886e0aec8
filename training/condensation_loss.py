"""InfoNCE + λ · condensation, through the GradCache engine of Sentence-Transformers.

GradCache embeds a batch in mini-batches without gradients, computes InfoNCE and its gradient with respect to every
embedding, then embeds each mini-batch again with gradients and feeds the cached ones in. The condensation loss rides
along: each embedding gets one more column that holds the summed token losses of its row. The total is linear in that
column, so its cached gradient (λ / number of target tokens) is right whatever its value. The first pass therefore
leaves it 0 and runs no target tokens; the second computes embedding and token losses in one forward.
"""

from contextlib import nullcontext

import torch
from sentence_transformers.base.losses.gradcache import RandContext, _create_minibatch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import distributed

from btok_hf.condensation import IGNORED


class CondensationLoss(CachedMultipleNegativesRankingLoss):
    """InfoNCE over (query, positive[, negatives…]) plus the weighted condensation loss of the features with targets.

    The condensation loss is the sum of all token losses of the batch over the number of supervised target tokens of
    all processes: it does not depend on the mini-batch size, on the number of processes, or on how target tokens
    spread over rows.

    Args:
        model (`BTokSentenceTransformer`): The model to train.
        temperature (`float`): Of InfoNCE.
        symmetric (`bool`): Average the query → candidates and positive → queries losses.
        mini_batch_size (`int`): Rows per forward. A batch that fits is embedded once, with gradients.
        gather_across_devices (`bool`): Share candidates between processes.
        condensation_weight (`float`): λ. At 0 the targets are not run at all.
        condensation_mask (`bool`): `False`: the target also sees the encoded side.

    After each backward pass, `infonce` and `condensation` (unweighted; `None` without targets) hold the loss values
    of this process's batch, so that `infonce + condensation_weight * condensation` is the loss that was trained.
    """

    def __init__(
        self,
        model,
        *,
        temperature=0.02,
        symmetric=False,
        mini_batch_size=8,
        gather_across_devices=False,
        condensation_weight=5.0,
        condensation_mask=True,
    ):
        super().__init__(
            model,
            scale=1 / temperature,
            mini_batch_size=mini_batch_size,
            gather_across_devices=gather_across_devices,
            directions=("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",),
            partition_mode="per_direction" if symmetric else "joint",
        )
        self.condensation_weight = condensation_weight
        self.condensation_mask = condensation_mask
        self.infonce = self.condensation = None
        self._per_token = 0.0

    def forward(self, sentence_features, labels=None):
        features = [dict(feature) for feature in sentence_features]
        if not self.condensation_weight:
            for feature in features:
                feature.pop("target_ids", None), feature.pop("target_labels", None)
        self.condensation = self._start_condensation(features)
        rows = len(features[0]["input_ids"])
        if torch.is_grad_enabled() and rows <= self.mini_batch_size:
            # Nothing to cache: one forward with gradients instead of two.
            return self.calculate_loss([[self.embed_minibatch(f, 0, rows, True, False)[0]] for f in features])
        return super().forward(features, labels)

    def _start_condensation(self, features):
        """Count the target tokens of all processes; returns a zero to sum the condensation loss into, or `None`."""
        count = sum((feature["target_labels"] != IGNORED).sum() for feature in features if "target_ids" in feature)
        count = torch.as_tensor(count, device=features[0]["input_ids"].device, dtype=torch.float32)
        world_size = 1
        if distributed.is_available() and distributed.is_initialized():
            # Every process takes part, targets or not. The gradients are averaged over processes afterwards.
            distributed.all_reduce(count)
            world_size = distributed.get_world_size()
        self._per_token = world_size / max(count.item(), 1)
        return torch.zeros_like(count) if count.item() else None

    def embed_minibatch(self, sentence_feature, begin, end, with_grad, copy_random_state, random_state=None):
        """Embeddings of rows `begin` to `end` with the condensation column, shape (rows, hidden + 1)."""
        minibatch = _create_minibatch(sentence_feature, begin, end)
        # True in the second pass, for a batch that fits one mini-batch, and in evaluation.
        if with_grad or not torch.is_grad_enabled():
            minibatch["condensation_mask"] = self.condensation_mask
        else:
            minibatch.pop("target_ids", None), minibatch.pop("target_labels", None)
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            random_state = RandContext(*minibatch.values()) if copy_random_state else None
            output = self.model(minibatch)
        embeddings = output["sentence_embedding"]
        losses = output.get("condensation_loss")
        if losses is None:
            losses = embeddings.new_zeros(len(embeddings))
        elif self.condensation is not None:
            self.condensation += losses.detach().sum() * self._per_token
        return torch.cat([embeddings, losses[:, None]], 1), random_state

    def calculate_loss(self, reps, labels=None, *, with_backward=False):
        """InfoNCE of the embedding columns plus λ times the condensation column."""
        infonce = super().calculate_loss([[r[:, :-1] for r in column] for column in reps], with_backward=with_backward)
        self.infonce = infonce.detach()
        condensation = torch.cat([r[:, -1] for column in reps for r in column]).sum() * self._per_token
        weighted = self.condensation_weight * condensation
        if with_backward:
            weighted.backward()
            weighted = weighted.detach()
        return infonce + weighted

    def get_config_dict(self):
        return {
            **super().get_config_dict(),
            "condensation_weight": self.condensation_weight,
            "condensation_mask": self.condensation_mask,
        }
