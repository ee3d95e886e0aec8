"""vLLM gives the golden vectors, or refuses. Run by `make test-vllm`; pytest does not collect it by its name."""

import base64
import io
import json
import shutil
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from support import ROOT, tiny
from support.pictures import MEDIA
from support.repositories import edit
from support.vllm_server import CLOSE, PYTHON, VllmServer, environment
from transformers import AutoProcessor, AutoTokenizer

from btok_hf import BTokSentenceTransformer, add_bottleneck_tokens, export_model
from btok_hf.serving.verify_url import request_body, verify_url

DIMENSIONS = [16, 64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def export(folder):
    """Exports by backbone, K, order and suffix, whose golden file has more inputs.

    On CPUs vLLM's attention takes heads of 32, and its Gated DeltaNet heads of 64.
    """

    def build(backbone, num_tokens, order="media_first", suffix=None):
        output = folder / f"{backbone}-{num_tokens}-{order}{'-suffix' if suffix else ''}"
        if not output.exists():
            base = tiny.build(backbone, folder / f"base-{output.name}", head_dim=32, linear_dim=64)
            start = folder / f"start-{output.name}"
            prompts = {"query": "Find it."}
            options = {"order": order, "suffix": suffix, "noise_std": 1.0, "prompts": prompts}
            add_bottleneck_tokens(base, start, num_tokens, **options)
            model = BTokSentenceTransformer(str(start), device="cpu")
            if backbone == "qwen2_5_vl":
                model.config.matryoshka_dimensions = DIMENSIONS
            export_model(model, output)
            add_golden_rows(output, model)
        return output

    return build


def add_golden_rows(repo, model):
    """What an export's own golden inputs may lack: long videos, several images, instructions with images."""
    size = 64 if model.config.model_type.startswith("qwen3") else 56
    rng = np.random.default_rng(0)

    def picture(width, height):
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    def clip(count):
        """More steps in time than a frame has rows of tokens: two."""
        metadata = {"fps": 2.0, "total_num_frames": count, "frames_indices": list(range(count))}
        frames = np.stack([np.asarray(picture(size, size)) for _ in range(count)])
        return {"array": frames, "video_metadata": {**metadata, "duration": count / 2}}

    one, two, three = picture(2 * size, size), picture(size, 2 * size), picture(size, size)
    inputs = {
        "two images": {"image": [one, two], "text": "Both of them."},
        "three images": {"image": [three, two, one]},
        "long video": {"video": clip(24)},
        "40 frames, text": {"video": clip(40), "text": "A clip that goes on."},
        "image and video": {"image": one, "video": clip(12), "text": "Both kinds."},
        "500 bytes": {"text": "On and on. " * 45},
    }
    if model.config.model_type not in tiny.WITH_VIDEO:
        inputs = {name: item for name, item in inputs.items() if "video" not in item}
    golden = json.loads((repo / "golden.json").read_text("utf-8"))
    for name, item in inputs.items():
        for prompt in (None, "Find the same thing."):
            vector = model.encode([item], **({"prompt": prompt} if prompt else {}))[0]
            row = {"name": f"more: {name}{', instruction' * bool(prompt)}", **encoded(item)}
            row |= {"prompt": prompt} if prompt else {}
            golden["inputs"].append({**row, "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()})
    content = [
        {"type": "text", "text": "A"},
        {"type": "image", "image": png(one)},
        {"type": "text", "text": "message."},
    ]
    messages = [{"role": "system", "content": "An instruction."}, {"role": "user", "content": content}]
    decoded = [{**messages[1], "content": [content[0], {"type": "image", "image": one}, content[2]]}]
    vector = model.encode([decoded], prompt="An instruction.")[0]
    golden["inputs"].append(
        {"name": "more: messages", "messages": messages, "embedding": base64.b64encode(vector.tobytes()).decode()}
    )
    (repo / "golden.json").write_text(json.dumps(golden), "utf-8")


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def encoded(item):
    """An input as in a golden file."""
    row = dict(item)
    if "image" in row:
        row["image"] = [png(x) for x in row["image"]] if isinstance(row["image"], list) else png(row["image"])
    if "video" in row:
        row["video"] = {**row["video"], "array": [png(frame) for frame in row["video"]["array"]]}
    return row


def takes_video(repo):
    return json.loads((repo / "config.json").read_text("utf-8"))["model_type"] in tiny.WITH_VIDEO


class Golden:
    """Rows of a golden file by name, and their vectors."""

    def __init__(self, repo):
        self.rows = {row["name"]: row for row in json.loads((repo / "golden.json").read_text("utf-8"))["inputs"]}

    def vector(self, name):
        return np.frombuffer(base64.b64decode(self.rows[name]["embedding"]), "<f4")


def precision(backbone):
    """That of the golden vectors, or the only one of vLLM's Gated DeltaNet on CPUs."""
    return "bfloat16" if backbone == "qwen3_5" else "float32"


SERVED = [
    ("qwen2_vl", 4),
    ("qwen2_5_vl", 4),
    ("qwen3_vl", 4),
    ("qwen3_5", 1),
    ("qwen2_vl", 0),
    ("qwen3_vl", 1, "as_given"),
    ("internvl", 4, "media_first", "In one word:"),
    ("idefics3", 1),
    ("smolvlm", 4),
    ("lfm2_vl", 4),
]


@pytest.fixture(scope="module", params=SERVED, ids=lambda pair: "-".join(map(str, pair)))
def served(request, export, folder):
    """A repository and its server, with vLLM's defaults but for the precision."""
    repo = export(*request.param)
    with VllmServer(repo, folder / f"{repo.name}.log", dtype=precision(request.param[0])) as server:
        yield repo, server


# ---------------------------------------------------------------- the same vectors


def test_golden_vectors(served, capsys):
    repo, server = served
    largest = verify_url(repo, server.url, tolerance=server.close)
    printed = capsys.readouterr().out
    assert largest < server.close and "not reached" not in printed
    assert printed.count(" ok\n") == len(Golden(repo).rows) > 14


def test_golden_vectors_of_recurrent_layers_in_fp32(export, folder, capsys):
    """Finer than bf16 shows: with the recurrence of transformers in the place of vLLM's kernels, nothing differs."""
    plugin = folder / "plugin" / "fp32-0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: fp32\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nfp32 = vllm_fp32:register\n")
    repo = export("qwen3_5", 4)
    path = f"{plugin.parent}:{ROOT / 'tests' / 'support'}"
    with VllmServer(repo, folder / "fp32.log", PYTHONPATH=path) as server:
        assert verify_url(repo, server.url, tolerance=1.0) < server.close
    assert "not reached" not in capsys.readouterr().out


def test_pooling_endpoint(served):
    repo, server = served
    golden = Golden(repo)
    names = ["short text", "image and text", "more: two images, instruction"]
    names += ["more: 40 frames, text"] if takes_video(repo) else []
    for name in names:
        for encoding in ("float", "base64"):
            (vector,) = server.vectors("/pooling", **request_body(golden.rows[name]), encoding_format=encoding)
            assert np.abs(vector - golden.vector(name)).max() < server.close


def content(kind, *files):
    """A message of an image, or of a video of these frames, in base64."""
    url = {"image": "data:image/png;base64,", "video": "data:video/jpeg;base64,"}[kind] + ",".join(files)
    return [{"role": "user", "content": [{"type": f"{kind}_url", f"{kind}_url": {"url": url}}]}]


def special_pictures():
    """A picture of 16 bits, and one of which a quarter has the transparent colour of its file; their files."""
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 2**16, (64, 96), dtype=np.uint16))
    pixels = rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)
    pixels[:32, :48] = (10, 200, 30)
    clear = Image.fromarray(pixels)
    files = []
    for picture, options in ((wide, {}), (clear, {"transparency": (10, 200, 30)})):
        file = io.BytesIO()
        picture.save(file, "png", **options)
        files.append(file.getvalue())
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    assert [picture.mode for picture in pictures] == ["I;16", "RGB"] and pictures[1].has_transparency_data
    return pictures, [base64.b64encode(file).decode() for file in files]


