"""A pytest plugin that lets llama.cpp's own tests of its server run against `altiplano-agent serve`, with models that
can be had without a network: `-p suite_plugin`.

What it changes, and no more:

* no models are downloaded before the first test;
* where a test expects certain words of a model that was downloaded, any text is right, and where it expects how many
  tokens a prompt has there, any number;
* where a request names a model that is not served, which llama-server ignores and we refuse, it names the served one;
  so does a request to the port of all models (tests with a key), which asks for a name;
* a file that a test would download is not there, which the command line then says; pictures are made here;
* where a server is started with `--verbose`, each request asks for the `__verbose` that llama-server adds then;
* each server has a port that is free;
* with ALTIPLANO_SUITE_SHARED, a server that was started alike and runs still is taken instead of another one;
* names of headers are the same in capitals and without, as HTTP has it.

It writes one line for each test to the file that ALTIPLANO_SUITE_RESULTS names.
"""

import json
import os
import re
import socket

import pytest

SERVED = "tinyllama-2"


def pytest_configure(config):
    import utils

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.match_regex = lambda regex, text: bool(text)
    utils.download_file = lambda url, *_: url
    make_pictures()
    start, make, stream = (getattr(utils.ServerProcess, n) for n in ("start", "make_request", "make_stream_request"))

    def known(self, data):
        if self.debug and isinstance(data, dict):
            data = {"verbose": True, **data}
        if isinstance(data, dict) and (isinstance(data.get("model"), str) or self.api_key):
            return {**data, "model": self.model_alias or data.get("model")}
        return data

    def remembered(self, *args, **kwargs):
        global SERVED
        SERVED = self.model_alias or SERVED
        if SHARED is not None:
            return shared(self, lambda: fresh(self, *args, **kwargs))
        return fresh(self, *args, **kwargs)

    def fresh(self, *args, **kwargs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.server_port = free.getsockname()[1]
        return start(self, *args, **kwargs)

    utils.ServerProcess.start = remembered

    def asked(self, method, path, data=None, *args, **kwargs):
        from requests.structures import CaseInsensitiveDict

        response = make(self, method, path, known(self, data), *args, **kwargs)
        response.headers = CaseInsensitiveDict(response.headers)
        return response

    utils.ServerProcess.make_request = asked
    utils.ServerProcess.make_stream_request = lambda self, method, path, data=None, *args, **kwargs: stream(
        self, method, path, known(self, data), *args, **kwargs)
    name_the_served_model()


# Servers that run, by what they were started with; None: each test has its own.
SHARED = {} if "ALTIPLANO_SUITE_SHARED" in os.environ else None

# What tells servers apart, and does not belong to what they are asked to be.
OWN = ("process", "server_port", "ready", "stop", "_log")


def shared(server, start):
    """Takes one that runs, or starts it and keeps it."""
    import utils

    wanted = repr(sorted((name, value) for name, value in vars(server).items() if name not in OWN))
    known = SHARED.get(wanted)
    if known and known.process.poll() is None:
        server.process, server.server_port, server.ready = known.process, known.server_port, True
    else:
        start()
        SHARED[wanted] = server
    # Nobody ends it before the session does.
    server.stop = lambda: None
    utils.server_instances.discard(server)


def pytest_sessionfinish():
    for server in (SHARED or {}).values():
        server.process.terminate()
        server.process.wait()


def make_pictures():
    """A picture that a test fetches from the internet is one of stripes, each address another one."""
    import base64

    import requests

    from png import png

    get = requests.get

    def made(url, *args, **kwargs):
        if not (url.startswith("https://huggingface.co/") and url.endswith(".png")):
            return get(url, *args, **kwargs)
        response = requests.Response()
        response.status_code = 200
        response._content = base64.b64decode(png(len(url) + sum(map(ord, url)) % 7))
        return response

    requests.get = made


def name_the_served_model():
    """OpenAI's client speaks for itself."""
    import openai._base_client as client

    build = client.BaseClient._build_request

    def built(self, options, **kwargs):
        if isinstance(options.json_data, dict) and "model" in options.json_data:
            options.json_data["model"] = SERVED
        return build(self, options, **kwargs)

    client.BaseClient._build_request = built


class AnyCount(int):
    """Equal to every number of tokens, also where a test counts a prompt twice."""

    def __eq__(self, other):
        return isinstance(other, int) and other > 0

    def __ne__(self, other):
        return not self == other

    def __rmul__(self, times):
        return AnyCount(times * int(self))

    __hash__ = int.__hash__


def pytest_collection_modifyitems(items):
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        for name in ("n_prompt", "n_tokens"):
            if isinstance(parameters.get(name), int):
                parameters[name] = AnyCount(parameters[name])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.when != "call" and report.passed:
        return
    text = f"{report.longrepr}\n{report.capstdout}\n{report.capstderr}"
    why = re.findall(r"^not applicable: (.*)$", text, re.MULTILINE)
    if report.skipped:
        result, reason = "skipped", str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else "")
    elif report.passed:
        result, reason = "passed", ""
    elif why:
        result, reason = "not applicable", why[-1]
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        result, reason = "failed", (crash.message.splitlines()[0] if crash and crash.message else "")[:200]
    file, name = item.nodeid.split("::", 1)
    with open(os.environ["ALTIPLANO_SUITE_RESULTS"], "a", encoding="utf-8") as out:
        print(json.dumps([os.path.basename(file), name, result, reason]), file=out)
