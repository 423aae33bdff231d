//! Scaled dot-product attention: one entry for self-attention, one for cross-attention; each picks the fused body where
//! there is one.

use candle_core::{D, Result, Tensor};

use super::{cuda, kernels, reference};

/// Whether a token sees the tokens after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// All tokens see each other.
    Full,
    /// A token sees itself and what comes before.
    Causal,
}

/// Attention of tokens among themselves: `[batch, tokens, 3 * channels]` (queries, keys, values side by side, heads side by
/// side within each) to `[batch, tokens, channels]`.
///
/// # Errors
/// On shapes that do not fit.
pub fn self_attention(qkv: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    let causal = mask == Mask::Causal;
    if kernels::fuses_on(qkv) {
        return qkv.apply_op1_no_bwd(&kernels::Attention { heads, causal });
    }
    if let Some(y) = cuda::self_attention(qkv, heads, mask) {
        return y;
    }
    let parts = qkv.chunk(3, D::Minus1)?;
    reference::attention(&parts[0], &parts[1], &parts[2], heads, causal)
}

/// Attention of `q` `[batch, tokens, channels]` to `kv` `[batch, context tokens, 2 * channels]` (keys, values side by side).
///
/// # Errors
/// On shapes that do not fit.
pub fn cross_attention(q: &Tensor, kv: &Tensor, heads: usize) -> Result<Tensor> {
    if kernels::fuses_on(q) {
        return q.apply_op2_no_bwd(
            kv,
            &kernels::Attention {
                heads,
                causal: false,
            },
        );
    }
    if let Some(y) = cuda::cross_attention(q, kv, heads) {
        return y;
    }
    let parts = kv.chunk(2, D::Minus1)?;
    reference::attention(q, &parts[0], &parts[1], heads, false)
}
