//! Scripts that turn one job into several runs of the pipeline: whole jobs in a row, loopback, SD upscale.
//!
//! Invariants: however many runs there are, the observer sees one job whose batches count through all of them, an interrupt
//! ends them all, and every result carries its own seed and infotext. Follows `prompts_from_file.py`, `loopback.py` and
//! `sd_upscale.py` of A1111 1.10.

use std::f64::consts::FRAC_PI_2;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use image::RgbImage;

use super::seeds::{seeds, subseeds};
use super::upscale::tiles::{Joined, Tiles};
use super::upscale::{PictureUpscaler, Upscaling};
use super::{
    Control, Error, GenerateRequest, Generated, GeneratedImage, InitImage, MaskedContent, Observer,
    Pipeline, Progress, Timings,
};
use crate::imaging::infotext::Params;

/// What is done with a request besides running it once.
#[derive(Debug, Clone)]
pub enum Script {
    /// These jobs one after another in place of the request; shared, so that a job can be cloned.
    Jobs(Arc<Vec<GenerateRequest>>),
    /// Each result is the next run's picture.
    Loopback(Loopback),
    /// The picture is enlarged and painted anew piece by piece.
    SdUpscale(SdUpscale),
}

/// How often a picture goes round, and how much of it is left each time.
#[derive(Debug, Clone, PartialEq)]
pub struct Loopback {
    /// Runs of one batch.
    pub loops: usize,
    /// Denoising strength of the last run; the request's is that of the first.
    pub final_strength: f64,
    /// How the strength gets from one to the other.
    pub curve: Curve,
}

/// How a denoising strength changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    /// Fast at first.
    Aggressive,
    /// Evenly.
    Linear,
    /// Fast at last.
    Lazy,
}

/// How a picture is enlarged and cut.
#[derive(Debug, Clone, PartialEq)]
pub struct SdUpscale {
    /// What enlarges it; `None` leaves its size.
    pub upscaler: PictureUpscaler,
    /// Factor on both sides.
    pub factor: f64,
    /// Pixels that neighbouring pieces share; a piece has the request's size.
    pub overlap: u32,
}

impl Curve {
    /// Every curve, in A1111's order.
    pub const ALL: [Self; 3] = [Self::Aggressive, Self::Linear, Self::Lazy];

    /// A1111's name.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Aggressive => "Aggressive",
            Self::Linear => "Linear",
            Self::Lazy => "Lazy",
        }
    }

    /// Reads A1111's name.
    #[must_use]
    pub fn find(label: &str) -> Option<Self> {
        let same = |curve: &Self| curve.label().eq_ignore_ascii_case(label);
        Self::ALL.into_iter().find(same)
    }
}

impl Loopback {
    /// Denoising strength of run `turn`, 0-based, if the first has `initial`.
    #[must_use]
    pub fn strength(&self, initial: f64, turn: usize) -> f64 {
        if self.loops < 2 {
            return initial;
        }
        let progress = turn as f64 / (self.loops - 1) as f64;
        let share = match self.curve {
            Curve::Aggressive => (progress * FRAC_PI_2).sin(),
            Curve::Lazy => 1.0 - (progress * FRAC_PI_2).cos(),
            Curve::Linear => progress,
        };
        initial + (self.final_strength - initial) * share
    }
}

impl SdUpscale {
    /// Pieces that a picture of `size` pixels is cut into, once enlarged.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the overlap is as large as a piece.
    pub fn pieces(&self, size: (u32, u32), piece: (u32, u32)) -> Result<usize, Error> {
        Ok(Tiles::of(piece, self.overlap, self.enlarged(size))?.count())
    }

    /// Size of the result of a picture of `size` pixels.
    #[must_use]
    pub fn enlarged(&self, size: (u32, u32)) -> (u32, u32) {
        match self.upscaler {
            PictureUpscaler::None => size,
            _ => super::upscale::target_size(size, self.factor),
        }
    }
}

