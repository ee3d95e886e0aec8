"""Condensation by definition, for any token mixer: stock layers, one whole sequence of one row at a time."""

import torch
from torch.nn import functional as F


def positions_of(backbone, inputs):
    """Positions of the tokens by the stock backbone, or by their number. Shape (axes, batch, length)."""
    if not hasattr(backbone, "get_rope_index"):
        return (inputs["attention_mask"].cumsum(1) - 1)[None]
    grids = {key: value for key, value in inputs.items() if key.endswith(("grid_thw", "grid_ts"))}
    rows = {key: inputs[key] for key in ("mm_token_type_ids", "attention_mask")}
    return backbone.get_rope_index(inputs["input_ids"], **rows, **grids)[0]


def layer_by_layer(model, inputs, target_ids, labels, masked=True):
    """Embeddings and token losses of a stock `…ForConditionalGeneration`. Unmasked, targets see the encoded side too.

    Every call of a layer gets one whole sequence of one row: [encoded side | Bottleneck Tokens], or
    [Bottleneck Tokens | target], of which the target's outputs are kept.
    """
    backbone, language_model = model.model, model.model.language_model
    norm = getattr(language_model, "norm", None) or language_model.embedding_norm
    num_tokens = len(model.config.btok_token_ids)
    positions = positions_of(backbone, inputs)
    embedded = {}
    hook = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embedded.update(kwargs), with_kwargs=True
    )
    backbone(**inputs, use_cache=False)  # for the embeddings of its input, with those of pixels
    hook.remove()

    def run(layer, hidden, places):
        rotations = language_model.rotary_emb(hidden[None], places[:, None].squeeze(0))
        output = layer(hidden[None], position_embeddings=rotations, attention_mask=None, position_ids=None)
        return (output[0] if isinstance(output, tuple) else output)[0]

    embeddings, losses = [], []
    for row, is_real in enumerate(inputs["attention_mask"].bool()):
        prefix, places = embedded["inputs_embeds"][row, is_real], positions[:, row, is_real]
        supervised = (labels[row] != -100).nonzero()[:, 0].tolist()
        count = max(supervised, default=-1) + 1
        target = backbone.get_input_embeddings()(target_ids[row, :count])
        after = (places.max() + 1 + torch.arange(count)).expand(len(places), -1)
        seen = num_tokens if masked else len(prefix)
        for layer in language_model.layers:
            if count:
                both = torch.cat([prefix[-seen:], target])
                target = run(layer, both, torch.cat([places[:, -seen:], after], 1))[seen:]
            prefix = run(layer, prefix, places)
        prefix, target = norm(prefix), norm(target)
        embeddings.append(F.normalize(prefix[-num_tokens:].mean(0), dim=-1))
        states = torch.cat([prefix[-1:], target])
        losses += [F.cross_entropy(model.lm_head(states[t]), labels[row, t]) for t in supervised]
    return torch.stack(embeddings), torch.stack(losses)