def test_pictures_that_vllm_itself_reads_otherwise(served):
    """It clips 16 bits to 255, and shows the transparent colour of an RGB file."""
    repo, server = served
    model = BTokSentenceTransformer(str(repo), device="cpu")
    for picture, file in zip(*special_pictures()):
        (vector,) = server.vectors(messages=content("image", file))
        assert np.abs(vector - model.encode([picture])[0]).max() < server.close
        if takes_video(repo):
            plain = Image.new("RGB", picture.size, "gray")
            expected = model.encode([{"video": [plain, picture, plain, picture]}])[0]
            (vector,) = server.vectors(messages=content("video", png(plain), file, png(plain), file))
            assert np.abs(vector - expected).max() < server.close


def test_clips_of_one_frame(served):
    """vLLM by itself takes one frame for one."""
    repo, server = served
    if not takes_video(repo):
        pytest.skip("the family takes no videos")
    rng = np.random.default_rng(0)
    frame = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    expected = BTokSentenceTransformer(str(repo), device="cpu").encode([{"video": [frame]}])[0]
    for frames in ([frame], [frame, frame], [frame]):
        (vector,) = server.vectors(messages=content("video", *map(png, frames)))
        assert np.abs(vector - expected).max() < server.close


@pytest.mark.parametrize("name", ["rotated.mp4", "cut.mp4", "n1.mp4"])
def test_files_of_videos_are_read_as_in_this_library(served, name):
    repo, server = served
    if not takes_video(repo):
        pytest.skip("the family takes no videos")
    (expected,) = BTokSentenceTransformer(str(repo), device="cpu").encode([MEDIA / name])
    url = "data:video/mp4;base64," + base64.b64encode((MEDIA / name).read_bytes()).decode()
    content = [{"type": "video_url", "video_url": {"url": url}}]
    (vector,) = server.vectors(messages=[{"role": "user", "content": content}])
    assert np.abs(vector - expected).max() < server.close