impl GenerateRequest {
    /// The request that picture `index` of this job is made by.
    #[must_use]
    pub fn of_image(&self, index: usize) -> &Self {
        let Some(Script::Jobs(jobs)) = &self.script else {
            return self;
        };
        let mut end = 0;
        let found = jobs.iter().find(|job| {
            end += job.batch_size * job.batch_count;
            index < end
        });
        found.or(jobs.last()).unwrap_or(self)
    }
}

impl Pipeline {
    /// Runs `script` on a request.
    pub(super) fn run_script(
        &mut self,
        script: &Script,
        request: &GenerateRequest,
        observer: &dyn Observer,
    ) -> Result<Generated, Error> {
        let mut done = Generated {
            images: Vec::new(),
            seeds: Vec::new(),
            subseeds: Vec::new(),
            extra_params: Params::new(),
            timings: Timings::default(),
            inpainting_conditioning: self.is_inpainting(),
            interrupted: false,
            comments: Vec::new(),
        };
        match script {
            Script::Jobs(jobs) => self.run_jobs(jobs, observer, &mut done)?,
            Script::Loopback(script) => self.loop_back(script, request, observer, &mut done)?,
            Script::SdUpscale(script) => self.sd_upscale(script, request, observer, &mut done)?,
        }
        Ok(done)
    }

    fn run_jobs(
        &mut self,
        jobs: &[GenerateRequest],
        observer: &dyn Observer,
        done: &mut Generated,
    ) -> Result<(), Error> {
        let batches = jobs.iter().map(|job| job.batch_count).sum();
        let mut first = 0;
        for job in jobs {
            let total = job.batch_size * job.batch_count;
            done.seeds.extend(seeds(job, total));
            done.subseeds.extend(subseeds(job, total));
            if done.interrupted {
                continue;
            }
            let made = self.generate_once(job, &Part::new(observer, first, batches))?;
            first += job.batch_count;
            note(done, &made);
            done.images.extend(made.images);
            done.interrupted = made.interrupted;
        }
        Ok(())
    }

