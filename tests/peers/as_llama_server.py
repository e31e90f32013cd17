#!/usr/bin/env python3
"""Takes llama-server's command line and becomes `altiplano-agent serve` with the same model, context and slots.

llama.cpp's tests of its server start it by such a command line. Exit code 64: an option has no counterpart here, which
the last line of standard error names; `suite_plugin.py` counts such a test as not applicable.
"""

import json
import os
import sys
import tempfile

# Options that take a value, and what they mean here; None: nothing that this file has to say.
VALUES = {
    "--port": "port", "--host": "host", "--ctx-size": "context", "--parallel": "parallel", "--alias": "alias",
    "--temp": "temperature", "--seed": "seed", "--batch-size": "batch", "--ubatch-size": "micro_batch",
    "--threads": "threads", "--chat-template-file": "template_file", "-fa": "flash", "-ctk": "keys", "-ctv": "values",
    "--hf-repo": None, "--hf-file": None, "--n-gpu-layers": None, "--n-predict": None, "--cache-ram": None,
    "--pooling": "pooling",
}
FLAGS = {
    "--offline", "--cont-batching", "--metrics", "--jinja", "--no-jinja", "--no-slots", "--no-ui", "--kv-unified",
    "--no-mmproj", "--verbose", "--swa-full", "--no-cache-idle-slots",
}


def not_applicable(what):
    print(f"not applicable: {what}", file=sys.stderr, flush=True)
    sys.exit(64)


def read(arguments):
    """What is asked for, by our names."""
    asked, words = {}, iter(arguments)
    for word in words:
        if word in VALUES:
            asked[VALUES[word]] = next(words)
        elif word in ("--embedding", "--reranking"):
            asked["embedder"] = word
        elif word not in FLAGS:
            not_applicable(word)
    return asked


def deployment(asked):
    """A ModelDeployment in YAML, which JSON is."""
    model = os.environ["ALTIPLANO_SUITE_MODEL"]
    if "embedder" in asked:
        model = os.environ.get("ALTIPLANO_SUITE_EMBEDDER") or not_applicable(asked["embedder"])
    if "alias" not in asked:
        not_applicable("the router: no model")
    parallel = int(asked.get("parallel", 4))
    # llama-server divides its context by its slots.
    tokens = int(asked.get("context", 4096)) // parallel
    cache = {"q8_0": "Q8_0", "q4_0": "Q4_0", "f16": "F16"}
    context = {"maxTokens": tokens, "minTokens": tokens, "parallel": parallel}
    for name, field in (("keys", "keyCacheType"), ("values", "valueCacheType")):
        if name in asked:
            context[field] = cache.get(asked[name]) or not_applicable(f"a cache of {asked[name]}")
    engine = {"gpu": "Never"}
    for name, field in (("batch", "batchTokens"), ("micro_batch", "microBatchTokens"), ("threads", "threads")):
        if name in asked:
            engine[field] = int(asked[name])
    if "flash" in asked:
        engine["flashAttention"] = asked["flash"].capitalize()
    if "temperature" in asked:
        engine["sampling"] = {"temperature": asked["temperature"]}
    spec = {
        "model": {"source": {"uri": f"file://{model}"}}, "servedName": asked["alias"], "context": context,
        "engine": engine, "unload": {"policy": "Never"},
    }
    if "template_file" in asked:
        with open(asked["template_file"], encoding="utf-8") as file:
            spec["model"]["chatTemplate"] = file.read()
    return {
        "apiVersion": "altiplano.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "suite"}, "spec": spec,
    }


def main():
    asked = read(sys.argv[1:])
    if "," in asked.get("host", ""):
        not_applicable("several addresses")
    folder = tempfile.mkdtemp(prefix="altiplano-suite-")
    file = os.path.join(folder, "model.yaml")
    with open(file, "w", encoding="utf-8") as out:
        json.dump(deployment(asked), out)
    port = asked.get("port", "8080")
    agent = os.path.join(os.environ["ALTIPLANO_BIN_DIR"], "altiplano-agent")
    # The model's own port stands for llama-server's; the shared one is anywhere.
    os.execv(agent, [
        agent, "serve", file, "--listen", "127.0.0.1:0", "--model-ports", f"{port}-{port}",
        "--state-dir", os.path.join(folder, "state"), "--drain-seconds", "0",
    ])


main()
