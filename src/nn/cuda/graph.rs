//! A long row of launches, recorded once per shape as a CUDA graph and replayed with one call.
//!
//! The first run of a shape is an ordinary one: it makes the plans, which cannot be made while recording. The second records; from then
//! on only the inputs are copied, those that are new. Invariants: a recording reads and writes addresses of its own (its inputs, its
//! output, the weights, the engine's workspace) and frees what it allocates, so it can be run any number of times; weights
//! are rewritten in place, so a `LoRA` needs no new recording. What cannot be recorded runs launch by launch, with one line in the log.
#![allow(unsafe_code, reason = "graphs of the driver move with their owner")]

use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Error, Result, Tensor, TensorId};
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{
    self, CUevent_flags, CUgraphInstantiate_flags, CUgraphNodeType, CUstreamCaptureMode,
};

use super::Recording;
use super::operand::{taken, uninitialised};

/// Shapes kept: two sizes, each with and without the negative prompt.
const KEPT: usize = 4;

/// The recordings of one network.
#[derive(Default)]
pub struct Replay {
    shapes: Mutex<Vec<(Key, State)>>,
}

/// What a recording is made for: shapes and types of the inputs, and whatever else changes the launches.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    inputs: Vec<(Vec<usize>, DType)>,
    variant: u64,
}

enum State {
    /// Has run, with a result of this shape and type.
    Seen(Vec<usize>, DType),
    Recorded(Box<Recorded>),
    /// Cannot be recorded.
    Refused,
}

struct Recorded {
    graph: CudaGraph,
    /// What lies in each input, and where.
    inputs: Vec<(TensorId, Tensor)>,
    output: Tensor,
}

// SAFETY: the driver allows a graph in any thread, one at a time; the mutex around it sees to that.
unsafe impl Send for Recorded {}

impl std::fmt::Debug for Replay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Replay")
    }
}

impl Replay {
    /// `body` of `inputs`, replayed where that is possible. `variant` tells apart what shapes do not.
    ///
    /// # Errors
    /// Whatever `body` fails with, and the driver's.
    pub fn run(
        &self,
        inputs: &[&Tensor],
        variant: u64,
        body: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let plainly = || body(&inputs.iter().map(|&x| x.clone()).collect::<Vec<_>>());
        let Some((device, _)) = inputs.first().and_then(|x| taken(x)) else {
            return plainly();
        };
        let key = Key {
            inputs: inputs
                .iter()
                .map(|x| (x.dims().to_vec(), x.dtype()))
                .collect(),
            variant,
        };
        let mut shapes = self.shapes.lock().unwrap_or_else(PoisonError::into_inner);
        let at = shapes.iter().position(|(known, _)| *known == key);
        // The last one used stands last.
        let state = at.map(|at| shapes.remove(at).1);
        let (state, output) = match state {
            None => {
                let _uploads = device.enable_cuda_graph_htod_cache();
                let output = plainly()?;
                (State::Seen(output.dims().to_vec(), output.dtype()), output)
            }
            Some(State::Seen(shape, dtype)) => match record(device, inputs, (&shape, dtype), &body)
            {
                Ok(mut recorded) => {
                    let output = recorded.replay(inputs)?;
                    (State::Recorded(recorded), output)
                }
                Err(error) => {
                    tracing::warn!(%error, "no CUDA graph of this shape; it runs launch by launch");
                    (State::Refused, plainly()?)
                }
            },
            Some(State::Recorded(mut recorded)) => {
                let output = recorded.replay(inputs)?;
                (State::Recorded(recorded), output)
            }
            Some(State::Refused) => (State::Refused, plainly()?),
        };
        if shapes.len() == KEPT {
            shapes.remove(0);
        }
        shapes.push((key, state));
        Ok(output)
    }

    /// The recording that ran last, run `runs` times more on the inputs it has; `None` if the last shape has none.
    ///
    /// # Errors
    /// The driver's.
    pub fn measure(&self, runs: usize) -> Result<Option<Recording>> {
        let shapes = self.shapes.lock().unwrap_or_else(PoisonError::into_inner);
        match shapes.last() {
            Some((_, State::Recorded(recorded))) => recorded.measure(runs).map(Some),
            _ => Ok(None),
        }
    }

    /// Drops every recording with its memory.
    pub fn forget(&self) {
        self.shapes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

fn record(
    device: &CudaDevice,
    inputs: &[&Tensor],
    (shape, dtype): (&[usize], DType),
    body: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Box<Recorded>> {
    let stream = device.cuda_stream();
    let own = inputs
        .iter()
        .map(|x| x.force_contiguous())
        .collect::<Result<Vec<_>>>()?;
    let output = Tensor::from(uninitialised(device, dtype, shape)?);
    let _uploads = device.enable_cuda_graph_htod_cache();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).w()?;
    // The result and all between live and die inside the recording.
    let done = body(&own).and_then(|result| output.slice_set(&result, 0, 0));
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).w();
    if done.is_err() || graph.is_err() {
        // What failed while recording has been told; the next launch must not be told again.
        let _ = stream.context().check_err();
    }
    done?;
    let graph = graph?.ok_or_else(|| Error::msg("the recording is empty"))?;
    graph.upload().w()?;
    let inputs = inputs
        .iter()
        .zip(own)
        .map(|(x, own)| (x.id(), own))
        .collect();
    Ok(Box::new(Recorded {
        graph,
        inputs,
        output,
    }))
}

impl Recorded {
    /// Counts its nodes and times it. One run goes ahead, so that the card has work while the next are queued.
    fn measure(&self, runs: usize) -> Result<Recording> {
        let Some((device, _)) = taken(&self.output) else {
            candle_core::bail!("a recording on another device")
        };
        let stream = device.cuda_stream();
        let event = || {
            let flags = CUevent_flags::CU_EVENT_DEFAULT;
            stream.context().new_event(Some(flags)).w()
        };
        let (begin, end) = (event()?, event()?);
        self.graph.launch().w()?;
        begin.record(&stream).w()?;
        for _ in 0..runs {
            self.graph.launch().w()?;
        }
        end.record(&stream).w()?;
        let seconds = f64::from(begin.elapsed_ms(&end).w()?) / 1e3 / runs.max(1) as f64;
        let (kernels, nodes) = self.nodes()?;
        Ok(Recording {
            kernels,
            nodes,
            seconds,
        })
    }

    /// Launches of kernels, and nodes of all kinds.
    fn nodes(&self) -> Result<(usize, usize)> {
        let (graph, mut count) = (self.graph.cu_graph(), 0);
        // SAFETY: a graph that lives; without room for them the nodes are only counted, and then there is room for all.
        let nodes = unsafe {
            sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &raw mut count)
                .result()
                .w()?;
            let mut nodes = vec![std::ptr::null_mut(); count];
            sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &raw mut count)
                .result()
                .w()?;
            nodes
        };
        let mut kernels = 0;
        for node in &nodes {
            let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            // SAFETY: a node of that graph.
            unsafe { sys::cuGraphNodeGetType(*node, &raw mut kind) }
                .result()
                .w()?;
            kernels += usize::from(kind == CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL);
        }
        Ok((kernels, nodes.len()))
    }

    /// Copies the inputs that are new, runs, and copies the result out, since the next run overwrites it.
    fn replay(&mut self, inputs: &[&Tensor]) -> Result<Tensor> {
        for (x, (id, own)) in inputs.iter().zip(&mut self.inputs) {
            if x.id() != *id {
                own.slice_set(&x.contiguous()?, 0, 0)?;
                *id = x.id();
            }
        }
        self.graph.launch().w()?;
        self.output.force_contiguous()
    }
}
