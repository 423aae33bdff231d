//! Schedules and solvers over a denoiser.

/// A sampler, by A1111's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sampler {
    /// Euler.
    Euler,
}

/// A sigma schedule, by A1111's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scheduler {
    /// The sampler's own.
    #[default]
    Automatic,
}

/// Numbers of the solver.
#[derive(Debug, Clone, Default)]
pub struct SamplerOptions {}
