//! The three ways in which RRDB networks name their layers.
//!
//! | role | ESRGAN's sequence | BSRGAN, `RealSR` | Real-ESRGAN |
//! | --- | --- | --- | --- |
//! | first | `model.0` | `conv_first` | `conv_first` |
//! | block n | `model.1.sub.n.RDB1.conv1.0` | `RRDB_trunk.n.RDB1.conv1` | `body.n.rdb1.conv1` |
//! | after blocks | `model.1.sub.N` | `trunk_conv` | `conv_body` |
//! | upsampling i | `model.3i` | `upconvi` | `conv_upi` |
//! | high resolution | `model.(3U+2)` | `HRconv` | `conv_hr` |
//! | last | `model.(3U+4)` | `conv_last` | `conv_last` |

use crate::weights::Source;

/// Blocks that are looked for; the largest published network has 23.
const MOST_BLOCKS: usize = 1000;

/// Which of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Sequence,
    Trunk,
    Body,
}

/// The names of one file's layers, and how many there are.
#[derive(Debug)]
pub(super) struct Names {
    style: Style,
    prefix: String,
    /// Residual-in-residual dense blocks.
    pub(super) blocks: usize,
    /// Doublings of the size.
    pub(super) upsamplings: usize,
}

impl Names {
    /// The names below `prefix`, if they are those of an RRDB network.
    pub(super) fn recognise(source: &dyn Source, prefix: &str) -> Option<Self> {
        [Style::Sequence, Style::Trunk, Style::Body]
            .into_iter()
            .map(|style| Self {
                style,
                prefix: prefix.into(),
                blocks: 0,
                upsamplings: 0,
            })
            .find(|names| source.shape(&names.weight(&names.dense(0, 1, 1))).is_some())
            .map(|mut names| {
                let has = |name: String| source.shape(&names.weight(&name)).is_some();
                let blocks = (0..MOST_BLOCKS)
                    .take_while(|n| has(names.dense(*n, 1, 1)))
                    .count();
                let upsamplings = (1..8).take_while(|i| has(names.upsampling(*i)));
                (names.blocks, names.upsamplings) = (blocks, upsamplings.count());
                names
            })
    }

    fn weight(&self, name: &str) -> String {
        format!("{}{name}.weight", self.prefix)
    }

    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(super) fn first(&self) -> String {
        match self.style {
            Style::Sequence => "model.0".into(),
            Style::Trunk | Style::Body => "conv_first".into(),
        }
    }

    /// Layer `layer` (1 to 5) of dense block `dense` (1 to 3) of block `block`.
    pub(super) fn dense(&self, block: usize, dense: usize, layer: usize) -> String {
        match self.style {
            Style::Sequence => format!("model.1.sub.{block}.RDB{dense}.conv{layer}.0"),
            Style::Trunk => format!("RRDB_trunk.{block}.RDB{dense}.conv{layer}"),
            Style::Body => format!("body.{block}.rdb{dense}.conv{layer}"),
        }
    }

    /// ESRGAN+'s shortcut through a dense block.
    pub(super) fn shortcut(&self, block: usize, dense: usize) -> String {
        match self.style {
            Style::Sequence => format!("model.1.sub.{block}.RDB{dense}.conv1x1"),
            Style::Trunk => format!("RRDB_trunk.{block}.RDB{dense}.conv1x1"),
            Style::Body => format!("body.{block}.rdb{dense}.conv1x1"),
        }
    }

    pub(super) fn after_blocks(&self) -> String {
        match self.style {
            Style::Sequence => format!("model.1.sub.{}", self.blocks),
            Style::Trunk => "trunk_conv".into(),
            Style::Body => "conv_body".into(),
        }
    }

    /// Upsampling `i`, from 1 on.
    pub(super) fn upsampling(&self, i: usize) -> String {
        match self.style {
            Style::Sequence => format!("model.{}", 3 * i),
            Style::Trunk => format!("upconv{i}"),
            Style::Body => format!("conv_up{i}"),
        }
    }

    pub(super) fn high_resolution(&self) -> String {
        match self.style {
            Style::Sequence => format!("model.{}", 3 * self.upsamplings + 2),
            Style::Trunk => "HRconv".into(),
            Style::Body => "conv_hr".into(),
        }
    }

    pub(super) fn last(&self) -> String {
        match self.style {
            Style::Sequence => format!("model.{}", 3 * self.upsamplings + 4),
            Style::Trunk | Style::Body => "conv_last".into(),
        }
    }
}
