"""The packed condensation forward against its definition: a dense mask, full logits, padded batches."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from support import tiny
from support.gradients import assert_same_gradients
from support.inputs import TARGETS, process, rows, targets
from support.media import image, video
from support.oracle import layer_by_layer, positions_of
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from benchmarks.dense_mask import dense_condensation_mask
from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, condensation
from btok_hf.backbones import FAMILIES, family_of
from btok_hf.condensation import _forward, condense, linear_cross_entropy, reconstruct
from btok_hf.modeling.inputs_btok import last_positions
from btok_hf.packed_attention import PackedLayout


def dense_reference(model, inputs, target_ids, labels, masked=True):
    """Embedding and token losses by definition: padded batch, stock SDPA, dense mask, full logits."""
    num_tokens = len(model.config.btok_token_ids)
    inputs = dict(inputs)
    positions = positions_of(model.model, inputs)
    prefix, ids = inputs.pop("attention_mask"), inputs.pop("input_ids")
    inputs.pop("mm_token_type_ids", None)
    positions = positions * prefix
    after = positions.amax((0, 2))[:, None] + 1 + torch.arange(target_ids.shape[1])
    target = (labels != -100).flip(1).cummax(1).values.flip(1)
    mask = dense_condensation_mask(prefix, target, num_tokens)
    if not masked:
        real = torch.cat([prefix, target], 1).bool()
        mask = (torch.ones_like(mask).tril() & real[:, None, None]) | torch.eye(real.shape[1], dtype=torch.bool)
    output = model.model(
        input_ids=torch.cat([ids, target_ids], 1),
        attention_mask=torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
        position_ids=torch.cat([positions, after.expand(len(positions), -1, -1)], 2).squeeze(0),
        use_cache=False,
        **{key: value for key, value in inputs.items() if key != "second_per_grid_ts"},
    ).last_hidden_state
    columns = last_positions(prefix, num_tokens)
    embeddings = F.normalize(torch.stack([row[c].mean(0) for row, c in zip(output, columns)]), dim=-1)
    losses = []
    for row in range(len(ids)):
        for t in (labels[row] != -100).nonzero().flatten().tolist():
            state = output[row, columns[row, -1]] if t == 0 else output[row, ids.shape[1] + t - 1]
            losses.append(F.cross_entropy(model.lm_head(state), labels[row, t]))
    return embeddings, torch.stack(losses)


def gradients(model, embeddings, losses):
    """Gradients of a scalar in which every embedding entry and token loss has its own weight."""
    torch.manual_seed(1)
    model.zero_grad()
    (embeddings * torch.randn_like(embeddings)).sum().add((losses * torch.rand_like(losses)).sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
@pytest.mark.parametrize("kind", ["text", "image", "uniform", "video"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_equals_dense_mask(repos, backbone, kind, side):
    if kind == "video" and backbone not in tiny.WITH_VIDEO:
        pytest.skip("It takes no video")
    processor = AutoProcessor.from_pretrained(repos[backbone])
    inputs = process(processor, rows(kind), side)
    target_ids, labels = targets(processor)
    # A mask over attention says nothing to recurrent layers.
    reference = layer_by_layer if FAMILIES[backbone].mixers else dense_reference
    for masked in (True, False):
        model = AutoModelForImageTextToText.from_pretrained(repos[backbone])
        expected = reference(model, inputs, target_ids, labels, masked)
        expected_gradients = gradients(model, *expected)
        model = AutoModelForImageTextToText.from_pretrained(repos[backbone])
        actual = condense(model, inputs, target_ids, labels, condensation_mask=masked)
        assert len(actual.token_losses) == sum(len(text) + 1 for text in TARGETS if text)
        torch.testing.assert_close(actual.embeddings, expected[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(actual.token_losses, expected[1], atol=2e-5, rtol=1e-5)
        assert_same_gradients(gradients(model, *actual), expected_gradients)


@pytest.mark.parametrize("backbone", ["idefics3", "smolvlm"])
def test_empty_tiles_are_dropped(repos, backbone):
    """A row without images, of a batch with images, has only the tiles that it was padded with."""
    processor, model = (
        AutoProcessor.from_pretrained(repos[backbone]),
        AutoModel.from_pretrained(repos[backbone]).eval(),
    )
    inputs, tiles = process(processor, rows("image")), []
    model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: tiles.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    with torch.no_grad():
        expected = condense(model, inputs).embeddings
        alone = condense(model, {key: value[1:2] for key, value in inputs.items()}).embeddings
    assert tiles == [int(inputs["pixel_attention_mask"].flatten(2).any(2).sum())]  # and none in the second call
    torch.testing.assert_close(alone, expected[1:2], atol=2e-6, rtol=0)


@pytest.mark.parametrize("backbone", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("masked", [True, False])
def test_the_dense_mask_and_layer_by_layer_are_the_same_definition(repos, backbone, masked):
    processor = AutoProcessor.from_pretrained(repos[backbone])
    inputs, (target_ids, labels) = process(processor, rows("image"), "left"), targets(processor)
    model = AutoModelForImageTextToText.from_pretrained(repos[backbone])
    with torch.no_grad():
        expected = dense_reference(model, inputs, target_ids, labels, masked)
        actual = layer_by_layer(model, inputs, target_ids, labels, masked)
    torch.testing.assert_close(actual[0], expected[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(actual[1], expected[1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(either, reentrant):
    processor = AutoProcessor.from_pretrained(either)
    inputs, (target_ids, labels) = process(processor, rows("image")), targets(processor)
    results = []
    for checkpointing in (False, True):
        model = AutoModelForImageTextToText.from_pretrained(either).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        output = condense(model, inputs, target_ids, labels)
        results.append((output, gradients(model, *output)))
    torch.testing.assert_close(results[1][0].token_losses, results[0][0].token_losses, atol=0, rtol=0)
    assert_same_gradients(results[1][1], results[0][1], 1e-6)


def test_bottleneck_tokens_are_appended_where_they_are_absent(repo):
    processor = AutoProcessor.from_pretrained(repo)
    model = AutoModelForImageTextToText.from_pretrained(repo)
    inputs, (target_ids, labels) = process(processor, rows("image")), targets(processor)
    expected = condense(model, inputs, target_ids, labels)
    cut = dict(inputs)
    columns = last_positions(inputs["attention_mask"], 4)
    cut["attention_mask"] = inputs["attention_mask"].scatter(1, columns, 0)
    actual = condense(model, cut, target_ids, labels)
    torch.testing.assert_close(actual.embeddings, expected.embeddings, atol=1e-6, rtol=0)
    torch.testing.assert_close(actual.token_losses, expected.token_losses, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_changing_the_query_moves_no_target_if_the_bottleneck_is_held(repos, backbone):
    """With the Bottleneck Tokens' states held fixed in every layer, targets do not change in a single bit."""
    moved = {masked: leak(repos[backbone], masked) for masked in (True, False)}
    print(f"{backbone}: {moved[True]} nats with the mask, {moved[False]:.2} without")  # for docs/method.md
    assert moved[True] == 0 and moved[False] > 1e-2


