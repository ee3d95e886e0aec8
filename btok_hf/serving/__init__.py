"""Serving: `btok serve`, and the plugin for vLLM. Files that need an engine are imported only by it or by `btok`."""

KEY = "BTOK_API_KEY"  # of a server and its clients; not a flag, because other users of the machine can see flags
SETTINGS = "config_sentence_transformers.json"  # of a repository: prompts, the default prompt, truncate_dim
# The name of the tokenizer mode of vLLM, which chooses the tokenizer and the renderer, and of the video backend.
MODE = "btok"