def test_images_of_many_sizes(served):
    """Their grids, or tiles, are counted once by vLLM and once by the processor."""
    repo, server = served
    model, rng = BTokSentenceTransformer(str(repo), device="cpu"), np.random.default_rng(0)
    for width in np.exp(rng.uniform(np.log(30), np.log(300), 24)).astype(int):
        height = round(width * np.exp(rng.uniform(-0.7, 0.7)))
        picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(picture)}"}}]
        (vector,) = server.vectors(messages=[{"role": "user", "content": content}])
        assert np.abs(vector - model.encode([picture])[0]).max() < server.close, (width, height)


def test_plain_input_goes_through_the_chat_template(served):
    """So nobody can type a special token there."""
    repo, server = served
    golden = Golden(repo)
    names = ["short text", "other scripts", "more: 500 bytes"]
    typed = "<|btok_0|><|im_end|>" * 2
    for path in ("/v1/embeddings", "/pooling"):
        vectors = server.vectors(path, input=[*(golden.rows[name]["text"] for name in names), typed])
        for name, vector in zip(names, vectors):
            assert np.abs(vector - golden.vector(name)).max() < server.close
        (expected,) = BTokSentenceTransformer(str(repo), device="cpu").encode([{"text": typed}])
        assert np.abs(vectors[-1] - expected).max() < server.close


def test_dimensions_that_the_model_was_trained_for(served):
    repo, server = served
    text, full = "A red bicycle leans against a wall.", Golden(repo).vector("short text")
    status, answer = server.post(input=text, dimensions=16)
    if "matryoshka_dimensions" not in json.loads((repo / "config.json").read_text("utf-8")):
        assert status == 400 and "dimensions" in answer
        return
    (cut,) = server.vectors(input=text, dimensions=16)
    assert np.abs(cut - full[:16] / np.linalg.norm(full[:16])).max() < server.close
    status, answer = server.post(input=text, dimensions=32)
    assert status == 400 and "dimensions" in answer


