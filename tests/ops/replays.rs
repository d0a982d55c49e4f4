//! What ops of several blocks share on a GPU is as they found it: a graph gives the same bits a thousand times, also beside
//! another device of the same GPU.

use lowbit::device::cuda::CudaDevice;
use lowbit::device::{Columns, Device, LinearInput, PackedWeight, Tensor, Write};
use lowbit::dtype::DType;
use lowbit::error::Result;
use lowbit::quant::ActQuant;

use super::{activations, cuda_devices, poisoned_act, read};
use crate::common::random::{Random, WeightCase};
use crate::common::tolerance::assert_exact;

const REPLAYS: usize = 1000;

/// A layer with its input on one device.
struct Layer {
    device: Device,
    weight: PackedWeight,
    x: LinearInput,
    m: usize,
}

impl Layer {
    fn new(device: &Device, m: usize, case: WeightCase) -> Layer {
        let mut random = Random::new(m as u64);
        let weight = device.pack(random.weight(case)).expect("pack");
        let (floats, _) = activations(device, &random.normals(m * case.k));
        let mut x = poisoned_act(device, m, case.k);
        device.quantize(&mut x, &floats, case.k, weight.input_format(), m).expect("quantize");
        Layer { device: device.clone(), weight, x, m }
    }

    fn gpu(&self) -> &CudaDevice {
        let Device::Cuda(gpu) = &self.device else { panic!("a CUDA device") };
        gpu
    }

    fn zeros(&self) -> Tensor {
        self.device.zeros(DType::F32, self.m * self.weight.n).expect("zeros")
    }

    fn add_to(&self, sum: &mut Tensor) -> Result<()> {
        let columns = Columns { offset: 0, stride: self.weight.n };
        self.device.linear(sum, columns, &self.x, &self.weight, Write::Add, self.m)
    }

    fn read(&self, sum: &Tensor) -> Vec<f32> {
        read(&self.device, sum, self.m * self.weight.n)
    }
}

/// Each replay adds the product to what is there: one that differs by a bit shows in the sum.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_graphs_of_two_devices_at_once() {
    let case = WeightCase {
        n: 520,
        k: 4096,
        bits: 4,
        group_size: 128,
        symmetric: false,
        act_order: false,
        bias: false,
        activation: ActQuant::None,
    };
    // Where sums are split among blocks, there are few outputs and many inputs.
    for (m, bits) in [(1, 4), (9, 4), (16, 8), (24, 4), (40, 4), (65, 8), (130, 4), (300, 4)] {
        let layers: Vec<Layer> =
            cuda_devices().iter().map(|device| Layer::new(device, m, WeightCase { bits, ..case })).collect();
        let mut sums: Vec<Tensor> = layers.iter().map(Layer::zeros).collect();
        let mut expected = Vec::new();
        for (layer, sum) in layers.iter().zip(&mut sums) {
            layer.add_to(sum).expect("linear");
            let product = layer.read(sum);
            let add = |sum: Vec<f32>, _| sum.iter().zip(&product).map(|(a, b)| a + b).collect();
            expected.push((0..REPLAYS).fold(product.clone(), add));
        }
        {
            let both = layers.iter().zip(&mut sums);
            let graphs: Vec<_> =
                both.map(|(layer, sum)| layer.gpu().capture(move || layer.add_to(sum)).expect("capture")).collect();
            for graph in (0..REPLAYS).flat_map(|_| &graphs) {
                graph.launch().expect("launch");
            }
        }
        for ((layer, sum), expected) in layers.iter().zip(&sums).zip(&expected) {
            let what = format!("{} m={m} bits={bits}", layer.weight.kernel(m));
            assert_exact(&what, &layer.read(sum), expected);
        }
    }
}
