"""Cuts an FP8 model to its first layers, and computes what it must say: a fixture of this project's tests.

    python fp8.py MODEL LAYERS OUT    # MODEL: a Llama checkpoint in FP8 with its golden.json; needs numpy and tokenizers

Written for these files alone, apart from any other program: e4m3fn codes are read bit by bit, weights are dequantized to
float64 and stay so, as do activations. Without a cut (LAYERS = all of them) its results for scales of tensors and of blocks
were compared with those of transformers in float32 that lie beside the models: log-probabilities differ by less than 3e-5, no
greedy token differs. For scales of channels they were not.
"""
import json, os, struct, sys
import numpy as np
from tokenizers import Tokenizer


def e4m3(code):
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


E4M3 = np.array([e4m3(code) for code in range(256)])


def floats(dtype, data):
    if dtype == "F8_E4M3":
        return E4M3[np.frombuffer(data, np.uint8)]
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)


def read(path):
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        body = f.read()
    header.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], body[slice(*t["data_offsets"])]) for name, t in header.items()}


class Model:
    def __init__(self, config, tensors):
        self.c, self.t = config, tensors

    def tensor(self, name):
        dtype, shape, data = self.t[name]
        return floats(dtype, data).reshape(shape)

    def linear(self, name):
        w = self.tensor(name + ".weight")
        for suffix in ("weight_scale", "weight_scale_inv"):
            if f"{name}.{suffix}" in self.t:
                scale = self.tensor(f"{name}.{suffix}")
                if scale.ndim == 2 and scale.shape != (w.shape[0], 1):  # blocks
                    rows, columns = self.c["quantization_config"]["weight_block_size"]
                    scale = scale.repeat(rows, 0)[: w.shape[0]].repeat(columns, 1)[:, : w.shape[1]]
                return w * scale
        raise KeyError(name)

    def load(self):
        c = self.c
        self.layers = []
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            attention = [self.linear(p + f"self_attn.{x}_proj") for x in "qkvo"]
            mlp = [self.linear(p + f"mlp.{x}_proj") for x in ("gate", "up", "down")]
            norms = [self.tensor(p + f"{x}_layernorm.weight") for x in ("input", "post_attention")]
            self.layers.append((norms, attention, mlp))
        self.embedding, self.norm = self.tensor("model.embed_tokens.weight"), self.tensor("model.norm.weight")

    def rms(self, x, w):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c["rms_norm_eps"]) * w

    def logprobs(self, ids):
        """Of every next token after each of `ids`."""
        c, m, d = self.c, len(ids), self.c["head_dim"]
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        theta = c["rope_parameters"]["rope_theta"]
        angle = np.arange(m)[:, None] * theta ** (-np.arange(0, d, 2) / d)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

        def rope(x):
            a, b = x[..., : d // 2], x[..., d // 2 :]
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        future = np.triu(np.full((m, m), -np.inf), 1)
        x = self.embedding[ids]
        for norms, (wq, wk, wv, wo), (gate, up, down) in self.layers:
            h = self.rms(x, norms[0])
            q, k = rope((h @ wq.T).reshape(m, heads, d)), rope((h @ wk.T).reshape(m, kv, d))
            k, v = k.repeat(heads // kv, 1), (h @ wv.T).reshape(m, kv, d).repeat(heads // kv, 1)
            s = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d) + future
            p = np.exp(s - s.max(-1, keepdims=True))
            x = x + np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(m, heads * d) @ wo.T
            h = self.rms(x, norms[1])
            g = h @ gate.T
            x = x + (g / (1 + np.exp(-g)) * (h @ up.T)) @ down.T
        y = self.rms(x, self.norm) @ self.embedding.T
        y -= y.max(-1, keepdims=True)
        return y - np.log(np.exp(y).sum(-1, keepdims=True))


def rounded(values):
    return [float(f"{x:.7g}") for x in values]


def main(source, layers, out):
    with open(os.path.join(source, "config.json")) as f:
        config = json.load(f)
    with open(os.path.join(source, "golden.json")) as f:
        golden = json.load(f)
    config["num_hidden_layers"] = layers
    kept = lambda name: not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    tensors = {name: t for name, t in read(os.path.join(source, "model.safetensors")).items() if kept(name)}
    model = Model(config, tensors)
    model.load()
    tokenizer = Tokenizer.from_file(os.path.join(source, "tokenizer.json"))

    prompts = []
    for p in golden["prompts"]:
        ids, made, logprobs, gaps = list(p["prompt_ids"]), [], [], []
        for _ in range(len(p["greedy_ids"])):
            row = model.logprobs(ids)[-1]
            second, best = np.sort(row)[-2:]
            made.append(int(row.argmax()))
            ids.append(made[-1])
            logprobs.append(best)
            gaps.append(best - second)
        prompts.append(dict(prompt=p["prompt"], prompt_ids=p["prompt_ids"], greedy_ids=made, greedy_logprobs=rounded(logprobs),
                            top1_top2_gap=rounded(gaps), text=tokenizer.decode(made)))
    forced = golden["teacher_forced"]["ids"]
    rows = model.logprobs(forced)
    top = np.argsort(-rows, axis=-1, kind="stable")[:, :8]
    teacher_forced = dict(ids=forced, top8_ids=top.tolist(),
                          top8_logprobs=[rounded(row[ids]) for row, ids in zip(rows, top)])
    with open(os.path.join(os.path.dirname(__file__), "../fixtures/books-eval-64.txt"), encoding="utf-8") as f:
        text = tokenizer.encode(f.read(), add_special_tokens=False).ids
    windows = [text[i * 512 : (i + 1) * 512] for i in range(64)]
    nll = np.mean([-model.logprobs(w)[np.arange(511), w[1:]].mean() for w in windows])
    result = dict(generator="tests/golden/fp8.py: numpy in float64 on dequantized weights, activations not quantized",
                  prompts=prompts, teacher_forced=teacher_forced, perplexity=dict(value=float(np.exp(nll))))
    print("perplexity", np.exp(nll), "of the uncut model by transformers", golden["perplexity"]["value"])
    if layers == len({n.split(".")[2] for n in read(os.path.join(source, "model.safetensors")) if ".layers." in n}):
        their = golden["teacher_forced"]
        off = max(abs(row[i] - v) for row, ids, vs in zip(rows, their["top8_ids"], their["top8_logprobs"]) for i, v in zip(ids, vs))
        print("log-probabilities off by", off, "greedy equal:", all(a["greedy_ids"] == b["greedy_ids"] for a, b in zip(prompts, golden["prompts"])))
        return

    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "golden.json"), "w") as f:
        json.dump(result, f)
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
    header, at, body = {}, 0, []
    for name, (dtype, shape, data) in tensors.items():
        if name != "model.embed_tokens.weight":  # the demo's
            header[name] = dict(dtype=dtype, shape=shape, data_offsets=[at, at + len(data)])
            at += len(data)
            body.append(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(os.path.join(out, "model-rest.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head + b"".join(body))


main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
