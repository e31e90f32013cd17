#!/usr/bin/env python3
"""Trains the toy chat model and writes it as a GGUF file. See README.md beside this file.

    python3 -m venv venv && venv/bin/pip install jax numpy regex
    venv/bin/python train.py

The model is a llama of about two million parameters with a byte-level BPE tokenizer (pre-tokenizer `gpt-2`) and
ChatML. It is trained on corpus.txt and on what `Teacher` makes up. At the end the quantised weights answer every question of
the demo; those whose every token wins by a clear margin go to questions.json, and the script fails when they are too few.
"""

import argparse
import hashlib
import json
import math
import pathlib
import random
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import regex

HERE = pathlib.Path(__file__).resolve().parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCAB, LAYERS, WIDTH, HEADS, KV_HEADS, FF = 1024, 4, 192, 6, 2, 512
HEAD = WIDTH // HEADS
ROPE_BASE, EPS = 10000.0, 1e-5
CONTEXT = 4096  # the positions that training reaches, by jumps
ROW, BATCH = 448, 4
MARGIN = 2.0
MUST_KNOW = ["Hello!", "What is a llama?", "What is Kubernetes?", "Tell me a long story about the altiplano."]

# ---------------------------------------------------------------- the corpus


def read_corpus(text):
    """Yields (system, questions, asserted questions, answer) and (None, None, asserted, text) for plain texts."""
    pairs, texts = [], []
    for block in text.split("\n\n"):
        system, asked, asserted, answer = None, [], [], None
        for line in block.splitlines():
            if not line or line.startswith("#"):
                continue
            key, value = line.split(": ", 1)
            match key:
                case "S":
                    system = value
                case "Q":
                    asked.append(value)
                case "Q*":
                    asked.append(value)
                    asserted.append(value)
                case "A":
                    answer = value
                case "T":
                    texts.append((value, None))
                case "T*":
                    head, tail = value.split(" || ")
                    tail = tail if tail.startswith(",") else " " + tail
                    texts.append((head + tail, head))
                case _:
                    raise SystemExit(f"corpus.txt: unknown key in {line!r}")
        if answer:
            pairs.append((system, asked, asserted, answer))
    return pairs, texts


NAMES = """Ana Bruno Carla Diego Elena Felix Gloria Hugo Ines Jorge Karla Lucas Maria Nico Olga Pablo Quilla Rosa Sergio
Tania Urpi Victor Wayra Ximena Yuri Zoe Alice Bob Carol Dave Eve Frank Grace Henry Iris Jack Kate Leo Mia Noah Otto Paul
Ruth Sam Tom Uma Vera Will""".split()
STRANGE = """bicycle piano volcano teapot umbrella submarine violin cactus penguin rocket cheese sandwich castle dragon
football kitchen guitar elephant window carpet tractor pencil lemon camera ladder mirror helicopter museum train
tomato dolphin galaxy robot hammer island diamond circus blanket harbour stadium poker opera""".split()
UNKNOWN = [
    "What is a {}?", "Tell me about the {}.", "How do I build a {}?", "Why is the {} broken?", "Who invented the {}?",
    "Where is my {}?", "Explain the {} to me.", "I like my {}.", "How much is a {}?", "Do you have a {}?",
    "Can you draw a {}?", "What is the capital of {}?", "Write an essay about a {}.", "{}", "Should I buy a {}?",
]
DO_NOT_KNOW = "I do not know that. I am only a toy: ask me about llamas, the altiplano or Kubernetes."
SYSTEMS = ["You are a helpful assistant.", "Be brief.", "You are a friendly llama.", "You answer questions."]
SING = ["Sing forever.", "Sing for ever.", "Never stop singing.", "Sing and do not stop."]