    fn loop_back(
        &mut self,
        script: &Loopback,
        request: &GenerateRequest,
        observer: &dyn Observer,
        done: &mut Generated,
    ) -> Result<(), Error> {
        let Some(original) = &request.init_image else {
            return Err(Error::Invalid("loopback needs a picture".into()));
        };
        let initial = f64::from(original.strength);
        let mut run = one_of(request);
        let keys = &mut run.infotext.script;
        keys.insert("Final denoising strength", script.final_strength);
        keys.insert("Denoising curve", script.curve.label());
        let keeps_all = request.batch_count == 1;
        let batches = script.loops * request.batch_count;
        'batches: for batch in 0..request.batch_count {
            let mut init = original.clone();
            init.color_source = init.pictures.first().cloned().map(Arc::new);
            let mut last = None;
            for turn in 0..script.loops {
                let number = batch * script.loops + turn;
                run.seed = request.seed.wrapping_add(number as u64);
                if keeps_all || turn + 1 == script.loops {
                    done.seeds.push(run.seed);
                    done.subseeds.push(run.subseed);
                }
                init.strength = script.strength(initial, turn) as f32;
                run.init_image = Some(init.clone());
                let part = Part::new(observer, number, batches);
                let made = self.generate_once(&run, &part)?;
                note(done, &made);
                done.interrupted = made.interrupted;
                if made.interrupted {
                    break 'batches;
                }
                let Some(image) = made.images.into_iter().next() else {
                    break;
                };
                if part.was_skipped() {
                    break;
                }
                init.pictures = Arc::new(vec![image.image.clone()]);
                if let Some(mask) = &mut init.mask {
                    mask.content = MaskedContent::Original;
                }
                if keeps_all {
                    done.images.push(image);
                } else if turn + 1 == script.loops {
                    last = Some(image);
                }
            }
            done.images.extend(last);
        }
        Ok(())
    }

    fn sd_upscale(
        &mut self,
        script: &SdUpscale,
        request: &GenerateRequest,
        observer: &dyn Observer,
        done: &mut Generated,
    ) -> Result<(), Error> {
        let first = request.init_image.as_ref();
        let Some((init, source)) = first.and_then(|init| Some((init, init.pictures.first()?)))
        else {
            return Err(Error::Invalid("SD upscale needs a picture".into()));
        };
        let larger = match script.upscaler {
            PictureUpscaler::None => source.clone(),
            _ => Upscaling::new(&self.upscalers, observer, &|_, _| {})
                .upscale(source, &script.upscaler, script.factor)
                .map_err(|error| match error {
                    Error::Skipped => Error::Interrupted,
                    other => other,
                })?,
        };
        let piece = (request.width as u32, request.height as u32);
        let tiles = Tiles::of(piece, script.overlap, larger.dimensions())?;
        let mut run = one_of(request);
        let keys = &mut run.infotext.script;
        keys.insert("SD upscale overlap", script.overlap);
        keys.insert("SD upscale upscaler", script.upscaler.label());
        let mut pieces = Vec::with_capacity(tiles.count());
        for y in tiles.rows() {
            pieces.extend(tiles.columns().map(|x| tiles.cut(&larger, x, y)));
        }
        for count in 0..request.batch_count {
            run.seed = request.seed.wrapping_add(count as u64);
            done.seeds.push(run.seed);
            done.subseeds.push(run.subseed);
            if done.interrupted {
                continue;
            }
            let work = Work {
                init,
                pieces: &pieces,
                batch_size: request.batch_size,
                number: (count, request.batch_count),
            };
            let mut painted = self.paint_pieces(&mut run, &work, observer, done)?;
            let pictures: Vec<&RgbImage> = painted.iter().map(|image| &image.image).collect();
            let joined = join(&tiles, &pictures, piece);
            // The seed and infotext of the whole are those of its first piece.
            painted.truncate(1);
            done.images
                .extend(painted.into_iter().map(|first| GeneratedImage {
                    image: joined.clone(),
                    latents: None,
                    ..first
                }));
        }
        Ok(())
    }

    /// Paints all pieces, a batch at a time; what an interrupt leaves is missing.
    fn paint_pieces(
        &mut self,
        run: &mut GenerateRequest,
        work: &Work<'_>,
        observer: &dyn Observer,
        done: &mut Generated,
    ) -> Result<Vec<GeneratedImage>, Error> {
        let batches = work.pieces.len().div_ceil(work.batch_size);
        let start = run.seed;
        let mut painted = Vec::with_capacity(work.pieces.len());
        for (batch, pieces) in work.pieces.chunks(work.batch_size).enumerate() {
            run.seed = start.wrapping_add(batch as u64);
            run.batch_size = pieces.len();
            run.init_image = Some(InitImage {
                pictures: Arc::new(pieces.to_vec()),
                ..work.init.clone()
            });
            let (count, counts) = work.number;
            let part = Part::new(observer, count * batches + batch, counts * batches);
            let made = self.generate_once(run, &part)?;
            note(done, &made);
            done.interrupted = made.interrupted;
            painted.extend(made.images);
            if done.interrupted {
                break;
            }
        }
        Ok(painted)
    }
}

/// The pieces of a picture and how they are painted.
struct Work<'a> {
    init: &'a InitImage,
    pieces: &'a [RgbImage],
    batch_size: usize,
    /// Number of the result, of how many.
    number: (usize, usize),
}

/// A request for one picture, without its script.
fn one_of(request: &GenerateRequest) -> GenerateRequest {
    GenerateRequest {
        batch_size: 1,
        batch_count: 1,
        script: None,
        ..request.clone()
    }
}

/// Takes over what a run says besides its pictures.
fn note(done: &mut Generated, made: &Generated) {
    if done.extra_params.is_empty() {
        done.extra_params = made.extra_params.clone();
    }
    for comment in &made.comments {
        if !done.comments.contains(comment) {
            done.comments.push(comment.clone());
        }
    }
    done.timings.text += made.timings.text;
    done.timings.sample += made.timings.sample;
    done.timings.decode += made.timings.decode;
    done.timings.steps += made.timings.steps;
}