# ---------------------------------------------------------------- or a refusal


def end_of(repo):
    """Ids of the suffix and the Bottleneck Tokens."""
    row = AutoProcessor.from_pretrained(repo).apply_chat_template([{"role": "user", "content": "."}], tokenize=False)
    return AutoTokenizer.from_pretrained(repo).encode(row.partition(".")[2], add_special_tokens=False)


def refused(repo):
    """Requests whose rows do not end in the tokens or have nothing else, and placeholders without media."""
    config = json.loads((repo / "config.json").read_text("utf-8"))
    tokens, end = config["btok_token_ids"], end_of(repo)
    message = [{"role": "user", "content": "A text of some length."}]
    more = {"without its suffix": {"input": [70, *tokens]}} if end != tokens else {}
    if config["model_type"] == "lfm2_vl":  # with the token that its tokenizer puts before a row
        more = {
            "begun": {"messages": message, "add_special_tokens": True},
            "begun, ids": {"input": [config["text_config"]["bos_token_id"], 70, 71, *tokens]},
        }
    return more | {
        "no tokens": {"input": [70, 71, 72]},
        "tokens not at the end": {"input": [70, *tokens, 72]},
        "tokens twice": {"input": [70, *tokens, *tokens]},
        "one of several": {"input": [[70, *tokens], [70, 71, 72]]},
        "only tokens": {"input": tokens},
        "empty": {"input": ""},
        "no media": {"input": [70, config["image_token_id"], *tokens]},
        "generation prompt": {"messages": message, "add_generation_prompt": True},
        "cut": {"messages": message, "truncate_prompt_tokens": 6, "truncation_side": "right"},
        "cut, plain": {"input": "A text of some length.", "truncate_prompt_tokens": 6},
        "too long": {"input": "far " * 4096},
        "cut to its end": {"input": "A text.", "truncate_prompt_tokens": len(end), "truncation_side": "left"},
        "cut within its end": {"input": "A text.", "truncate_prompt_tokens": len(end) - 1, "truncation_side": "left"},
        "only its end": {"input": end},
    }


def test_rows_without_their_tokens_are_refused_alone(served):
    repo, server = served
    golden = Golden(repo)
    for path in ("/v1/embeddings", "/pooling"):
        for encoding in ("float", "base64"):
            for name, body in refused(repo).items():
                status, answer = server.post(path, **body, encoding_format=encoding)
                assert status == 400 and isinstance(answer, str), (name, answer)
    ids = [*golden.rows["short text"]["text"].encode()]
    assert server.post(input=[*ids, *end_of(repo)])[0] == 200  # the ids of a whole row
    (vector,) = server.vectors(input=golden.rows["short text"]["text"])
    assert np.abs(vector - golden.vector("short text")).max() < server.close and server.is_alive()


def test_text_that_is_cut_at_its_start_keeps_its_tokens(served):
    repo, server = served
    length = len(end_of(repo)) + 8
    model = BTokSentenceTransformer(str(repo), device="cpu", max_seq_length=length)
    (expected,) = model.encode([{"text": "A text of some length."}])
    (vector,) = server.vectors(input="A text of some length.", truncate_prompt_tokens=length, truncation_side="left")
    assert np.abs(vector - expected).max() < server.close


def test_instructions_in_other_requests(served):
    """As docs/serving.md says it."""
    repo, server = served
    golden, text = Golden(repo), "A red bicycle leans against a wall."
    user = {"role": "user", "content": text}
    for body in (
        {"input": text, "input_type": "query"},
        {"input": text, "prompt_name": "query"},
        {"messages": [{"role": "system", "content": ""}, user]},
    ):
        (vector,) = server.vectors(**body)
        assert np.abs(vector - golden.vector("short text")).max() < server.close
    status, answer = server.post("/v2/embed", texts=[text], input_type="query", embedding_types=["float"])
    assert status == 200, answer
    assert np.abs(answer["embeddings"]["float"][0] - golden.vector("prompt query")).max() < server.close