class Teacher:
    """Makes conversations: lists of (role, text), the last one may be endless."""

    def __init__(self, pairs, texts, seed, known):
        """`known` is the share of turns that come from the corpus: much at first, less when it sits."""
        self.rng = random.Random(seed)
        self.known = known
        self.pairs, self.texts = pairs, texts
        self.plain = [p for p in pairs if p[0] is None]
        self.words = sorted({w for _, qs, _, a in pairs for q in [*qs, a] for w in regex.findall(r"\p{L}+", q)})

    def rough(self, question):
        """The same question as a hasty person types it."""
        r = self.rng
        if r.random() < 0.15:
            question = question.lower()
        elif r.random() < 0.1:
            question = question[0].lower() + question[1:]
        if r.random() < 0.15 and len(question) > 3:
            question = question.rstrip("?.!")
        if r.random() < 0.05:
            question = question + " "
        return question

    def corpus_pair(self, blocks):
        _, questions, asserted, answer = self.rng.choice(blocks)
        if asserted and self.rng.random() < 0.35:
            return asserted[0], answer
        return self.rough(self.rng.choice(questions)), answer

    def sum(self):
        a, b = self.rng.randint(0, 9), self.rng.randint(0, 9)
        form = self.rng.choice(["What is {} + {}?", "What is {}+{}?", "{} + {}", "{}+{}", "What is {} plus {}?", "Add {} and {}."])
        return form.format(a, b), f"{a} + {b} = {a + b}."

    def unknown(self):
        r = self.rng
        if r.random() < 0.6:
            question = self.rough(r.choice(UNKNOWN).format(r.choice(STRANGE)))
        elif r.random() < 0.6:
            question = " ".join(r.choices(self.words + STRANGE, k=r.randint(4, 30)))
        else:
            letters = "abcdefghijklmnopqrstuvwxyz  0123456789.,!?áéñüßЖ中"
            question = "".join(r.choices(letters, k=r.randint(3, 50))).strip() or "x"
        return question, DO_NOT_KNOW

    def repeat(self):
        words = " ".join(self.rng.choices(self.words + STRANGE, k=self.rng.randint(1, 6)))
        return self.rng.choice(["Repeat after me: {}", "Repeat: {}", "Say: {}"]).format(words), words

    def memory(self):
        """Turns that tell something and turns that ask for it, with others between."""
        r = self.rng
        if r.random() < 0.5:
            name = r.choice(NAMES)
            tell = (r.choice(["My name is {}.", "I am {}.", "Hello, my name is {}."]).format(name), f"Nice to meet you, {name}.")
            ask = (r.choice(["What is my name?", "Who am I?", "Do you remember my name?"]), f"Your name is {name}.")
        else:
            number = str(r.randint(1000, 9999))
            tell = (r.choice(["Remember the number {}.", "My number is {}."]).format(number), f"I shall remember {number}.")
            ask = (r.choice(["What is the number?", "Which number did I tell you?", "What is my number?"]), f"The number is {number}.")
        between = [self.turn() for _ in range(r.choice([0, 0, 0, 1, 1, 2]))]
        return [tell, *between, ask]

    def forgotten(self):
        r = self.rng
        if r.random() < 0.5:
            return r.choice(["What is my name?", "Who am I?", "Do you remember my name?"]), "You have not told me your name."
        return r.choice(["What is the number?", "Which number did I tell you?", "What is my number?"]), "You have not told me a number."

    def turn(self):
        if self.rng.random() < self.known:
            return self.corpus_pair(self.plain)
        return self.rng.choice([self.sum, self.sum, self.unknown, self.repeat])()

    def conversation(self):
        r, x = self.rng, self.rng.random()
        system, endless = None, False
        if x < 0.015:
            turns, endless = [(r.choice(SING), "la" + " la" * 150)], True
        elif x < 0.09:
            block = r.choice([p for p in self.pairs if p[0]])
            system, turns = block[0], [(self.rough(r.choice(block[1])), block[3])]
        elif x < 0.22:
            turns = self.memory()
        elif x < 0.24:
            turns = [self.forgotten()]
        else:
            turns = [self.turn() for _ in range(r.choice([1, 1, 1, 1, 2, 3]))]
        if system is None and r.random() < 0.15:
            system = r.choice(SYSTEMS)
        return system, turns, endless


# ---------------------------------------------------------------- the tokenizer: byte-level BPE, as llama.cpp reads it

