//! From named tensors to layers: each call checks the shape the architecture needs and names key, expectation and find when
//! it does not fit.

use crate::nn::{Conv2d, GroupNorm, LayerNorm, Linear, Origin, Placement, Sampling, Storage, Then};
use crate::weights::{Error, Held, Source, Tensors};

/// Tensors below a prefix, and where the layers made of them live.
#[derive(Clone)]
pub(super) struct Build<'a> {
    pub(super) tensors: Tensors<'a>,
    pub(super) place: &'a Placement,
    /// Of linear layers.
    storage: Storage,
}

/// Whether a layer has a bias.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Bias {
    With,
    Without,
}

impl<'a> Build<'a> {
    pub(super) fn new(source: &'a dyn Source, prefix: &str, place: &'a Placement) -> Self {
        Self {
            tensors: Tensors::new(source, prefix),
            place,
            storage: Storage::Wide,
        }
    }

    /// Linear layers from here on are over tokens.
    pub(super) fn over_tokens(&self) -> Self {
        Self {
            storage: self.place.storage,
            ..self.clone()
        }
    }

    pub(super) fn sub(&self, name: impl std::fmt::Display) -> Self {
        Self {
            tensors: self.tensors.sub(name),
            ..self.clone()
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.has(name)
    }

    /// First dimension of a tensor.
    pub(super) fn width(&self, name: &str) -> Result<usize, Error> {
        match self.tensors.shape(name)?.first() {
            Some(&n) if n > 0 => Ok(n),
            _ => Err(self.tensors.unfit(name, "it is empty")),
        }
    }

    /// A linear layer, or a 1x1 convolution, which is the same thing channels-last.
    pub(super) fn linear(
        &self,
        name: &str,
        [outputs, inputs]: [usize; 2],
        bias: Bias,
        then: Then,
    ) -> Result<Linear, Error> {
        self.stacked(&[(name, outputs)], inputs, bias, then)
    }

    /// Several linear layers of the same sizes and input as one product, outputs side by side.
    pub(super) fn fused(
        &self,
        names: &[&str],
        [outputs, inputs]: [usize; 2],
        bias: Bias,
        then: Then,
    ) -> Result<Linear, Error> {
        let layers: Vec<_> = names.iter().map(|name| (*name, outputs)).collect();
        self.stacked(&layers, inputs, bias, then)
    }

    /// Linear layers, each with its number of outputs, of the same input as one product, outputs side by side.
    pub(super) fn stacked(
        &self,
        layers: &[(&str, usize)],
        inputs: usize,
        bias: Bias,
        then: Then,
    ) -> Result<Linear, Error> {
        let (mut held, mut shift, mut origins) = (Vec::new(), Vec::new(), Vec::new());
        let mut rows = 0;
        for &(name, outputs) in layers {
            let key = format!("{name}.weight");
            origins.extend(self.origin(&key, rows, outputs));
            rows += outputs;
            let as_convolution = self.tensors.shape(&key)?.len() == 4;
            let shape: &[usize] = if as_convolution {
                &[outputs, inputs, 1, 1]
            } else {
                &[outputs, inputs]
            };
            held.push(self.tensors.hold(&key, shape)?);
            if bias == Bias::With {
                shift.extend(self.tensors.read(&format!("{name}.bias"), &[outputs])?);
            }
        }
        let pieces: Vec<_> = held.iter().map(Held::values).collect();
        let shift = (bias == Bias::With).then_some(shift.as_slice());
        let build = match self.storage {
            Storage::Wide => Linear::stacked,
            Storage::E4m3 => Linear::e4m3,
        };
        Ok(build(self.place, &pieces, rows, shift, then)?.made_from(origins))
    }

    /// What a layer remembers of the tensor behind some of its rows.
    pub(super) fn origin(&self, name: &str, first_row: usize, rows: usize) -> Vec<Origin> {
        vec![Origin {
            key: self.tensors.key(name),
            first_row,
            rows,
        }]
    }

    pub(super) fn conv(
        &self,
        name: &str,
        [outputs, inputs]: [usize; 2],
        sampling: Sampling,
    ) -> Result<Conv2d, Error> {
        self.convolution(name, [outputs, inputs, 3], sampling)
    }

    /// A convolution with a kernel of any size.
    pub(super) fn convolution(
        &self,
        name: &str,
        [outputs, inputs, kernel]: [usize; 3],
        sampling: Sampling,
    ) -> Result<Conv2d, Error> {
        let weight_key = format!("{name}.weight");
        let shape = [outputs, inputs, kernel, kernel];
        let weight = self.tensors.hold(&weight_key, &shape)?;
        let key = format!("{name}.bias");
        let bias = if self.has(&key) {
            Some(self.tensors.read(&key, &[outputs])?)
        } else {
            None
        };
        Ok(Conv2d::stored(
            self.place,
            weight.values(),
            [outputs, inputs, kernel],
            bias.as_deref(),
            sampling,
        )?
        .made_from(self.origin(&weight_key, 0, outputs)))
    }

    pub(super) fn group_norm(
        &self,
        name: &str,
        channels: usize,
        eps: f32,
    ) -> Result<GroupNorm, Error> {
        let key = format!("{name}.weight");
        if channels == 0 || !channels.is_multiple_of(32) {
            return Err(self.tensors.unfit(
                &key,
                format!("{channels} channels do not divide into 32 groups"),
            ));
        }
        let weight = self.tensors.read(&key, &[channels])?;
        let bias = self.tensors.read(&format!("{name}.bias"), &[channels])?;
        let norm = GroupNorm::new(self.place, &weight, &bias, eps)?;
        Ok(norm.made_from(self.origin(&key, 0, channels)))
    }

    pub(super) fn layer_norm(&self, name: &str, channels: usize) -> Result<LayerNorm, Error> {
        let key = format!("{name}.weight");
        let weight = self.tensors.read(&key, &[channels])?;
        let bias = self.tensors.read(&format!("{name}.bias"), &[channels])?;
        let norm = LayerNorm::new(self.place, &weight, &bias)?;
        Ok(norm.made_from(self.origin(&key, 0, channels)))
    }

    /// Attention heads of `channels`, at the file's head size.
    pub(super) fn heads(&self, name: &str, channels: usize) -> Result<usize, Error> {
        let head_dim = head_dim(self.tensors.source());
        if channels == 0 || !channels.is_multiple_of(head_dim) {
            return Err(self.tensors.unfit(
                name,
                format!("{channels} channels do not divide into heads of {head_dim}"),
            ));
        }
        Ok(channels / head_dim)
    }
}

/// Channels of an attention head: 64, unless the file's metadata says otherwise.
fn head_dim(source: &dyn Source) -> usize {
    source
        .metadata("sdgen.head_dim")
        .and_then(|v| v.parse().ok())
        .filter(|&d| d > 0)
        .unwrap_or(64)
}