/// The painted pieces as one picture; black where one is missing.
fn join(tiles: &Tiles, painted: &[&RgbImage], piece: (u32, u32)) -> RgbImage {
    let black = RgbImage::new(piece.0, piece.1);
    let mut joined = Joined::new(tiles, 1);
    let mut painted = painted.iter().copied();
    for y in tiles.rows() {
        for x in tiles.columns() {
            joined.add(painted.next().unwrap_or(&black), x);
        }
        joined.end_row(y);
    }
    joined.finish()
}

/// A run's view of the whole job's observer.
struct Part<'a> {
    whole: &'a dyn Observer,
    /// Batches before this run.
    first: usize,
    /// Batches of the job.
    batches: usize,
    skipped: AtomicBool,
}

impl<'a> Part<'a> {
    fn new(whole: &'a dyn Observer, first: usize, batches: usize) -> Self {
        Self {
            whole,
            first,
            batches,
            skipped: AtomicBool::new(false),
        }
    }

    fn was_skipped(&self) -> bool {
        self.skipped.load(Ordering::Relaxed)
    }
}

impl Observer for Part<'_> {
    fn control(&self) -> Control {
        let control = self.whole.control();
        if control == Control::Skip {
            self.skipped.store(true, Ordering::Relaxed);
        }
        control
    }

    fn progress(&self, progress: Progress) {
        self.whole.progress(Progress {
            batch: self.first + progress.batch,
            batches: self.batches,
            ..progress
        });
    }

    fn wants_preview(&self) -> bool {
        self.whole.wants_preview()
    }

    fn wants_finished(&self) -> bool {
        self.whole.wants_finished()
    }

    fn preview(&self, image: RgbImage) {
        self.whole.preview(image);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn strengths_follow_a1111s_curves() {
        let at = |curve, loops: usize| {
            let script = Loopback {
                loops,
                final_strength: 0.5,
                curve,
            };
            (0..loops)
                .map(|turn| (script.strength(0.75, turn) * 1e4).round() / 1e4)
                .collect::<Vec<_>>()
        };
        assert_eq!(at(Curve::Linear, 3), [0.75, 0.625, 0.5]);
        // 0.75 - 0.25 * sin(pi/4), and 0.75 - 0.25 * (1 - cos(pi/4)).
        assert_eq!(at(Curve::Aggressive, 3), [0.75, 0.5732, 0.5]);
        assert_eq!(at(Curve::Lazy, 3), [0.75, 0.6768, 0.5]);
        assert_eq!(at(Curve::Linear, 1), [0.75]);
    }

    #[test]
    fn pieces_joined_again_are_the_picture() {
        let picture = RgbImage::from_fn(150, 90, |x, y| {
            image::Rgb([x as u8, y as u8, (x * y) as u8])
        });
        let tiles = Tiles::of((64, 48), 16, picture.dimensions()).unwrap();
        let mut pieces = Vec::new();
        for y in tiles.rows() {
            pieces.extend(tiles.columns().map(|x| tiles.cut(&picture, x, y)));
        }
        // ceil((150 - 16) / 48) columns, ceil((90 - 16) / 32) rows.
        assert_eq!(pieces.len(), 3 * 3);
        let joined = join(&tiles, &pieces.iter().collect::<Vec<_>>(), (64, 48));
        assert_eq!(joined, picture);
        assert!(Tiles::of((64, 48), 48, (150, 90)).is_err());
    }

    #[test]
    fn pictures_belong_to_the_job_that_makes_them() {
        let job = |prompt: &str, batch_size, batch_count| GenerateRequest {
            prompt: prompt.into(),
            batch_size,
            batch_count,
            ..GenerateRequest::default()
        };
        let jobs = vec![job("a", 2, 1), job("b", 1, 3)];
        let whole = GenerateRequest {
            script: Some(Script::Jobs(Arc::new(jobs))),
            ..GenerateRequest::default()
        };
        let prompts: Vec<&str> = (0..6).map(|index| &*whole.of_image(index).prompt).collect();
        assert_eq!(prompts, ["a", "a", "b", "b", "b", "b"]);
    }
}