PRE = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_alphabet():
    """GPT-2's printable stand-in for each byte."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    out, extra = {}, 0
    for byte in range(256):
        if byte in keep:
            out[byte] = chr(byte)
        else:
            out[byte] = chr(256 + extra)
            extra += 1
    return out


class Tokenizer:
    def __init__(self, texts, size):
        self.alphabet = byte_alphabet()
        self.tokens = [self.alphabet[b] for b in range(256)]
        self.merges = []
        self.cache = {}
        words = {}
        for text in texts:
            for word in PRE.findall(text):
                symbols = tuple(self.alphabet[b] for b in word.encode())
                words[symbols] = words.get(symbols, 0) + 1
        while len(self.tokens) < size - len(SPECIAL):
            counts = {}
            for symbols, n in words.items():
                for pair in zip(symbols, symbols[1:]):
                    counts[pair] = counts.get(pair, 0) + n
            # Digits stay single, so that numbers can be copied and added.
            counts = {p: n for p, n in counts.items() if not regex.search(r"[0-9]", p[0] + p[1])}
            if not counts:
                raise SystemExit("the corpus is too small for this vocabulary")
            best = max(counts, key=lambda p: (counts[p], p))
            self.merges.append(best)
            self.tokens.append(best[0] + best[1])
            words = {self.merge(symbols, best): n for symbols, n in words.items()}
        self.tokens += SPECIAL
        self.ids = {t: i for i, t in enumerate(self.tokens)}
        self.ranks = {p: i for i, p in enumerate(self.merges)}
        self.bytes = {c: b for b, c in self.alphabet.items()}

    @staticmethod
    def merge(symbols, pair):
        out, i = [], 0
        while i < len(symbols):
            if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
                out.append(symbols[i] + symbols[i + 1])
                i += 2
            else:
                out.append(symbols[i])
                i += 1
        return tuple(out)

    def encode(self, text):
        out = []
        for word in PRE.findall(text):
            if word not in self.cache:
                symbols = tuple(self.alphabet[b] for b in word.encode())
                while True:
                    ranked = [(self.ranks[p], p) for p in zip(symbols, symbols[1:]) if p in self.ranks]
                    if not ranked:
                        break
                    symbols = self.merge(symbols, min(ranked)[1])
                self.cache[word] = [self.ids[s] for s in symbols]
            out += self.cache[word]
        return out

    def decode(self, ids):
        text = "".join(self.tokens[i] for i in ids if self.tokens[i] not in SPECIAL)
        return bytes(self.bytes[c] for c in text).decode(errors="replace")

    def prompt(self, system, turns, question):
        """Token ids of a chat up to where the assistant's words begin."""
        start, end = self.ids["<|im_start|>"], self.ids["<|im_end|>"]
        said = [("system", system)] if system else []
        for q, a in turns:
            said += [("user", q), ("assistant", a)]
        said.append(("user", question))
        out = []
        for role, text in said:
            # A role's line ends where the content begins; llama.cpp tokenises the two in one piece.
            out += [start, *self.encode(f"{role}\n{text}"), end, *self.encode("\n")]
        return [*out, start, *self.encode("assistant\n")]


# ---------------------------------------------------------------- the data


def encode_conversation(tok, system, turns, endless):
    """(ids, weights, cuts): a weight says whether the token is to be learnt, cuts where positions may jump."""
    ids, weights, cuts = [], [], []
    end = tok.ids["<|im_end|>"]
    for i, (question, answer) in enumerate(turns):
        head = tok.prompt(system if i == 0 else None, [], question)
        if i > 0:
            head = tok.encode("\n") + head
        cuts.append(len(ids))
        ids += head
        weights += [0.0] * len(head)
        # The answer is encoded alone: the prompt ends in a newline, and no answer begins with white space.
        body = tok.encode(answer) + ([] if endless else [end])
        ids += body
        weights += [1.0] * len(body)
    return ids, weights, cuts


