//! Random weights, made while they are written.

use std::io::{self, Write};

use crate::gguf::ALIGNMENT;
use crate::spec::Quantization;
use crate::tensor::Tensor;

/// What a tensor is filled with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Filling {
    /// Ones, for norms.
    Ones,
    /// The same number everywhere, in F32.
    Constant(f32),
    /// Passes the first part of its input on as it is, in F32.
    Identity,
    /// Evenly spread with standard deviation `gain / sqrt(length of a row)`, which keeps activations near one.
    Random { gain: f32 },
}

/// Writes a tensor's data and its padding, rows for which `silent` holds as zeros. Returns the bytes written.
pub(crate) fn write(out: &mut impl Write, tensor: &Tensor, seed: u64, silent: impl Fn(u64) -> bool) -> io::Result<u64> {
    let columns = tensor.shape.first().copied().unwrap_or(0);
    let row_bytes = tensor.kind.bytes(columns);
    let mut row = vec![0u8; usize::try_from(row_bytes).map_err(io::Error::other)?];
    let mut random = SplitMix::new(seed, &tensor.name);
    #[expect(clippy::cast_precision_loss, reason = "a row's length only scales the weights")]
    let deviation = |gain: f32| gain / (columns as f32).sqrt();
    for number in 0..tensor.rows() {
        match tensor.filling {
            _ if silent(number) => row.fill(0),
            Filling::Constant(value) => {
                row.chunks_exact_mut(4).for_each(|one| one.copy_from_slice(&value.to_le_bytes()));
            }
            Filling::Identity => {
                row.fill(0);
                let place = usize::try_from(number).unwrap_or(usize::MAX);
                if let Some(one) = row.chunks_exact_mut(4).nth(place) {
                    one.copy_from_slice(&1f32.to_le_bytes());
                }
            }
            Filling::Ones => row.chunks_exact_mut(4).for_each(|one| one.copy_from_slice(&1f32.to_le_bytes())),
            Filling::Random { gain } => fill(&mut row, tensor.kind, deviation(gain), &mut random),
        }
        out.write_all(&row)?;
    }
    let bytes = row_bytes * tensor.rows();
    let padded = bytes.next_multiple_of(ALIGNMENT);
    for _ in bytes..padded {
        out.write_all(&[0])?;
    }
    Ok(padded)
}

/// Standard deviation of an evenly spread value in -1..1.
const EVEN: f32 = 0.577_35;

fn fill(row: &mut [u8], kind: Quantization, deviation: f32, random: &mut SplitMix) {
    match kind {
        Quantization::F32 => {
            for weight in row.chunks_exact_mut(4) {
                weight.copy_from_slice(&(random.even() * deviation / EVEN).to_le_bytes());
            }
        }
        Quantization::F16 => {
            for weight in row.chunks_exact_mut(2) {
                weight.copy_from_slice(&half(random.even() * deviation / EVEN).to_le_bytes());
            }
        }
        // A scale in half precision, then the block's 32 weights as random integers.
        Quantization::Q8_0 => fill_blocks(row, 34, half(deviation / EVEN / 128.0), random),
        Quantization::Q4_0 => fill_blocks(row, 18, half(deviation / EVEN / 8.0), random),
    }
}

fn fill_blocks(row: &mut [u8], block_bytes: usize, scale: u16, random: &mut SplitMix) {
    for block in row.chunks_exact_mut(block_bytes) {
        let (head, integers) = block.split_at_mut(2);
        head.copy_from_slice(&scale.to_le_bytes());
        for eight in integers.chunks_exact_mut(8) {
            eight.copy_from_slice(&random.next().to_le_bytes());
        }
    }
}

/// IEEE half precision, rounded down; what is too small for it becomes zero.
fn half(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let exponent = ((bits >> 23) & 0xff).saturating_sub(112);
    let joined = if exponent == 0 { sign } else { sign | (exponent.min(30) << 10) | ((bits >> 13) & 0x3ff) };
    u16::try_from(joined).unwrap_or(0)
}

/// `SplitMix64`: ours and not a crate's, because a file's bytes must not change when a dependency is raised.
struct SplitMix(u64);

impl SplitMix {
    /// A stream of its own per tensor, so that one more layer leaves the others as they are.
    fn new(seed: u64, name: &str) -> Self {
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        Self(hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly spread in -1..1.
    fn even(&mut self) -> f32 {
        #[expect(clippy::cast_precision_loss, reason = "24 bits fit exactly")]
        let unit = (self.next() >> 40) as f32 / 8_388_608.0;
        unit - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_has_the_right_bits() {
        for (value, bits) in [(1.0, 0x3c00), (-2.0, 0xc000), (0.5, 0x3800), (1.5, 0x3e00), (0.0, 0), (1e-9, 0)] {
            assert_eq!(half(value), bits, "{value}");
        }
    }

    #[test]
    fn even_numbers_stay_in_range_and_average_to_zero() {
        let mut random = SplitMix::new(3, "x");
        let drawn: Vec<f32> = (0..10_000).map(|_| random.even()).collect();
        assert!(drawn.iter().all(|v| (-1.0..1.0).contains(v)));
        let mean = drawn.iter().sum::<f32>() / 10_000.0;
        assert!(mean.abs() < 0.02, "{mean}");
    }
}
