//! Latents that stay on the device between the steps of a run.
//!
//! Invariant: a tensor of `f32`, `[pictures, h, w, channels]`, contiguous. An array that the device could not make is lost: it
//! fetches as NaN, and [`DeviceLatents::tensor`] has the error.

use std::any::Any;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::network::{channels_first, channels_last};
use crate::rng::{Latents, Remote};

// A sum of latents is one sum of tensors.
const _: () = assert!(crate::rng::MOST_TERMS <= crate::nn::MOST_TERMS);

/// A batch of latents on a device.
#[derive(Debug)]
pub(super) struct DeviceLatents {
    made: Result<Tensor>,
    device: Device,
}

impl DeviceLatents {
    /// `latents` on `device`.
    pub(super) fn send(latents: &Latents, device: &Device) -> Latents {
        let sent = Arc::new(upload(&latents.data(), latents.shape, device));
        Latents::on_device(sent, latents.shape)
    }

    /// Wraps a network's output, `[pictures, h, w, channels]` of any type.
    pub(super) fn wrap(output: &Tensor) -> Result<Latents> {
        let (pictures, height, width, channels) = output.dims4()?;
        let made = output.to_dtype(DType::F32)?.contiguous()?;
        let device = made.device().clone();
        let made = Arc::new(Self {
            made: Ok(made),
            device,
        });
        Ok(Latents::on_device(
            made,
            [pictures, channels, height, width],
        ))
    }

    /// The tensor of latents that lie on a device; `None` on the host.
    ///
    /// # Errors
    /// What kept the device from making it.
    pub(super) fn tensor(latents: &Latents) -> Option<Result<Tensor>> {
        let array = latents.remote()?;
        let own = array.as_any().downcast_ref::<Self>()?;
        Some(match &own.made {
            Ok(tensor) => Ok(tensor.clone()),
            Err(error) => Err(candle_core::Error::msg(error)),
        })
    }

    fn make(&self, made: Result<Tensor>) -> Arc<dyn Remote> {
        let device = self.device.clone();
        Arc::new(Self { made, device })
    }
}

fn upload(values: &[f32], shape: [usize; 4], device: &Device) -> DeviceLatents {
    let [pictures, channels, height, width] = shape;
    let values = channels_last(values, shape);
    let made = Tensor::from_vec(values, (pictures, height, width, channels), device);
    let device = device.clone();
    DeviceLatents { made, device }
}

impl Remote for DeviceLatents {
    fn sum(&self, terms: &[(f32, Arc<dyn Remote>)]) -> Arc<dyn Remote> {
        let tensors = terms.iter().map(|(c, array)| {
            let own = array.as_any().downcast_ref::<Self>();
            match own.map(|own| &own.made) {
                Some(Ok(tensor)) => Ok((*c, tensor)),
                Some(Err(error)) => Err(candle_core::Error::msg(error)),
                None => Err(candle_core::Error::msg("latents of another kind of device")),
            }
        });
        let tensors = tensors.collect::<Result<Vec<_>>>();
        self.make(tensors.and_then(|terms| crate::nn::combine(&terms)))
    }

    fn upload(&self, values: &[f32], shape: [usize; 4]) -> Arc<dyn Remote> {
        Arc::new(upload(values, shape, &self.device))
    }

    fn fetch(&self, shape: [usize; 4]) -> Vec<f32> {
        let values = self
            .made
            .as_ref()
            .ok()
            .and_then(|tensor| tensor.flatten_all().and_then(|flat| flat.to_vec1()).ok());
        match values {
            Some(values) => channels_first(&values, shape),
            None => vec![f32::NAN; shape.iter().product()],
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
