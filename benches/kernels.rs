//! Time of every op on the GPU against what the GPU can do, measured in the same run.
//!
//! `cargo bench --bench kernels -- [--dtype f16|bf16] [FILTER...]`, or the `kernels` executable of scripts/pack-gpu. A
//! filter is a part of a case's name. Shapes are Llama-3.1-8B's.
//!
//! Method: tensors of a case exist as often as needed to exceed the L2 cache four times over; one CUDA graph runs the
//! op on each; the median of several replays over the number of ops is the time. Bytes are those the op must read and
//! write once. The ceiling is a copy of 1 GiB by `gather_rows`, read plus written bytes over time.

use std::process::ExitCode;

#[cfg(lowbit_cuda)]
fn main() -> ExitCode {
    match cuda::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("kernels: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

#[cfg(not(lowbit_cuda))]
fn main() -> ExitCode {
    eprintln!("kernels: this binary was built without nvcc; CONTRIBUTING.md says how to get one");
    ExitCode::SUCCESS
}

#[cfg(lowbit_cuda)]
mod cuda {
    use std::time::Duration;

    use lowbit::device::cuda::CudaDevice;
    use lowbit::device::{Act, AttentionShape, BatchMeta, Columns, Device, Emit, KvLayer, Tensor, Write};
    use lowbit::dtype::{DType, HostData};
    use lowbit::error::{Error, Result};
    use lowbit::quant::{ActQuant, LinearWeight, QuantWeight, Weight};

    const HIDDEN: usize = 4096;
    const INTERMEDIATE: usize = 14336;
    const VOCAB: usize = 128_256;
    const SHAPE: AttentionShape = AttentionShape {
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        scale: 0.088_388,
        window: None,
        block_size: 16,
    };
    /// Four times the largest L2 cache.
    const COLD_BYTES: u64 = 256 << 20;
    const REPLAYS: usize = 9;

    /// One op at one shape.
    struct Case {
        name: String,
        /// Bytes that must move through device memory.
        bytes: u64,
        /// Multiplications and additions of matrix products; 0 where memory decides.
        flops: u64,
    }

    impl Case {
        fn report(&self, time: Duration, ceiling_bytes: f64) -> String {
            let seconds = time.as_secs_f64();
            let rate = self.bytes as f64 / seconds;
            let tflops = if self.flops == 0 {
                String::new()
            } else {
                format!("{:7.1} TFLOP/s", self.flops as f64 / seconds / 1e12)
            };
            let (micros, gigabytes, percent) = (seconds * 1e6, rate / 1e9, 100.0 * rate / ceiling_bytes);
            format!("{:<72}{micros:10.2} us {gigabytes:8.0} GB/s {percent:5.1} % of copy {tflops}", self.name)
        }
    }

    struct Bench {
        device: Device,
        gpu: CudaDevice,
        filters: Vec<String>,
        copy_rate: f64,
    }

    pub(super) fn run() -> Result<()> {
        let mut dtype = DType::BF16;
        let mut filters = Vec::new();
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--bench" => {} // what `cargo bench` adds
                "--dtype" => match args.next().as_deref() {
                    Some("f16") => dtype = DType::F16,
                    Some("bf16") => dtype = DType::BF16,
                    other => return Err(Error::input("--dtype", format!("expected f16 or bf16, got {other:?}"))),
                },
                _ => filters.push(arg),
            }
        }
        let gpu = CudaDevice::new(0, dtype)?;
        let mut bench = Bench { device: Device::Cuda(gpu.clone()), gpu, filters: Vec::new(), copy_rate: 0.0 };
        bench.copy_rate = bench.copy_rate()?;
        bench.filters = filters;
        let (name, rate) = (bench.gpu.name(), bench.copy_rate / 1e9);
        println!("{name}, kernels for sm_{}, {dtype}, copy {rate:.0} GB/s (read + written)", bench.gpu.sm());
        bench.rows()?;
        bench.attention()?;
        bench.linear()
    }

    impl Bench {
        /// Bytes per second of a copy.
        fn copy_rate(&self) -> Result<f64> {
            let (rows, width) = (65_536, 4096);
            let x = self.device.zeros(DType::F32, rows * width)?;
            let mut out = self.device.zeros(DType::F32, rows * width)?;
            let ids = self.u32s((0..rows as u32).collect())?;
            let mut copy = || self.device.gather_rows(&mut out, &x, &ids, width, rows);
            copy()?;
            let mut times = (0..REPLAYS).map(|_| self.gpu.time(&mut copy)).collect::<Result<Vec<_>>>()?;
            times.sort();
            Ok((2 * rows * width * 4) as f64 / times[REPLAYS / 2].as_secs_f64())
        }

        /// Times `op` on tensors that `make` makes, and prints a line.
        fn case<T>(
            &self,
            case: Case,
            make: impl Fn() -> Result<T>,
            op: impl Fn(&Device, &mut T) -> Result<()>,
        ) -> Result<()> {
            if !self.wants(&case.name) {
                return Ok(());
            }
            let copies = COLD_BYTES.div_ceil(case.bytes).clamp(2, 64) as usize;
            let mut sets = (0..copies).map(|_| make()).collect::<Result<Vec<T>>>()?;
            self.time_graph(&case, copies, || sets.iter_mut().try_for_each(|set| op(&self.device, set)))
        }

        fn wants(&self, name: &str) -> bool {
            self.filters.is_empty() || self.filters.iter().any(|f| name.contains(f.as_str()))
        }

        /// Times a graph of the `ops` ops that `work` enqueues, and prints a line.
        fn time_graph(&self, case: &Case, ops: usize, mut work: impl FnMut() -> Result<()>) -> Result<()> {
            work()?; // loads the kernels
            self.device.synchronize()?;
            let graph = self.gpu.capture(&mut work)?;
            graph.launch()?;
            let mut times =
                (0..REPLAYS).map(|_| self.gpu.time(|| graph.launch())).collect::<Result<Vec<Duration>>>()?;
            times.sort();
            println!("{}", case.report(times[REPLAYS / 2] / ops as u32, self.copy_rate));
            Ok(())
        }

        fn rows(&self) -> Result<()> {
            let size = self.device.activation_dtype().size_bytes();
            let dynamic = Emit { order: None, quant: ActQuant::DynamicPerToken };
            for m in [1, 64, 2048] {
                let case =
                    |name: &str, bytes: usize| Case { name: format!("{name} m={m}"), bytes: bytes as u64, flops: 0 };
                for (label, emit, out) in [("", Emit::FLOATS, size), (" -> int8", dynamic, 1)] {
                    self.case(
                        case(&format!("rms_norm{label}"), m * HIDDEN * (4 + out) + 4 * HIDDEN),
                        || Ok((self.act(m, HIDDEN)?, self.f32s(m * HIDDEN)?, self.f32s(HIDDEN)?)),
                        |d, (out, x, w)| d.rms_norm(out, x, w, 1e-5, emit, m),
                    )?;
                    self.case(
                        case(&format!("silu_mul{label}"), m * INTERMEDIATE * (2 * size + out)),
                        || Ok((self.act(m, INTERMEDIATE)?, self.activations(m * 2 * INTERMEDIATE)?)),
                        |d, (out, x)| d.silu_mul(out, x, INTERMEDIATE, emit, m),
                    )?;
                }
                self.case(
                    case("quantize -> int8", m * HIDDEN * (size + 1)),
                    || Ok((self.act(m, HIDDEN)?, self.activations(m * HIDDEN)?)),
                    |d, (out, x)| d.quantize(out, x, HIDDEN, dynamic, m),
                )?;
                let rotated = (SHAPE.num_heads + SHAPE.num_kv_heads) * SHAPE.head_dim;
                self.case(
                    case("rope", 2 * m * rotated * size),
                    || {
                        Ok((
                            self.activations(m * SHAPE.qkv_width())?,
                            self.f32s(4096 * SHAPE.head_dim)?,
                            self.u32s(vec![7; m])?,
                        ))
                    },
                    |d, (qkv, table, positions)| d.rope(qkv, table, positions, &SHAPE, m),
                )?;
                let logit_rows = m.min(64);
                let name = format!("logits_stats m={logit_rows}");
                self.case(
                    Case { name, bytes: (logit_rows * VOCAB * 4) as u64, flops: 0 },
                    || {
                        let (ids, targets) = (self.u32s(vec![0; logit_rows])?, self.u32s(vec![1; logit_rows])?);
                        Ok((ids, self.f32s(3 * logit_rows)?, self.f32s(logit_rows * VOCAB)?, targets))
                    },
                    |d, (ids, stats, logits, targets)| d.logits_stats(ids, stats, logits, targets, VOCAB, logit_rows),
                )?;
            }
            Ok(())
        }

        fn attention(&self) -> Result<()> {
            for (batch, q_len, keys) in [
                (1, 1, 512),
                (1, 1, 4096),
                (1, 1, 32_768),
                (64, 1, 1024),
                (1, 512, 512),
                (1, 4096, 4096),
                (1, 512, 8192),
            ] {
                let (m, size) = (batch * q_len, self.device.activation_dtype().size_bytes());
                let token = SHAPE.num_kv_heads * SHAPE.head_dim;
                let seen: usize = (keys - q_len..keys).map(|p| p + 1).sum();
                let case = Case {
                    name: format!("attention batch={batch} queries={q_len} keys={keys}"),
                    bytes: (batch * keys * token * 2 * size + 2 * m * SHAPE.num_heads * SHAPE.head_dim * size) as u64,
                    flops: if q_len == 1 { 0 } else { (4 * batch * seen * SHAPE.num_heads * SHAPE.head_dim) as u64 },
                };
                let make = || {
                    let cache = || self.activations(batch * keys * token);
                    let width = SHAPE.num_heads * SHAPE.head_dim;
                    let (out, qkv) = (self.activations(m * width)?, self.activations(m * SHAPE.qkv_width())?);
                    Ok((out, qkv, KvLayer { k: cache()?, v: cache()? }, self.meta(batch, q_len, keys)?))
                };
                self.case(case, make, |d, (out, qkv, cache, meta)| d.attention(out, qkv, cache, meta, &SHAPE))?;
            }
            Ok(())
        }

        fn meta(&self, batch: usize, q_len: usize, keys: usize) -> Result<BatchMeta> {
            let (m, max_blocks) = (batch * q_len, keys / SHAPE.block_size);
            Ok(BatchMeta {
                token_ids: self.u32s(vec![0; m])?,
                positions: self.u32s((0..m).map(|r| (keys - q_len + r % q_len) as u32).collect())?,
                slot_mapping: self.u32s(vec![u32::MAX; m])?,
                block_tables: self.u32s((0..(batch * max_blocks) as u32).collect())?,
                context_lens: self.u32s(vec![keys as u32; batch])?,
                cu_seqlens_q: self.u32s((0..=batch).map(|b| (b * q_len) as u32).collect())?,
                logit_rows: self.u32s(vec![0])?,
                m,
                batch,
                max_blocks,
                max_q_len: q_len,
                max_context_len: keys,
                num_logit_rows: 1,
            })
        }

        /// Layers of Llama-3.1-8B and 70B: qkv, gate and up, down, and a square one.
        fn linear(&self) -> Result<()> {
            let int8 = ActQuant::DynamicPerToken;
            let schemes = [
                ("16-bit", 16, None, ActQuant::None),
                ("w4a16 g128", 4, Some(128), ActQuant::None),
                ("w8a16 g128", 8, Some(128), ActQuant::None),
                ("w4a8 g128", 4, Some(128), int8),
                ("w8a8", 8, None, int8),
            ];
            for (scheme, bits, group_size, activation) in schemes {
                for (n, k) in [(6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192)] {
                    self.linear_shape(scheme, bits, group_size, activation, n, k)?;
                }
            }
            Ok(())
        }

        /// Every copy of the weight meets the same rows, which a producer has just left in L2.
        fn linear_shape(
            &self,
            scheme: &str,
            bits: u8,
            group_size: Option<usize>,
            activation: ActQuant,
            n: usize,
            k: usize,
        ) -> Result<()> {
            let case = |m: usize, kernel: &str| {
                let x_bytes = m * k * if activation == ActQuant::None { 2 } else { 1 };
                let weight_bytes = n * k * usize::from(bits) / 8 + group_size.map_or(0, |g| n * (k / g) * 2);
                Case {
                    name: format!("linear {scheme} m={m} n={n} k={k} {kernel}"),
                    bytes: (weight_bytes + x_bytes + m * n * 2) as u64,
                    flops: (2 * m * n * k) as u64,
                }
            };
            if !self.wants(&case(1, "").name.replace(" m=1", "")) {
                return Ok(());
            }
            let dtype = self.device.activation_dtype();
            let copies = COLD_BYTES.div_ceil(case(1, "").bytes).clamp(2, 64);
            let weights = (0..copies)
                .map(|_| self.device.pack(weight(dtype, n, k, bits, group_size, activation)))
                .collect::<Result<Vec<_>>>()?;
            let columns = Columns { offset: 0, stride: n };
            for m in [1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096] {
                let x = self.act(m, k)?;
                let mut out = self.device.zeros(dtype, m * n)?;
                self.time_graph(&case(m, &weights[0].kernel(m)), weights.len(), || {
                    weights.iter().try_for_each(|w| self.device.linear(&mut out, columns, &x, w, Write::Store, m))
                })?;
            }
            Ok(())
        }

        fn act(&self, m: usize, k: usize) -> Result<Act> {
            let codes = noise(m * k).map(|x| (x * 127.0) as i8).collect();
            Ok(Act {
                floats: self.activations(m * k)?,
                codes: self.device.upload(HostData::I8(codes))?,
                scales: self.f32s(m)?,
            })
        }

        fn activations(&self, len: usize) -> Result<Tensor> {
            self.device.upload(HostData::from_f32(self.device.activation_dtype(), noise(len).collect()))
        }

        fn f32s(&self, len: usize) -> Result<Tensor> {
            self.device.upload(HostData::F32(noise(len).collect()))
        }

        fn u32s(&self, values: Vec<u32>) -> Result<Tensor> {
            self.device.upload(HostData::U32(values))
        }
    }

    /// Noise in [-1, 1): arithmetic on zeros draws less power and runs faster than real data does.
    fn noise(len: usize) -> impl Iterator<Item = f32> {
        (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
    }

    fn weight(
        dtype: DType,
        n: usize,
        k: usize,
        bits: u8,
        group_size: Option<usize>,
        activation: ActQuant,
    ) -> LinearWeight {
        if bits == 16 {
            let data = HostData::from_f32(dtype, noise(n * k).collect());
            return LinearWeight { weight: Weight::Dense { n, k, data }, bias: None, activation };
        }
        let group_size = group_size.unwrap_or(k);
        let groups = n * (k / group_size);
        let weight = QuantWeight {
            n,
            k,
            bits,
            group_size,
            codes: (0..(n * k) as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> (32 - bits)) as u8).collect(),
            scales: vec![0.01; groups],
            zeros: vec![f32::from(1u16 << (bits - 1)); groups],
            order: None,
        };
        LinearWeight { weight: Weight::Quant(weight), bias: None, activation }
    }
}
