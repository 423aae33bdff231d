//! What the UNet computes once for all steps of a prompt.

use candle_core::{Result, Tensor};

/// What all steps of one prompt share.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Keys and values of the text for each transformer block, in the order of the forward pass.
    pub(super) context: Vec<Tensor>,
    /// Embedding of the pooled text and the sizes, `[batch, embedding]`.
    pub(super) label: Tensor,
}

impl Conditioning {
    /// Each row `pictures` times in a row: the conditioning of `rows * pictures` batch entries.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn repeat_rows(self, pictures: usize) -> Result<Self> {
        if pictures == 1 {
            return Ok(self);
        }
        let rows = self.label.dim(0)?;
        let index: Vec<u32> = (0..rows * pictures)
            .map(|i| (i / pictures) as u32)
            .collect();
        let index = Tensor::from_vec(index, rows * pictures, self.label.device())?;
        let context = self
            .context
            .iter()
            .map(|kv| kv.index_select(&index, 0))
            .collect::<Result<_>>()?;
        Ok(Self {
            context,
            label: self.label.index_select(&index, 0)?,
        })
    }
}