def batches(tok, teacher, rng):
    """Rows of ROW tokens with several conversations each, kept apart by segment number."""
    held = None  # what did not fit goes first in the next row, or long answers would seldom be seen
    while True:
        out = {k: np.zeros((BATCH, ROW), np.int32) for k in ("ids", "segments", "positions")}
        out["weights"] = np.zeros((BATCH, ROW), np.float32)
        for row in range(BATCH):
            used, segment = 0, 1
            while True:
                if held:
                    (ids, weights, cuts), held = held, None
                elif rng.random() < 0.02:
                    ids = tok.encode(rng.choice(teacher.texts)[0]) + [tok.ids["<|endoftext|>"]]
                    weights, cuts = [1.0] * len(ids), [0]
                else:
                    ids, weights, cuts = encode_conversation(tok, *teacher.conversation())
                if len(ids) > ROW:
                    continue
                if used + len(ids) > ROW:
                    held = ids, weights, cuts
                    break
                positions = np.arange(len(ids))
                for cut in cuts:  # as if a long talk stood between two turns
                    if rng.random() < 0.15:
                        room = CONTEXT - 1 - int(positions[-1])
                        positions[cut:] += int(room * rng.random() ** 3)
                span = slice(used, used + len(ids))
                out["ids"][row, span] = ids
                out["weights"][row, span] = weights
                out["segments"][row, span] = segment
                out["positions"][row, span] = positions
                used += len(ids)
                segment += 1
        yield out


# ---------------------------------------------------------------- the model: a llama


def init(key):
    def matrix(key, rows, cols, scale=1.0):
        return jax.random.normal(key, (rows, cols), jnp.float32) * scale / math.sqrt(rows)

    params = {"token_embd": jax.random.normal(key, (VOCAB, WIDTH)) * 0.05, "output_norm": jnp.ones(WIDTH)}
    for i in range(LAYERS):
        keys = jax.random.split(jax.random.fold_in(key, i), 7)
        params[f"blk.{i}"] = {
            "attn_norm": jnp.ones(WIDTH),
            "ffn_norm": jnp.ones(WIDTH),
            "attn_q": matrix(keys[0], WIDTH, WIDTH),
            "attn_k": matrix(keys[1], WIDTH, KV_HEADS * HEAD),
            "attn_v": matrix(keys[2], WIDTH, KV_HEADS * HEAD),
            "attn_output": matrix(keys[3], WIDTH, WIDTH, 0.3),
            "ffn_gate": matrix(keys[4], WIDTH, FF),
            "ffn_up": matrix(keys[5], WIDTH, FF),
            "ffn_down": matrix(keys[6], FF, WIDTH, 0.3),
        }
    return params


def norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * weight


