"""Writes the cases of this folder: one small linear layer each, as other programs pack and read it.

    python make.py out/ compressed-tensors   # with compressed-tensors 0.20.0 (and again with 0.17.1: same command)
    python make.py out/ awq AUTOAWQ_SOURCE   # with the unpacked source of autoawq 0.2.9
    python make.py out/ gptq                 # packed here, a column as one big integer
    python make.py out/ bitsandbytes         # with bitsandbytes 0.50.2
    python make.py out/ hqq                  # with hqq 0.2.8.post1, on the CPU
    python make.py out/ bitnet               # with transformers 5.23.0, also ../bitnet: a whole model and its logits
    python make.py out/ sources              # with bitsandbytes: ../bitsandbytes.safetensors, weights and what it makes of them

Each case: config.json, model.safetensors (module `m`), expected.safetensors (`weight`, float32 [n, k]).
compressed-tensors, AutoAWQ and bitsandbytes pack; compressed-tensors and bitsandbytes 4-bit cases are dequantized by them too, in float32.
"""
import importlib.util, json, os, sys, types
import numpy as np, torch
from safetensors.torch import save_file

MODEL = dict(architectures=["LlamaForCausalLM"], vocab_size=8, hidden_size=64, intermediate_size=64,
             num_hidden_layers=1, num_attention_heads=1, hidden_act="silu")


def case(name, quantization, tensors, expected):
    folder = os.path.join(sys.argv[1], name)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(dict(MODEL, quantization_config=quantization), f, indent=1)
    save_file({"m." + k: v.contiguous() for k, v in tensors.items()}, os.path.join(folder, "model.safetensors"))
    save_file({"weight": expected.float().contiguous()}, os.path.join(folder, "expected.safetensors"))