def only_attention(backbone):
    """A context in which the rule holds for attention alone."""
    return patch.dict(FAMILIES, {backbone: replace(FAMILIES[backbone], mixers=())})


def test_a_mask_over_attention_alone_leaks_through_a_recurrent_state(repos):
    """Why the rule is said about every token mixer: the state of Gated DeltaNet carries the query past the mask."""
    with only_attention("qwen3_5"):
        moved = leak(repos["qwen3_5"])
    print(f"qwen3_5: {moved:.2} nats with a mask over attention alone")
    assert moved > 1e-2


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 4])
def test_a_mask_over_attention_alone_leaks_through_a_convolution_longer_than_the_tokens(bases, tmp_path, num_tokens):
    """A convolution over three positions ends within two tokens. With fewer, it reaches past them."""
    repo = add_bottleneck_tokens(bases["lfm2_vl"], tmp_path / "repo", num_tokens=num_tokens, noise_std=1.0)
    with only_attention("lfm2_vl"):
        moved = leak(repo)
    print(f"lfm2_vl, K = {num_tokens}: {moved:.2} nats with a mask over attention alone")
    assert leak(repo) == 0 and (moved == 0 if num_tokens >= 2 else moved > 1e-2)
    processor, model = AutoProcessor.from_pretrained(repo), AutoModelForImageTextToText.from_pretrained(repo)
    inputs, (target_ids, labels) = process(processor, rows("image"), "left"), targets(processor)
    with torch.no_grad():
        expected, actual = (f(model, inputs, target_ids, labels) for f in (layer_by_layer, condense))
    torch.testing.assert_close(actual[0], expected[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(actual[1], expected[1], atol=2e-5, rtol=1e-5)


def leak(repo, masked=True):
    """The largest change of a target's loss when the query changes and the Bottleneck Tokens' states do not."""
    processor, model = AutoProcessor.from_pretrained(repo), AutoModelForImageTextToText.from_pretrained(repo).eval()
    target_ids, labels = targets(processor, ["target text"])
    states, losses = {}, []
    for query in ("find the red car", "count my old hat"):  # the same number of bytes: positions stay
        inputs = process(processor, [[{"role": "user", "content": query}]])
        end = inputs["input_ids"].shape[1]
        start = end - len(model.config.btok_token_ids)

        def hold(layer, args, start=start, end=end):
            hidden = args[0].clone()
            hidden[0, start:end] = states.setdefault(layer, hidden[0, start:end].clone())
            return (hidden, *args[1:])

        layers = family_of(model.config).language_model(model.model).layers
        hooks = [layer.register_forward_pre_hook(hold) for layer in layers]
        with torch.no_grad():
            # The first loss is read from a Bottleneck Token.
            losses.append(condense(model, inputs, target_ids, labels, condensation_mask=masked).token_losses[1:])
        for hook in hooks:
            hook.remove()
    return (losses[0] - losses[1]).abs().max().item()


def test_query_reaches_the_target_only_through_the_bottleneck(either):
    """If the Bottleneck Tokens cannot see the query, nothing of it reaches the target."""
    processor = AutoProcessor.from_pretrained(either)
    model = AutoModelForImageTextToText.from_pretrained(either).eval()
    target_ids, labels = targets(processor, ["target text"])

    def losses(query, blind, condensation_mask=True):
        inputs = process(processor, [[{"role": "user", "content": query}]])
        attend = model_attention_without_query(4) if blind else None
        with torch.no_grad(), attend or torch.no_grad():
            return condense(model, inputs, target_ids, labels, condensation_mask=condensation_mask).token_losses

    one, other = "find the red car", "count my old hat"  # the same number of bytes: positions stay
    assert (losses(one, False) - losses(other, False)).abs().max() > 1e-1
    torch.testing.assert_close(losses(one, True), losses(other, True), atol=1e-4, rtol=0)
    assert (losses(one, True, False) - losses(other, True, False)).abs().max() > 1e-1  # without the mask it leaks


def model_attention_without_query(num_tokens):
    """A context in which the Bottleneck Tokens see only themselves. Nothing else changes."""

    class Blind(PackedLayout):
        def __init__(self, segments, device, **kwargs):
            blinded = []
            for query_start, queries, key_start, keys in segments:
                prefix = queries - num_tokens if len(segments) == 2 and query_start == 0 else 0
                if prefix:  # the prefix segment splits in two: query tokens, and Bottleneck Tokens on their own
                    blinded.append((query_start, prefix, key_start, prefix))
                    blinded.append((query_start + prefix, num_tokens, key_start + prefix, num_tokens))
                else:
                    blinded.append((query_start, queries, key_start, keys))
            super().__init__(blinded, device, **kwargs)

    return patch("btok_hf.condensation.PackedLayout", Blind)


def test_target_continues_at_the_maximum_position(repos):
    """A video can have positions beyond the last text token's. The target starts after the largest position."""
    processor = AutoProcessor.from_pretrained(repos["qwen2_5_vl"])
    model = AutoModel.from_pretrained(repos["qwen2_5_vl"])
    inputs = process(processor, [[{"role": "user", "content": [{"type": "video", "video": video(12, 28)["array"]}]}]])
    inputs["second_per_grid_ts"] = torch.tensor([1.0])  # slow frames lie far apart in time
    target_ids, labels = targets(processor, ["t"])
    seen = {}
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(positions=kwargs["position_ids"]), with_kwargs=True
    )
    condense(model, inputs, target_ids, labels)
    prefix = inputs["input_ids"].shape[1]
    positions = seen["positions"][:, 0]
    assert positions[:, prefix].eq(positions[:, :prefix].max() + 1).all()
    assert positions[0, :prefix].max() > positions[0, prefix - 1]  # the case is not trivial


class Looks(TorchDispatchMode):
    """Counts the operations whose result the host waits for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "masked_select"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("flash", [False, True])
def test_forward_of_packed_text_looks_at_no_value(either, flash, monkeypatch):
    """On a GPU each look waits for all queued kernels, so the layout must be complete before the forward."""
    processor, model = AutoProcessor.from_pretrained(either), AutoModel.from_pretrained(either).eval()
    if flash:  # the kernel itself runs on GPUs only
        model.bfloat16()
        monkeypatch.setattr("btok_hf.packed_attention._has_flash", lambda device, dtype: dtype == torch.bfloat16)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, *args, **kwargs: query)
    inputs = process(processor, rows("text"))
    with torch.no_grad(), Looks() as whole:
        condense(model, inputs)
    looks = []

    def watched(backbone, packed):
        with Looks() as mode:
            hidden = _forward(backbone, packed)
        looks.append(mode.count)
        return hidden

    with torch.no_grad(), patch("btok_hf.condensation._forward", watched):
        condense(model, inputs)
    assert looks == [0] and whole.count > 0


@pytest.mark.parametrize("rows", [1, 256, 300])
def test_linear_cross_entropy_equals_full_logits(rows):
    hidden, weight = torch.randn(rows, 16, dtype=torch.double), torch.randn(50, 16, dtype=torch.double)
    labels, scale = torch.randint(50, (rows,)), torch.rand(rows)
    gradients = []
    for function in (linear_cross_entropy, lambda h, w, y: F.cross_entropy(h @ w.T, y, reduction="none")):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        losses = function(h, w, labels)
        (losses * scale).sum().backward()
        gradients.append((losses.float(), h.grad, w.grad))
    for actual, expected in zip(*gradients):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_untied_head_is_used_and_its_absence_refused(tmp_path):
    import btok_hf

    repo = btok_hf.add_bottleneck_tokens(tiny.build("qwen2_vl", tmp_path / "base", tied=False), tmp_path / "repo")
    processor = AutoProcessor.from_pretrained(repo)
    inputs, (target_ids, labels) = process(processor, rows("text")), targets(processor)
    model = AutoModelForImageTextToText.from_pretrained(repo)
    expected = dense_reference(model, inputs, target_ids, labels)
    torch.testing.assert_close(condense(model, inputs, target_ids, labels)[1], expected[1], atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no language-modelling head"):
        condense(AutoModel.from_pretrained(repo), inputs, target_ids, labels)


def test_wrong_shapes_are_refused(repo):
    processor = AutoProcessor.from_pretrained(repo)
    inputs, (target_ids, labels) = process(processor, rows("text")), targets(processor)
    with pytest.raises(ValueError, match=r"must both have shape \(batch=4"):
        condense(AutoModel.from_pretrained(repo), inputs, target_ids, labels[:, 1:])


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_decoding_reads_the_input_once(repos, backbone, monkeypatch):
    """What it keeps of the input gives the tokens that the whole input gives."""
    model = BTokSentenceTransformer(repos[backbone], device="cpu")
    with torch.no_grad():  # rows of a random model differ little
        for parameter in model.transformer.model.parameters():
            parameter *= 2
    inputs = model.preprocess(["a b", "a longer text of several words", {"image": image(56, 84), "text": "c"}])
    text = model.transformer.config.get_text_config()
    head = torch.randn(text.vocab_size, text.hidden_size, generator=torch.Generator().manual_seed(0))  # no repetitions
    lengths, forward = [], condensation._forward

    def counted(backbone, packed, cache=None):
        lengths.append(packed["input_ids"].shape[1])
        return forward(backbone, packed, cache)

    monkeypatch.setattr(condensation, "_forward", counted)

    def decoded():
        return reconstruct(model.transformer.model, inputs, [5, 6], -1, max_new_tokens=6, lm_head=head)

    found = decoded()
    mixes = bool(family_of(model.transformer.config).mixers)
    assert len(lengths) == (6 if mixes else 1)
    monkeypatch.setattr(condensation, "_rows_of", lambda cache, columns: None)
    assert decoded() == found and all(len(set(row)) > 2 for row in found)
    assert mixes or len({tuple(row) for row in found}) == 3


def test_reconstruction_is_the_likeliest_token_by_token(repo):
    """Each decoded token has the lowest loss of the whole vocabulary in the forward that training uses."""
    model, processor = AutoModelForImageTextToText.from_pretrained(repo), AutoProcessor.from_pretrained(repo)
    inputs = process(processor, rows("image"), "left")
    prompt = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    decoded = reconstruct(model, inputs, prompt, stop_id=-1, max_new_tokens=3)
    never = {model.config.image_token_id, model.config.video_token_id, *model.config.btok_token_ids}
    vocabulary = torch.tensor([token for token in range(320) if token not in never])
    for row, tokens in enumerate(decoded):
        alone = process(processor, [rows("image")[row]] * len(vocabulary))
        for step, token in enumerate(tokens):
            ids = torch.tensor(prompt + tokens[:step]).expand(len(vocabulary), -1)
            ids = torch.cat([ids, vocabulary[:, None]], 1)
            labels = torch.full_like(ids, -100)
            labels[:, -1] = vocabulary
            losses = condense(model, alone, ids, labels).token_losses
            assert token not in never and losses[vocabulary == token] <= losses.min() + 1e-5
    # Bottleneck Tokens are left out, also where they would be the likeliest.
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.btok_token_ids[0]] += 50 * torch.sign(
            model.lm_head.weight[decoded[0][0]]
        )
    again = reconstruct(model, inputs, prompt, stop_id=-1, max_new_tokens=3)
    assert not never & {token for tokens in again for token in tokens}
    model = AutoModelForImageTextToText.from_pretrained(repo)
    # A row ends before its stop token. The other rows go on.
    stop = decoded[0][1]
    stopped = reconstruct(model, inputs, prompt, stop, max_new_tokens=3)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in decoded]
    wrapped = BTokSentenceTransformer(repo, device="cpu")
    contents = [[part.get("image", part.get("text")) for part in message[0]["content"]] for message in rows("image")]
    inputs = [contents[1][0], {"image": contents[3][0]}]
    texts = wrapped.reconstruct(inputs, max_new_tokens=3)
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for text, tokens in zip(texts, (decoded[1], decoded[3])):
        assert text == tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)