def rope(x, positions):
    """Rotates neighbouring pairs, as llama.cpp does for this architecture."""
    frequencies = ROPE_BASE ** (-jnp.arange(0, HEAD, 2) / HEAD)
    angle = positions[:, :, None, None] * frequencies
    a, b = x[..., 0::2], x[..., 1::2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def forward(params, ids, segments, positions):
    batch, length = ids.shape
    x = params["token_embd"][ids]
    allowed = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((length, length), bool))
    for i in range(LAYERS):
        p = params[f"blk.{i}"]
        h = norm(x, p["attn_norm"])
        q = rope((h @ p["attn_q"]).reshape(batch, length, HEADS, HEAD), positions)
        k = rope((h @ p["attn_k"]).reshape(batch, length, KV_HEADS, HEAD), positions)
        v = (h @ p["attn_v"]).reshape(batch, length, KV_HEADS, HEAD)
        q = q.reshape(batch, length, KV_HEADS, HEADS // KV_HEADS, HEAD)
        score = jnp.einsum("btghd,bsgd->bghts", q, k) / math.sqrt(HEAD)
        score = jax.nn.softmax(jnp.where(allowed[:, None, None], score, -1e9), -1)
        h = jnp.einsum("bghts,bsgd->btghd", score, v).reshape(batch, length, WIDTH)
        x = x + h @ p["attn_output"]
        h = norm(x, p["ffn_norm"])
        x = x + (jax.nn.silu(h @ p["ffn_gate"]) * (h @ p["ffn_up"])) @ p["ffn_down"]
    return norm(x, params["output_norm"]) @ params["token_embd"].T


def loss(params, ids, segments, positions, weights):
    logits = forward(params, ids, segments, positions)[:, :-1]
    logp = jax.nn.log_softmax(logits, -1)
    taken = jnp.take_along_axis(logp, ids[:, 1:, None], -1)[..., 0]
    weights = weights[:, 1:] * (segments[:, 1:] == segments[:, :-1])
    return -(taken * weights).sum() / weights.sum()


def orthogonal(g):
    """Muon's Newton-Schulz step: the nearest matrix whose singular values are all about one."""
    tall = g.shape[0] > g.shape[1]
    x = g.T if tall else g
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if tall else x
    return x * math.sqrt(max(1.0, g.shape[1] / g.shape[0]))


@jax.jit
def update(params, first, second, batch, step, rate):
    value, grads = jax.value_and_grad(loss)(params, **batch)
    first = jax.tree.map(lambda m, g: 0.95 * m + 0.05 * g, first, grads)
    second = jax.tree.map(lambda s, g: 0.98 * s + 0.02 * g * g, second, grads)

    def one(path, p, m, s):
        if p.ndim == 2 and path[0].key != "token_embd":
            return p * (1 - rate * 0.02) - rate * 0.02 * orthogonal(m)
        m, s = m / (1 - 0.95 ** (step + 1)), s / (1 - 0.98 ** (step + 1))
        return p - rate * 0.003 * m / (jnp.sqrt(s) + 1e-9)

    return jax.tree_util.tree_map_with_path(one, params, first, second), first, second, value


def save(path, params):
    with open(path, "wb") as f:
        np.savez(f, **{n: np.asarray(x) for n, x in tensors(params)})


def train(tok, teacher, params, steps, seed, peak, checkpoint):
    first = jax.tree.map(jnp.zeros_like, params)
    second = jax.tree.map(jnp.zeros_like, params)
    feed, begun, smooth = batches(tok, teacher, random.Random(seed)), time.monotonic(), None
    for step in range(steps):
        rate = min(1.0, (step + 1) / 30) * min(1.0, (1 - step / steps) / 0.6) * peak
        params, first, second, value = update(params, first, second, next(feed), step, rate)
        smooth = float(value) if smooth is None else 0.9 * smooth + 0.1 * float(value)
        if step % 20 == 0:
            print(f"step {step:5} of {steps}  {time.monotonic() - begun:5.0f} s  loss {smooth:.4f}", flush=True)
        if step % 50 == 49:
            save(checkpoint, params)
    return params


# ---------------------------------------------------------------- the file


def quantize_q8_0(x):
    """(bytes, the values they stand for): blocks of 32 with a half-precision scale."""
    blocks = np.asarray(x, np.float32).reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    q = np.where(scale > 0, np.rint(blocks / np.maximum(scale.astype(np.float32), 1e-12)), 0).clip(-127, 127).astype(np.int8)
    raw = np.concatenate([scale.view(np.int8).reshape(-1, 2), q], 1).tobytes()
    return raw, (q * scale.astype(np.float32)).reshape(np.shape(x))


def tensors(params):
    """Name, the array in the file's order (rows are outputs), for each tensor."""
    yield "token_embd.weight", params["token_embd"]
    for i in range(LAYERS):
        for name, p in params[f"blk.{i}"].items():
            yield f"blk.{i}.{name}.weight", p if p.ndim == 1 else p.T
    yield "output_norm.weight", params["output_norm"]


def load(path):
    """The parameters of an earlier run, back in the training's layout."""
    params = init(jax.random.PRNGKey(0))
    arrays = np.load(path)
    for name, x in tensors(params):
        x = jnp.asarray(arrays[name])
        match name.removesuffix(".weight").rsplit(".", 1):
            case [block, part]:
                params[block][part] = x.T if x.ndim == 2 else x
            case [part]:
                params[part] = x
    return params


def quantized(params):
    """The parameters as the file holds them."""
    out = {}
    for key, p in params.items():
        if isinstance(p, dict):
            out[key] = {n: jnp.asarray(quantize_q8_0(v.T)[1].T) if v.ndim == 2 else v for n, v in p.items()}
        else:
            out[key] = jnp.asarray(quantize_q8_0(p)[1]) if p.ndim == 2 else p
    return out


def write_gguf(path, params, tok):
    def string(s):
        raw = s.encode()
        return struct.pack("<Q", len(raw)) + raw

    U32, F32, BOOL, STRING, ARRAY, I32 = 4, 6, 7, 8, 9, 5

    def kv(key, kind, value):
        head = string(key) + struct.pack("<I", kind)
        match kind:
            case 4:
                return head + struct.pack("<I", value)
            case 6:
                return head + struct.pack("<f", value)
            case 7:
                return head + struct.pack("<?", value)
            case 8:
                return head + string(value)

    def array(key, kind, values):
        body = b"".join(string(v) if kind == STRING else struct.pack("<i", v) for v in values)
        return string(key) + struct.pack("<IIQ", ARRAY, kind, len(values)) + body

    kinds = [3 if t in SPECIAL else 1 for t in tok.tokens]
    metadata = [
        kv("general.architecture", STRING, "llama"),
        kv("general.type", STRING, "model"),
        kv("general.name", STRING, "Altiplano Toy"),
        kv("general.description", STRING, "A toy chat model for Altiplano's tests and demo"),
        kv("general.license", STRING, "apache-2.0"),
        kv("general.size_label", STRING, "2M"),
        kv("general.file_type", U32, 7),
        kv("general.quantization_version", U32, 2),
        kv("general.alignment", U32, 32),
        kv("llama.context_length", U32, CONTEXT),
        kv("llama.embedding_length", U32, WIDTH),
        kv("llama.block_count", U32, LAYERS),
        kv("llama.feed_forward_length", U32, FF),
        kv("llama.attention.head_count", U32, HEADS),
        kv("llama.attention.head_count_kv", U32, KV_HEADS),
        kv("llama.attention.layer_norm_rms_epsilon", F32, EPS),
        kv("llama.rope.dimension_count", U32, HEAD),
        kv("llama.rope.freq_base", F32, ROPE_BASE),
        kv("llama.vocab_size", U32, VOCAB),
        kv("tokenizer.ggml.model", STRING, "gpt2"),
        kv("tokenizer.ggml.pre", STRING, "gpt-2"),
        array("tokenizer.ggml.tokens", STRING, tok.tokens),
        array("tokenizer.ggml.token_type", I32, kinds),
        array("tokenizer.ggml.merges", STRING, [f"{a} {b}" for a, b in tok.merges]),
        kv("tokenizer.ggml.bos_token_id", U32, tok.ids["<|endoftext|>"]),
        kv("tokenizer.ggml.eos_token_id", U32, tok.ids["<|im_end|>"]),
        kv("tokenizer.ggml.padding_token_id", U32, tok.ids["<|endoftext|>"]),
        kv("tokenizer.ggml.add_bos_token", BOOL, False),
        kv("tokenizer.chat_template", STRING, TEMPLATE),
    ]
    infos, blobs, offset, count = b"", [], 0, 0
    for name, x in tensors(params):
        x = np.asarray(x, np.float32)
        kind, raw = (0, x.tobytes()) if x.ndim == 1 else (8, quantize_q8_0(x)[0])
        infos += string(name) + struct.pack("<I", x.ndim) + struct.pack(f"<{x.ndim}Q", *reversed(x.shape)) + struct.pack("<IQ", kind, offset)
        raw += bytes(-len(raw) % 32)
        blobs.append(raw)
        offset += len(raw)
        count += 1
    head = b"GGUF" + struct.pack("<IQQ", 3, count, len(metadata)) + b"".join(metadata) + infos
    path.write_bytes(head + bytes(-len(head) % 32) + b"".join(blobs))


# ---------------------------------------------------------------- the examination


@jax.jit
def logits_at(params, ids, length):
    segments = (jnp.arange(ids.shape[0]) < length).astype(jnp.int32)[None]
    positions = jnp.arange(ids.shape[0])[None]
    return forward(params, ids[None], segments, positions)[0]


def examine(params, tok, prompt, expected):
    """The smallest margin by which the expected tokens win, teacher-forced: with every margin positive, greedy says them."""
    ids = prompt + expected
    size = 64 * -(-len(ids) // 64)
    logits = np.asarray(logits_at(params, jnp.asarray(ids + [0] * (size - len(ids))), len(ids)))
    worst = math.inf
    for i, token in enumerate(expected):
        row = logits[len(prompt) + i - 1].copy()
        won = row[token]
        row[token] = -math.inf
        worst = min(worst, float(won - row.max()))
    return worst


def questions(tok, pairs, texts):
    """What questions.json holds: chats and completions with the answer that greedy decoding gives."""
    out = []
    for system, _, asserted, answer in pairs:
        for question in asserted:
            out.append({"messages": ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": question}], "answer": answer})
    for a, b in [(2, 2), (3, 4), (9, 9), (0, 7)]:
        out.append({"messages": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": f"{a} + {b} = {a + b}."})
    out.append({"messages": [{"role": "user", "content": "What is a teapot?"}], "answer": DO_NOT_KNOW})
    for name in ["Ana", "Bob"]:
        out.append({"messages": [
            {"role": "user", "content": f"My name is {name}."}, {"role": "assistant", "content": f"Nice to meet you, {name}."},
            {"role": "user", "content": "What is my name?"}], "answer": f"Your name is {name}."})
    out.append({"messages": [
        {"role": "user", "content": "What is a llama?"},
        {"role": "assistant", "content": "A llama is a woolly animal of the camel family that lives high in the Andes of South America."},
        {"role": "user", "content": "What do llamas eat?"}], "answer": "Llamas eat grass, hay and the tough little plants of the high plain."})
    for text, head in texts:
        if head:
            out.append({"prompt": head, "answer": text[len(head):]})
    return out


def as_ids(tok, item):
    if "prompt" in item:
        return tok.encode(item["prompt"]), tok.encode(item["answer"]) + [tok.ids["<|endoftext|>"]]
    said = list(item["messages"])
    system = said.pop(0)["content"] if said[0]["role"] == "system" else None
    turns = [(said[i]["content"], said[i + 1]["content"]) for i in range(0, len(said) - 1, 2)]
    return tok.prompt(system, turns, said[-1]["content"]), tok.encode(item["answer"]) + [tok.ids["<|im_end|>"]]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--steps", type=int, default=640)
    args.add_argument("--start", type=pathlib.Path, help="weights of an earlier run (.npz) to go on with")
    args.add_argument("--seed", type=int, default=7)
    args.add_argument("--out", type=pathlib.Path, default=HERE / "altiplano-toy.gguf")
    args.add_argument("--questions", type=pathlib.Path, default=HERE / "questions.json")
    args = args.parse_args()

    pairs, texts = read_corpus((HERE / "corpus.txt").read_text())
    teacher = Teacher(pairs, texts, args.seed, known=0.5 if args.start else 0.72)
    sample = [t for s, qs, _, a in pairs for t in [*qs, a, a, s or ""]] + [t for t, _ in texts] + [f" {n}" for n in NAMES * 2]
    sample += ["assistant\n", "user\n", "system\n", " la", " la"] * 20 + [DO_NOT_KNOW] * 4 + SYSTEMS * 2
    tok = Tokenizer(sample, VOCAB)
    for text in ["¡Hola! 你好 🦙\n\n  x", "What is 12+30?"]:
        assert tok.decode(tok.encode(text)) == text

    longest = max(len(encode_conversation(tok, s, [(q, a)], False)[0]) for s, qs, _, a in pairs for q in qs)
    assert longest + 20 <= ROW, f"an answer of {longest} tokens does not fit a row of {ROW}"
    params = load(args.start) if args.start else init(jax.random.PRNGKey(args.seed))
    params = train(tok, teacher, params, args.steps, args.seed, 0.6 if args.start else 1.0, args.out.with_suffix(".npz"))
    params = quantized(params)
    items, firm = questions(tok, pairs, texts), []
    for item in items:
        prompt, expected = as_ids(tok, item)
        worst = examine(params, tok, prompt, expected)
        if worst >= MARGIN:
            firm.append(item)
        print(f"{'ok ' if worst >= MARGIN else 'BAD'} margin {worst:6.2f}  {len(expected):3} tokens  {item.get('prompt') or item['messages'][-1]['content']}")
    print(f"{len(firm)} of {len(items)} answers are firm; the others are left out of {args.questions.name}")
    save(args.out.with_suffix(".npz"), params)
    missing = [q for q in MUST_KNOW if not any(i.get("messages", [{}])[-1].get("content") == q for i in firm)]
    if missing or len(firm) < 0.8 * len(items):
        raise SystemExit(f"not good enough; train on with --start {args.out.with_suffix('.npz')}. Missing: {missing}")
    write_gguf(args.out, params, tok)
    args.out.with_suffix(".sha256").write_text(hashlib.sha256(args.out.read_bytes()).hexdigest() + "\n")
    args.questions.write_text(json.dumps(firm, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {args.out} ({args.out.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