def compressed_tensors():
    from importlib.metadata import version  # noqa: F401
    import compressed_tensors as ct
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Packed
    from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor as Naive
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    release = ct.__version__
    old = release.startswith("0.17")
    tag = "017" if old else "020"

    def write(name, n, k, fmt, seed, activations=None, extra=None, g_idx=None, **args):
        g = torch.Generator().manual_seed(seed)
        bits, symmetric = args["num_bits"], args.get("symmetric", True)
        groups = {"group": -(-k // (args.get("group_size") or k)), "channel": 1, "tensor": 1}[args["strategy"]]
        shape = (1,) if args["strategy"] == "tensor" else (n, groups)
        scale = (torch.rand(shape, generator=g) * 0.1 + 0.01).bfloat16().float()
        lo, hi = -(1 << bits - 1), (1 << bits - 1) - 1
        zero = torch.randint(lo, hi + 1, shape, generator=g, dtype=torch.int8) if not symmetric else torch.zeros(shape, dtype=torch.int8)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        q = torch.randint(lo, hi + 1, (n, k), generator=g)
        column = torch.as_tensor(g_idx) if g_idx is not None else torch.arange(k) // (args.get("group_size") or k)
        s, z = (scale, zero) if args["strategy"] == "tensor" else (scale[:, column], zero[:, column])
        weight = (q.float() - z.float()) * s  # exactly on the grid, so that quantizing finds q again
        state = dict(weight=weight, weight_scale=scale, weight_zero_point=zero)
        if g_idx is not None:
            state["weight_g_idx"] = column.int()
        compressor = Packed if fmt == "pack-quantized" else Naive
        out = compressor.compress(dict(state), scheme)
        back = compressor.decompress(dict(out), scheme)["weight"]
        assert torch.equal(back.float(), weight), name
        out = {key: (v.bfloat16() if key == "weight_scale" else v) for key, v in out.items() if v is not None}
        out.update(extra or {})
        weights = {key: v for key, v in args.items()}
        case(name, dict(quant_method="compressed-tensors", format=fmt, version=release, quantization_status="compressed", ignore=["lm_head"],
                        config_groups=dict(group_0=dict(targets=["Linear"], weights=weights, input_activations=activations))), out, weight)

    for bits in (2, 3, 4, 5, 6, 7, 8):
        write(f"ct{tag}-w{bits}-sym-g32", 8, 96, "pack-quantized", bits, num_bits=bits, strategy="group", group_size=32)
        write(f"ct{tag}-w{bits}-asym-g32", 9, 96, "pack-quantized", 10 + bits, num_bits=bits, strategy="group", group_size=32, symmetric=False)
    write(f"ct{tag}-w3-asym-channel-k61", 7, 61, "pack-quantized", 30, num_bits=3, strategy="channel", symmetric=False)
    if old:
        order = torch.arange(96) // 32
        order = order[torch.randperm(96, generator=torch.Generator().manual_seed(5))]
        write("ct017-w4-actorder-g32", 8, 96, "pack-quantized", 40, g_idx=order.tolist(), num_bits=4, strategy="group", group_size=32, actorder="group")
        return
    token = dict(num_bits=8, strategy="token", dynamic=True, symmetric=True, type="int")
    write("ct020-w8a8-channel-dynamic", 5, 33, "int-quantized", 50, token, num_bits=8, strategy="channel")
    write("ct020-w8a8-tensor-dynamic", 5, 33, "int-quantized", 51, token, num_bits=8, strategy="tensor")
    write("ct020-w8a8-asym-channel", 5, 33, "int-quantized", 52, token, num_bits=8, strategy="channel", symmetric=False)
    write("ct020-w4a8-g32", 5, 64, "int-quantized", 53, token, num_bits=4, strategy="group", group_size=32)
    static = dict(num_bits=8, strategy="tensor", dynamic=False, symmetric=False, type="int")
    write("ct020-w8a8-static-asym", 5, 33, "int-quantized", 54, static,
          dict(input_scale=torch.tensor([0.0625]).bfloat16(), input_zero_point=torch.tensor([-7], dtype=torch.int8)), num_bits=8, strategy="channel")


def awq(source):
    module = types.ModuleType("awq.utils.module")
    module.try_import = lambda name: (None, "")
    packing, utils = types.ModuleType("awq.utils.packing_utils"), types.ModuleType("awq.utils.utils")
    packing.dequantize_gemm, utils.get_best_device = None, lambda: "cpu"
    for m in (types.ModuleType("awq"), types.ModuleType("awq.utils"), module, packing, utils):
        sys.modules[m.__name__] = m

    def load(name):
        spec = importlib.util.spec_from_file_location(name, f"{source}/awq/modules/linear/{name}.py")
        m = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(m)
        return m

    for i, (version, cls, n, k, group) in enumerate([
        ("gemm", "WQLinear_GEMM", 32, 128, 32), ("gemm", "WQLinear_GEMM", 64, 64, 64),
        ("gemv", "WQLinear_GEMV", 8, 256, 64), ("gemv", "WQLinear_GEMV", 8, 128, 128), ("gemv", "WQLinear_GEMV", 8, 128, 32),
        ("gemv_fast", "WQLinear_GEMVFast", 8, 256, 64), ("gemv_fast", "WQLinear_GEMVFast", 8, 128, 128),
    ]):
        g = torch.Generator().manual_seed(60 + i)
        scales = (torch.rand((n, k // group), generator=g) * 0.1 + 0.01).half()
        zeros = torch.randint(0, 16, (n, k // group), generator=g)
        q = torch.randint(0, 16, (n, k), generator=g)
        column = torch.arange(k) // group
        weight = (q - zeros[:, column]).float() * scales.float()[:, column]
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.data = weight
        transposed = version == "gemm"  # from_linear of gemm takes [groups, n]
        s, z = (scales.t().contiguous(), zeros.t().contiguous()) if transposed else (scales, zeros)
        packed = getattr(load(version), cls).from_linear(linear, 4, group, scales=s, zeros=z.float())
        tensors = {name: t for name, t in packed.state_dict().items()}
        case(f"awq-{version}-g{group}-k{k}", dict(quant_method="awq", bits=4, group_size=group, zero_point=True, version=version), tensors, weight)


def gptq():
    def pack(fields, bits):  # fields [length, columns] -> words [length*bits/32, columns]
        length, columns = fields.shape
        words = -(-length * bits // 32)
        out = np.zeros((words, columns), np.uint32)
        for c in range(columns):
            value = sum(int(f) << (i * bits) for i, f in enumerate(fields[:, c]))
            out[:, c] = np.frombuffer(value.to_bytes(words * 4, "little"), np.uint32)
        return torch.from_numpy(out.view(np.int32).copy())

    for i, (bits, group, sym, fmt, order) in enumerate([
        (2, 32, True, "gptq", "none"), (3, 32, True, "gptq", "plain"), (4, 32, True, "gptq_v2", "zero"), (8, -1, True, "gptq", "plain"),
        (2, -1, False, "gptq", "plain"), (3, 32, False, "gptq_v2", "none"), (3, 64, False, "gptq", "act"), (4, 40, False, "gptq", "act"),
        (8, 32, False, "gptq", "act"), (4, 32, True, "gptq", "act"),
    ]):
        rng = np.random.default_rng(80 + i)
        n, k = 32, 96
        g = k if group == -1 else group
        groups = -(-k // g)
        group_of = np.arange(k) // g
        if order == "act":
            group_of = group_of[rng.permutation(k)]
        top = 1 << bits
        q = rng.integers(0, top, (k, n))
        first = 1 if fmt == "gptq" else 0  # v1 holds 1 to 2^bits
        z = np.full((groups, n), top // 2) if sym else rng.integers(first, top + first, (groups, n))
        s = (rng.random((groups, n)) * 0.1 + 0.01).astype(np.float16)
        weight = ((q - z[group_of]).astype(np.float32) * s.astype(np.float32)[group_of]).T
        tensors = dict(qweight=pack(q, bits), qzeros=pack((z - first).T, bits).t().contiguous(), scales=torch.from_numpy(s))
        if order != "none":
            tensors["g_idx"] = torch.from_numpy((group_of * (order != "zero")).astype(np.int32))
        case(f"gptq-w{bits}-g{group}-{'sym' if sym else 'asym'}-{fmt}-{order}",
             dict(quant_method="gptq", bits=bits, group_size=group, sym=sym, desc_act=order == "act", checkpoint_format=fmt), tensors, torch.from_numpy(weight.copy()))


def bitsandbytes():
    import bitsandbytes.functional as F
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as generic

    def config(**fields):
        return dict(quant_method="bitsandbytes", load_in_4bit=False, load_in_8bit=False, bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_type="fp4",
                    bnb_4bit_quant_storage="uint8", bnb_4bit_use_double_quant=False, llm_int8_skip_modules=None, llm_int8_threshold=6.0) | fields

    for i, (kind, n, k, block, nested, storage) in enumerate([
        ("nf4", 8, 128, 64, False, "uint8"), ("nf4", 40, 512, 64, True, "uint8"), ("nf4", 6, 96, 64, False, "uint8"), ("nf4", 7, 33, 64, False, "uint8"),
        ("nf4", 12, 64, 256, True, "uint8"), ("fp4", 8, 128, 64, False, "bfloat16"), ("fp4", 9, 160, 128, True, "float32"),
    ]):
        g = torch.Generator().manual_seed(100 + i)
        weight = torch.randn((n, k), generator=g)
        weight[0, :7] = 0
        packed, state = F.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind, quant_storage=getattr(torch, storage))
        absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
        expected = generic(packed.view(torch.uint8).reshape(-1), absmax, state.code, block, (n, k), torch.float32)
        # The CPU kernel is wrong where blocks wrap rows (0.50.2): it starts every row with a new one.
        assert k % block != 0 or torch.equal(expected, F.dequantize_4bit(packed, state))
        assert (expected - weight).abs().max() < 0.7
        tensors = {"weight": packed} | {"weight." + name: t for name, t in state.as_dict(packed=True).items()}
        fields = dict(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, bnb_4bit_quant_storage=storage)
        case(f"bnb-{kind}{'-nested' if nested else ''}-b{block}-k{k}", config(**fields), tensors, expected)
    for k, extra in ((64, dict(weight_format=torch.tensor(0, dtype=torch.uint8))), (33, {})):
        g = torch.Generator().manual_seed(120 + k)
        codes, scb, _ = F.int8_vectorwise_quant(torch.randn((6, k), generator=g).half())
        expected = codes.float() * (scb / 127)[:, None]
        # bitsandbytes multiplies by a rounded 1 / 127 instead.
        assert torch.allclose(expected, F.int8_vectorwise_dequant(codes, scb), rtol=3e-7)
        case(f"bnb-int8-k{k}", config(load_in_8bit=True), dict(weight=codes, SCB=scb, **extra), expected)
        if k == 64:  # the layer's output, row by row; inputs are exact in bfloat16, and below the threshold but for some
            def code(row):
                ca, sca, columns = F.int8_vectorwise_quant(row.clone(), threshold=6.0)
                inner = row.float().masked_fill(row.abs() >= 6, 0)
                return ca, sca, columns, torch.equal(ca, torch.round(inner / (inner.abs().max() / 127)).to(torch.int8))

            rows = []
            for columns in ([], [3], [0, 63], [5, 6, 7], [11]):
                while True:  # it multiplies by 127 / absmax, which gives other codes to values very near a boundary
                    row = torch.randn(k, generator=g).clamp(-5, 5).bfloat16().half()
                    row[columns] = torch.tensor([8.0, -12.5, 6.0]).half()[: len(columns)]
                    ca, sca, outliers, same = code(row[None])
                    if same:
                        break
                rows.append((row, torch.ops.bitsandbytes.int8_mixed_scaled_mm(row[None], ca, codes, sca, scb, outliers)[0]))
            x, y = torch.stack([r for r, _ in rows]).float(), torch.cat([y for _, y in rows]).float()
            save_file(dict(x=x, y=y), os.path.join(sys.argv[1], "bnb-int8-k64", "llm_int8.safetensors"))


def hqq():
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    for i, (bits, n, k, group, dtype, floats) in enumerate([
        (4, 6, 128, 64, "bfloat16", False), (4, 8, 96, 64, "float16", False), (3, 11, 64, 64, "float32", False), (2, 16, 64, 32, "float16", True),
        (8, 5, 40, None, "bfloat16", False), (5, 3, 64, 32, "float32", False),
    ]):
        dtype = getattr(torch, dtype)
        torch.manual_seed(200 + i)
        linear = torch.nn.Linear(k, n, bias=False).to(dtype)
        params = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1, view_as_float=floats)
        layer = HQQLinear(linear, params, compute_dtype=dtype, device="cpu")
        meta = dict(layer.meta, compute_dtype=torch.float32, scale=layer.meta["scale"].to(dtype).float(), zero=layer.meta["zero"].to(dtype).float())
        expected = Quantizer.dequantize(layer.W_q, meta)
        tensors = layer.state_dict()
        assert tensors["scale"].dtype == dtype, tensors["scale"].dtype
        case(f"hqq-w{bits}-g{group or -1}-k{k}{'-float' if floats else ''}", dict(quant_method="hqq", quant_config=params, skip_modules=["lm_head"]), dict(tensors), expected)


def bitnet():
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitnet import WeightQuant, pack_weights

    def config(linear_class, mode="offline", skipped=("lm_head",)):
        return dict(quant_method="bitnet", linear_class=linear_class, quantization_mode=mode, modules_to_not_convert=skipped and list(skipped))

    g = torch.Generator().manual_seed(400)
    q = torch.randint(-1, 2, (12, 40), generator=g)
    scale = torch.tensor([23.375]).bfloat16()
    packed = pack_weights(q.clone())
    case("bitnet-divided", config("bitlinear"), dict(weight=packed, weight_scale=scale), q / scale.float())
    case("bitnet-multiplied", config("autobitlinear"), dict(weight=packed, weight_scale=1 / scale), q * (1 / scale).float())
    case("bitnet-floats", config("autobitlinear", skipped=None), dict(weight=(q * 0.5).bfloat16(), weight_scale=scale), q * 0.5 * scale.float())
    weight = (torch.randn((12, 40), generator=g) * 0.02).bfloat16()
    case("bitnet-online", config("autobitlinear", "online"), dict(weight=weight), WeightQuant.apply(weight.float()))

    # A whole model, read and run by transformers in float32 as a Llama of either linear class, and as a BitNet.
    g = torch.Generator().manual_seed(404)  # one with which no activation is at a rounding boundary
    folder = os.path.join(sys.argv[1], "..", "bitnet")
    os.makedirs(folder, exist_ok=True)
    hidden, inner, vocab = 128, 256, 256
    tensors = {"model.embed_tokens.weight": torch.randn((vocab, hidden), generator=g).bfloat16(), "model.norm.weight": torch.rand(hidden, generator=g).bfloat16() * 0.2}
    for layer in range(2):
        for name, k in [("input_layernorm", hidden), ("post_attention_layernorm", hidden), ("self_attn.attn_sub_norm", 128), ("mlp.ffn_sub_norm", inner)]:
            tensors[f"model.layers.{layer}.{name}.weight"] = (torch.rand(k, generator=g) + 0.5).bfloat16()
        for name, n, k in [("self_attn.q_proj", 128, hidden), ("self_attn.k_proj", 64, hidden), ("self_attn.v_proj", 64, hidden), ("self_attn.o_proj", hidden, 128),
                           ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner)]:
            tensors[f"model.layers.{layer}.{name}.weight"] = pack_weights(torch.randint(-1, 2, (n, k), generator=g))
            tensors[f"model.layers.{layer}.{name}.weight_scale"] = (torch.rand(1, generator=g) * 8 + 8).bfloat16()
    model = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=64, hidden_act="silu", max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0,
                 tie_word_embeddings=True)
    ids, out = torch.randint(0, vocab, (1, 24), generator=g), {}
    bitnet = dict(model, architectures=["BitNetForCausalLM"], model_type="bitnet", hidden_act="relu2")
    for what, shape, linear_class in [("bitnet", bitnet, "autobitlinear"), ("autobitlinear", model, "autobitlinear"), ("bitlinear", model, "bitlinear")]:  # the last stays
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(dict(shape, quantization_config=config(linear_class, skipped=None)), f, indent=1)
        scaled = {name: (1 / t.float() if linear_class == "autobitlinear" and name.endswith("_scale") else t).contiguous() for name, t in tensors.items()}
        save_file(scaled, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        with torch.no_grad():
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if linear_class == "autobitlinear":
                torch.nn.Module.float(loaded)  # it unpacks to bfloat16
            out[what] = loaded(ids).logits[0].contiguous()
    save_file(dict(out, ids=ids[0].int()), os.path.join(folder, "logits.safetensors"))


def sources():
    import bitsandbytes.functional as F

    out = {}
    for i, (kind, n, k, block, nested) in enumerate([("nf4", 16, 128, 64, False), ("nf4", 40, 64, 64, True), ("fp4", 16, 128, 64, False), ("nf4", 24, 96, 32, True)]):
        weight = (torch.randn((n, k), generator=torch.Generator().manual_seed(300 + i)) * 0.02).bfloat16()
        weight[0, :block] = 0
        packed, state = F.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
        out[f"{kind}-{n}-{k}-{block}.source"] = weight
        out |= {f"{kind}-{n}-{k}-{block}.m.weight{'.' + name if name else ''}": t for name, t in {"": packed, **state.as_dict(packed=True)}.items()}
    weight = (torch.randn((16, 128), generator=torch.Generator().manual_seed(310)) * 0.02).half()
    codes, scb, _ = F.int8_vectorwise_quant(weight.clone())
    out |= {"int8-16-128-0.source": weight, "int8-16-128-0.m.weight": codes, "int8-16-128-0.m.SCB": scb}
    save_file({name: t.contiguous() for name, t in out.items()}, os.path.join(sys.argv[1], "..", "bitsandbytes.safetensors"))


{"hqq": hqq, "bitnet": bitnet, "sources": sources, "compressed-tensors": compressed_tensors, "awq": awq, "gptq": gptq, "bitsandbytes": bitsandbytes}[sys.argv[2]](*sys.argv[3:])
