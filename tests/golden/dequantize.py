"""Dequantizes checkpoints with numpy alone and writes probes of every linear layer: dequantize.py CHECKPOINTS > dequantized.json

Probes: sum and sum of absolute values (float64) and the values at flat positions 7919 i mod n k, i < 32.
"""
import json, pathlib, struct, sys
import numpy as np

DTYPES = {"I32": "<i4", "I64": "<i8", "I8": "i1", "F16": "<f2", "F32": "<f4", "BF16": "<u2"}


def load(path):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    out = {}
    for name, info in json.loads(raw[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        a, b = info["data_offsets"]
        array = np.frombuffer(raw[8 + length + a : 8 + length + b], DTYPES[info["dtype"]]).reshape(info["shape"])
        if info["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        out[name] = array
    return out


def bits_of(words, bits):  # [rows, words] -> [rows, words*32/bits], lowest bits first
    stream = np.unpackbits(words.astype("<i4").view(np.uint8).reshape(words.shape[0], -1), axis=1, bitorder="little")
    return (stream.reshape(words.shape[0], -1, bits) * (1 << np.arange(bits))).sum(2)


def dequantize(t, m, q):
    method = q["quant_method"]
    f = lambda name: t[f"{m}.{name}"]
    if method == "gptq":
        bits = q["bits"]
        codes = bits_of(np.ascontiguousarray(f("qweight").T), bits)  # [n, k]
        zeros = bits_of(f("qzeros"), bits) + 1  # [groups, n]
        scales, groups = f("scales").astype(np.float32), f("g_idx")
        return ((codes - zeros[groups].T).astype(np.float32)) * scales[groups].T
    if method == "awq":
        undo = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
        order = lambda a: bits_of(a, 4).reshape(a.shape[0], -1, 8)[:, :, undo].reshape(a.shape[0], -1)
        codes, zeros, scales = order(f("qweight")), order(f("qzeros")), f("scales").astype(np.float32)
        groups = np.arange(codes.shape[0]) // q["group_size"]
        return ((codes - zeros[groups]).astype(np.float32) * scales[groups]).T
    scale = f("weight_scale").astype(np.float32)
    if f"{m}.weight_packed" in t:
        bits = q["config_groups"]["group_0"]["weights"]["num_bits"]
        n, k = f("weight_shape")
        codes = bits_of(f("weight_packed"), bits)[:, :k] - (1 << bits - 1)
    else:
        codes = f("weight").astype(np.int64)
    return codes.astype(np.float32) * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)


result = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    if not (folder / "config.json").exists():
        continue
    q = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load(folder / "model.safetensors")
    layers = {}
    for name in sorted(tensors):
        module, suffix = name.rsplit(".", 1)
        if suffix not in ("scales", "weight_scale"):
            continue
        w = dequantize(tensors, module, q)
        flat = w.reshape(-1)
        at = [(7919 * i) % flat.size for i in range(32)]
        wide = flat.astype(np.float64)
        layers[module] = dict(shape=list(w.shape), sum=float(wide.sum()), abs=float(np.abs(wide).sum()), values=[float(flat[i]) for i in at])
    result[folder.name.removeprefix("books-6m-")] = layers
json.dump(result, sys.stdout, separators=(",", ":"))
