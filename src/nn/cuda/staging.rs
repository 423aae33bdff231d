//! From a file's pages to the card: pinned memory is filled by several threads while the piece before is on its way.
//!
//! Invariants: a piece of pinned memory is written only after the card has read it (its event tells); copies go to the engine's
//! stream, so whatever is queued later sees the whole tensor. The memory stays with the engine: pinning it costs more than a
//! copy from it.
#![allow(unsafe_code, reason = "copies to the device while the host goes on")]

use candle_core::cuda_backend::WrapErr;
use candle_core::{Result, Tensor};
use cudarc::driver::{CudaEvent, PinnedHostSlice, result};
use half::{bf16, f16};

use super::engine::Engine;
use super::geometry::Kind;
use super::operand::result as result_tensor;
use crate::nn::stored::Piece;

/// Bytes copied at a time: some 0.3 ms of the bus, which hides the cost of a copy.
pub(super) const PIECE: usize = 16 << 20;
/// Pieces: one on its way, one being filled, one between them.
const PIECES: usize = 3;

/// Pinned memory in pieces, used in turn.
pub(super) struct Staging {
    pieces: Vec<Pinned>,
    next: usize,
}

struct Pinned {
    memory: PinnedHostSlice<u8>,
    /// Recorded behind the last copy from `memory`.
    copied: CudaEvent,
}

impl Staging {
    fn new(engine: &Engine) -> Result<Self> {
        let context = engine.stream().context();
        let mut pieces = Vec::with_capacity(PIECES);
        for _ in 0..PIECES {
            // SAFETY: every copy takes only bytes that were written before.
            let memory = unsafe { context.alloc_pinned::<u8>(PIECE) }.w()?;
            let copied = context.new_event(None).w()?;
            pieces.push(Pinned { memory, copied });
        }
        Ok(Self { pieces, next: 0 })
    }
}

/// A tensor `[rows, columns]`, a row being no longer than [`PIECE`]; `fill` gets the number of a first row and the rows from there on.
pub(super) fn tensor(
    engine: &mut Engine,
    kind: Kind,
    [rows, columns]: [usize; 2],
    fill: &dyn Fn(usize, Piece<'_>),
) -> Result<Tensor> {
    let out = result_tensor(engine.device(), kind, &[rows, columns])?;
    let mut staging = match engine.staging.take() {
        Some(staging) => staging,
        None => Staging::new(engine)?,
    };
    let row = columns * kind.bytes();
    let step = (PIECE / row).max(1);
    let mut queue = || -> Result<()> {
        for first in (0..rows).step_by(step) {
            let len = step.min(rows - first) * row;
            let at = out.address() + (first * row) as u64;
            staging.copy(engine, kind, (at, len), |piece| fill(first, piece))?;
        }
        Ok(())
    };
    let queued = queue();
    engine.staging = Some(staging);
    queued?;
    Ok(out.into())
}

impl Staging {
    /// Fills the next piece with `len` bytes and queues their copy to `at`.
    fn copy(
        &mut self,
        engine: &Engine,
        kind: Kind,
        (at, len): (u64, usize),
        fill: impl FnOnce(Piece<'_>),
    ) -> Result<()> {
        let pinned = &mut self.pieces[self.next];
        self.next = (self.next + 1) % PIECES;
        pinned.copied.synchronize().w()?;
        let bytes = &mut pinned.memory.as_mut_slice().w()?[..len];
        // SAFETY: pinned memory begins on a page, and any bits are a value of each type.
        unsafe {
            match kind {
                Kind::F32 => fill(Piece::F32(bytes.align_to_mut::<f32>().1)),
                Kind::F16 => fill(Piece::F16(bytes.align_to_mut::<f16>().1)),
                Kind::Bf16 => fill(Piece::Bf16(bytes.align_to_mut::<bf16>().1)),
            }
        }
        // SAFETY: `at` is the address of as many bytes of a live tensor, and the piece is not touched before its event.
        unsafe { result::memcpy_htod_async(at, bytes, engine.stream().cu_stream()) }.w()?;
        pinned.copied.record(engine.stream()).w()
    }
}