def test_images_are_never_cut(served):
    repo, server = served
    golden = Golden(repo)
    body = request_body(golden.rows["image and text"])
    for side in ("left", "right"):
        (vector,) = server.vectors(**body, truncate_prompt_tokens=-1, truncation_side=side)
        assert np.abs(vector - golden.vector("image and text")).max() < server.close
        # One token less would leave the image, but not the token that stands before it.
        length = server.post(**body)[1]["usage"]["prompt_tokens"]
        for limit in (length - 1, 20):
            status, answer = server.post(**body, truncate_prompt_tokens=limit, truncation_side=side)
            assert status == 400 and f"has {length} tokens, more than {limit} (truncate_prompt_tokens)" in answer


@pytest.mark.parametrize(
    ("backbone", "saved", "longest"),
    [("qwen2_5_vl", 48, 48), ("internvl", 10**30, 4096)],
    ids=["tokenizer", "dynamic"],
)
def test_rows_are_as_long_as_in_this_library(export, folder, backbone, saved, longest):
    """vLLM by itself takes the length from the positions alone, and counts those of InternVL's dynamic RoPE twice."""
    repo = folder / f"length-{backbone}"
    shutil.copytree(export(backbone, 4), repo)
    edit(repo, "tokenizer_config.json", lambda config: config.update(model_max_length=saved))
    if backbone == "internvl":
        scaled = {"rope_type": "dynamic", "factor": 2.0}
        edit(repo, "config.json", lambda config: config["text_config"]["rope_parameters"].update(scaled))
    model, texts = BTokSentenceTransformer(str(repo), device="cpu"), ["far " * longest, "A text."]
    with VllmServer(repo, folder / f"{repo.name}.log") as server:
        with urllib.request.urlopen(f"{server.url}/v1/models") as answer:
            assert json.load(answer)["data"][0]["max_model_len"] == longest
        for encoding in ("float", "base64"):
            assert server.post(input=texts[0], encoding_format=encoding)[0] == 400
        model.max_seq_length = longest
        vectors = server.vectors(input=texts, truncate_prompt_tokens=-1, truncation_side="left")
        assert np.abs(vectors - model.encode([{"text": text} for text in texts])).max() < server.close


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "qwen3_5"])
def test_64_mixed_requests_at_once(export, folder, backbone):
    """A row of eight is refused, and no other is disturbed.

    The cache holds one long row: six blocks of 128 tokens. A row is run in one step or waits, so that nothing is ever
    preempted. With recurrent layers, states are used again by other rows.
    """
    repo = export(backbone, 4)
    golden, bad = Golden(repo), list(refused(repo).values())
    names = sorted(golden.rows)
    options = ["--max-model-len", 768, "--max-num-batched-tokens", 768, "--max-num-seqs", 8]
    options += ["--chat-template-content-format", "string"]  # with which vLLM would join parts, and lose media
    options += ["--num-gpu-blocks-override", 7] if backbone == "qwen2_5_vl" else []  # blocks of 640 tokens
    long = [f"{number} " + "long " * 140 for number in range(4)]
    expected = BTokSentenceTransformer(str(repo), device="cpu").encode([{"text": text} for text in long])
    with VllmServer(repo, folder / "crowded.log", *options, dtype=precision(backbone)) as server:

        def ask(index):
            encoding = ("float", "base64")[index % 2]
            if index % 8 == 7:
                return server.post(**bad[index // 8 % len(bad)], encoding_format=encoding)[0]
            if index % 8 == 3:
                row = index // 8 % 4
                (vector,) = server.vectors(input=long[row], encoding_format=encoding)
                return np.abs(vector - expected[row]).max()
            name = names[index % len(names)]
            (vector,) = server.vectors(**request_body(golden.rows[name]), encoding_format=encoding)
            return np.abs(vector - golden.vector(name)).max()

        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(ask, range(64)))
        assert [answer for answer in answers if answer == 400] == [400] * 8
        assert max(answer for answer in answers if answer != 400) < server.close
        assert server.is_alive() and server.metric("vllm:num_preemptions_total") == 0


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("qwen2_vl", ("--enable-prefix-caching",)),
        ("qwen2_vl", ("--enable-chunked-prefill",)),
        ("qwen2_vl", ("--long-prefill-token-threshold", "16")),
        ("qwen2_vl", ("--kv-offloading-size", "1")),
        ("qwen2_vl", ("--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}')),
        ("qwen2_vl", ("--media-io-kwargs", '{"video": {"num_frames": 4}}')),
        ("qwen3_vl", ("--mm-processor-kwargs", '{"max_pixels": 16384}')),
        ("qwen2_vl", ("--pooler-config", '{"pooling_type": "LAST"}')),
        ("qwen2_vl", ("--pooler-config", '{"enable_chunked_processing": true, "max_embed_len": 9000}')),
        ("qwen2_vl", ("--tokenizer-mode", "slow")),
        ("qwen3_5", ("--enable-prefix-caching", "--dtype", "bfloat16")),
        ("qwen3_5", ("--dtype", "float32")),
    ],
    ids=lambda value: value if isinstance(value, str) else "=".join(value),
)
def test_wrong_settings_are_refused_at_the_start(export, folder, backbone, options):
    server = VllmServer(export(backbone, 4), folder / "settings.log", *options)
    assert not server.has_started() and server.process.returncode
    assert "A model with Bottleneck Tokens needs" in server.log.read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "BTokQwen2VLForEmbedding"),
        (["--trust-remote-code"], "There is no module or parameter named 'embed_tokens'"),
    ],
)
def test_without_the_plugin_vllm_refuses_the_model(export, folder, flags, says):
    """With `--trust-remote-code` vLLM takes its Transformers backend, and stops at the weights."""
    server = VllmServer(export("qwen2_vl", 4), folder / f"no-plugin-{len(flags)}.log", *flags, VLLM_PLUGINS="")
    assert not server.has_started() and server.process.returncode
    assert says in server.log.read_text()


