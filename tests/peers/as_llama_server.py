#!/usr/bin/env python3
"""Takes llama-server's command line and becomes `altiplano-agent serve` with the same context and slots, and a generated
model in place of the one that is named.

llama.cpp's tests of its server start it by such a command line. Exit code 64: an option or a model has no counterpart
here, which the last line of standard error names; `suite_plugin.py` counts such a test as not applicable.
"""

import json
import os
import sys
import tempfile

# Options that take a value, and what they mean here; None: nothing that this file has to say.
VALUES = {
    "--port": "port", "--host": "host", "--ctx-size": "context", "--parallel": "parallel", "--alias": "alias",
    "--temp": "temperature", "--seed": "seed", "--batch-size": "batch", "--ubatch-size": "micro_batch",
    "--threads": "threads", "--chat-template-file": "template_file", "--chat-template": "template", "-fa": "flash",
    "-ctk": "keys", "-ctv": "values", "--hf-repo": "repository", "--hf-file": "file", "--n-gpu-layers": None,
    "--n-predict": None, "--cache-ram": None, "--pooling": "pooling", "--api-key": "key",
    "--reasoning-format": "reasoning_format", "--model-draft": "draft", "--spec-type": "guesser",
    "--spec-draft-n-min": "guess_least", "--spec-draft-n-max": "guess_most",
}
FLAGS = {
    "--offline", "--cont-batching", "--metrics", "--no-jinja", "--slots", "--no-slots", "--no-ui",
    "--verbose", "--swa-full", "--no-cache-idle-slots", "--embedding", "--reranking",
}

# What stands for a model that is to be downloaded: the end of its name, and the variable that names ours.
MODELS = {
    "test-model-stories260K": "MODEL", "test-model-stories260K-infill": "INFILL",
    "stories15M_MOE/stories15M_MOE-F16.gguf": "MODEL", "tinygemma3-GGUF:Q8_0": "SEES",
    "models/bert-bge-small/ggml-model-f16.gguf": "EMBEDDER",
    "models/jina-reranker-v1-tiny-en/ggml-model-f16.gguf": "RERANKER",
}

# A deployment's least context and batch.
LEAST_CONTEXT, LEAST_BATCH = 256, 32


def not_applicable(what):
    print(f"not applicable: {what}", file=sys.stderr, flush=True)
    sys.exit(64)


def read(arguments):
    """What is asked for, by our names."""
    asked, words = {}, iter(arguments)
    for word in words:
        if word in VALUES:
            asked[VALUES[word]] = next(words)
        elif word in ("--kv-unified", "--jinja"):
            asked[word.split("-")[-1]] = True
        elif word == "--no-mmproj":
            asked["blind"] = True
        elif word == "--lora":
            not_applicable("--lora: an adapter is asked for by its name here, see agent/tests/adapters.rs")
        elif word not in FLAGS:
            not_applicable(word)
    return asked


def model(asked):
    """Path of the model that stands for the one that is asked for."""
    if "repository" not in asked:
        not_applicable("the router: no model")
    name = asked["repository"] + (f"/{asked['file']}" if "file" in asked else "")
    for end, variable in MODELS.items():
        if name.endswith(end):
            return os.environ[f"ALTIPLANO_SUITE_{variable}"]
    if ".gguf" in name and "-of-" in name:
        not_applicable("a model in several files")
    not_applicable("a model that is downloaded, for what it says")


def template(asked):
    if "template_file" in asked:
        if not os.path.exists(asked["template_file"]):
            not_applicable("a template that is not there")
        with open(asked["template_file"], encoding="utf-8") as file:
            return file.read()
    named = asked.get("template")
    if named is None and "jinja" in asked:
        # llama.cpp tells any model of tools; we want a template that has a place for them.
        named = "hermes"
    if named is None:
        return None
    ours = os.path.join(os.environ["ALTIPLANO_SUITE_TEMPLATES"], f"{named}.jinja")
    if os.path.exists(ours):
        with open(ours, encoding="utf-8") as file:
            return file.read()
    return named if " " in named else not_applicable("--chat-template by llama.cpp's name for it")