def test_in_another_release_of_vllm_nothing_is_registered():
    code = (
        "import vllm; vllm.__version__ = '0.34.0'\n"
        "from btok_hf.serving.vllm_plugin import register; register()\n"
        "from vllm.renderers.registry import RENDERER_REGISTRY\n"
        "names = [*vllm.ModelRegistry.get_supported_archs(), *RENDERER_REGISTRY.renderers]\n"
        "assert not [name for name in names if 'btok' in name.lower()]\n"
    )
    run = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, env=environment(VLLM_PLUGINS=""))
    assert run.returncode == 0 and "does not support vLLM 0.34.0" in run.stdout + run.stderr, run.stderr[-4000:]


def test_dimensions_of_the_repository_and_frames_that_a_client_chooses(export, folder):
    """`truncate_dim` is the default. `--trust-request-mm-kwargs` does not let clients leave frames out."""
    repo = folder / "cut"
    shutil.copytree(export("qwen3_vl", 4), repo)
    edit(repo, "config_sentence_transformers.json", lambda saved: saved.update(truncate_dim=8))
    golden = Golden(repo)
    full = golden.vector("short text")
    video = request_body(golden.rows["more: 40 frames, text"])
    with VllmServer(repo, folder / "cut.log", "--trust-request-mm-kwargs") as server:
        for given, size in (({}, 8), ({"dimensions": 8}, 8), ({"dimensions": len(full)}, len(full))):
            (vector,) = server.vectors(input=golden.rows["short text"]["text"], **given)
            assert np.abs(vector - full[:size] / np.linalg.norm(full[:size])).max() < server.close
        assert verify_url(repo, server.url) < server.close
        for name, options in (
            ("media_io_kwargs", {"video": {"num_frames": 4}}),
            ("media_io_kwargs", {"video": {"fps": 1}}),
            ("mm_processor_kwargs", {"do_sample_frames": True, "num_frames": 4}),
            ("mm_processor_kwargs", {"max_pixels": 16384}),
        ):
            status, answer = server.post(**video, **{name: options})
            assert status == 400 and name in answer and "would change the vector" in answer
        # Images alone are bounded as in other loaders, and videos are not.
        images = {"mm_processor_kwargs": {"images_kwargs": {"max_pixels": 4096}}}
        (vector,) = server.vectors(**video, **images)
        expected = golden.vector("more: 40 frames, text")[:8]
        assert np.abs(vector - expected / np.linalg.norm(expected)).max() < server.close
        row, small = golden.rows["image and text"], {"max_pixels": 4096}
        picture = {"image": Image.open(io.BytesIO(base64.b64decode(row["image"]))), "text": row["text"]}
        expected = BTokSentenceTransformer(str(repo), device="cpu", processor_kwargs=small).encode([picture])[0]
        (vector,) = server.vectors(**request_body(row), **images)
        assert np.abs(vector - expected / np.linalg.norm(expected)).max() < server.close
        whole = golden.vector("image and text")[:8]
        assert np.abs(vector - whole / np.linalg.norm(whole)).max() > 100 * server.close


def test_offline(export, folder):
    """`LLM.embed`: a text, rows that were rendered by the processor with their media, and refusals."""
    repo = export("qwen2_vl", 4)
    golden = Golden(repo)
    frames = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    np.save(folder / "frames.npy", frames)
    code = (
        "import base64, io, json, sys\nimport numpy as np\nfrom PIL import Image\n"
        "from transformers import AutoProcessor\nfrom vllm import LLM\n"
        "if __name__ == '__main__':\n"
        "    repo, image, text, frames, out = sys.argv[1:]\n"
        "    llm = LLM(repo, runner='pooling', dtype='float32', enforce_eager=True, max_model_len=1024)\n"
        "    def prompt(*kinds):\n"
        "        message = [{'role': 'user', 'content': [{'type': kind, 'text': text} for kind in kinds]}]\n"
        "        return AutoProcessor.from_pretrained(repo).apply_chat_template(message, tokenize=False)\n"
        "    image, frames = Image.open(io.BytesIO(base64.b64decode(image))), np.load(frames)\n"
        "    rows = [text, {'prompt': prompt('image', 'text'), 'multi_modal_data': {'image': image}}]\n"
        "    rows += [{'prompt': prompt('image', 'text'), 'multi_modal_data': {'image': np.asarray(image)}}]\n"
        "    for video in (frames[:1], [frames[0]], [Image.fromarray(frames[0])], [frames[:1]], frames):\n"
        "        rows.append({'prompt': prompt('video'), 'multi_modal_data': {'video': video}})\n"
        "    json.dump([row.outputs.embedding for row in llm.embed(rows)], open(out, 'w'))\n"
        "    more = {'prompt': prompt('image', 'image', 'text'), 'multi_modal_data': {'image': image}}\n"
        "    for row, says in (({'prompt_token_ids': [70, 71]}, 'must end in'), (more, 'more placeholders')):\n"
        "        try: llm.embed([row])\n"
        "        except Exception as error: assert says in str(error), error\n"
        "        else: raise SystemExit(f'embedded, and not refused: {says}')\n"
    )
    script, out = folder / "offline.py", folder / "offline.json"
    script.write_text(code)
    row = golden.rows["image and text"]
    words = [str(PYTHON), str(script), str(repo), row["image"], row["text"], str(folder / "frames.npy"), str(out)]
    run = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    text, pair, array, *once, twice = json.loads(out.read_text())
    assert np.abs(text - golden.vector("short text")).max() < CLOSE["float32"]
    for found in (pair, array):
        assert np.abs(found - golden.vector("image and text")).max() < CLOSE["float32"]
    model = BTokSentenceTransformer(str(repo), device="cpu")
    for found, video in (*((found, frames[:1]) for found in once), (twice, frames)):
        assert np.abs(found - model.encode([{"video": video}])[0]).max() < CLOSE["float32"]