def deployment(asked):
    """A ModelDeployment in YAML, which JSON is."""
    path = model(asked)
    if asked.get("pooling") == "none":
        not_applicable("--pooling none: a model's pooling is its file's")
    if asked.get("reasoning_format", "auto") not in ("auto", "deepseek"):
        not_applicable("--reasoning-format: each request says its own")
    parallel = int(asked.get("parallel", 4))
    tokens = int(asked.get("context", 4096))
    if "unified" not in asked:
        # llama-server divides its context by its slots.
        tokens //= parallel
    tokens = max(tokens, LEAST_CONTEXT)
    cache = {"q8_0": "Q8_0", "q4_0": "Q4_0", "f16": "F16"}
    context = {"maxTokens": tokens, "minTokens": tokens, "parallel": parallel}
    for name, field in (("keys", "keyCacheType"), ("values", "valueCacheType")):
        if name in asked:
            context[field] = cache.get(asked[name]) or not_applicable(f"a cache of {asked[name]}")
    engine = {"gpu": "Never", "sampling": {}}
    for name, field in (("batch", "batchTokens"), ("micro_batch", "microBatchTokens"), ("threads", "threads")):
        if name in asked:
            engine[field] = max(int(asked[name]), LEAST_BATCH if field != "threads" else 1)
    if "flash" in asked:
        engine["flashAttention"] = asked["flash"].capitalize()
    if "temperature" in asked:
        engine["sampling"]["temperature"] = asked["temperature"]
    if int(asked.get("seed", -1)) >= 0:
        engine["sampling"]["seed"] = int(asked["seed"])
    files = {"source": {"uri": f"file://{path}"}}
    if path == os.environ["ALTIPLANO_SUITE_SEES"] and "blind" not in asked:
        files["projector"] = {"uri": f"file://{os.environ['ALTIPLANO_SUITE_PROJECTOR']}"}
    if "draft" in asked:
        if asked.get("guesser") != "draft-simple":
            not_applicable(f"--spec-type {asked.get('guesser')}")
        files["draft"] = {"uri": f"file://{os.environ['ALTIPLANO_SUITE_DRAFT']}"}
        engine["speculative"] = {"type": "Draft"}
        for name, field in (("guess_least", "minTokens"), ("guess_most", "maxTokens")):
            if name in asked:
                engine["speculative"][field] = int(asked[name])
    spec = {
        "model": files, "servedName": asked["alias"], "context": context,
        "engine": engine, "unload": {"policy": "Never"},
    }
    text = template(asked)
    if text is not None:
        spec["model"]["chatTemplate"] = text
    return {
        "apiVersion": "altiplano.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "suite"}, "spec": spec,
    }


def main():
    asked = read(sys.argv[1:])
    if "AIP_MODE" in os.environ:
        not_applicable("Google Cloud's own paths")
    if "," in asked.get("host", ""):
        not_applicable("several addresses")
    folder = tempfile.mkdtemp(prefix="agent-")
    file = os.path.join(folder, "model.yaml")
    with open(file, "w", encoding="utf-8") as out:
        json.dump(deployment(asked), out)
    port = asked.get("port", "8080")
    agent = os.path.join(os.environ["ALTIPLANO_BIN_DIR"], "altiplano-agent")
    # The model's own port stands for llama-server's; where a key is asked for it is the shared one, which has a token.
    doors = ["--listen", "127.0.0.1:0", "--model-ports", f"{port}-{port}"]
    if "key" in asked:
        token = os.path.join(folder, "token")
        with open(token, "w", encoding="utf-8") as out:
            out.write(asked["key"])
        doors = ["--listen", f"127.0.0.1:{port}", "--shared-token-file", token]
    os.execv(agent, [
        agent, "serve", file, *doors, "--state-dir", os.path.join(folder, "state"), "--drain-seconds", "0",
    ])


main()
