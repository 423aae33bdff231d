//! A1111's grid of overlapping pieces: cutting a picture, and joining the results.
//!
//! Follows `images.split_grid` and `images.combine_grid`: pieces are spread evenly, the last ones moved back to the edge; a
//! picture smaller than a piece lies at its far corner with black before it. Joined row by row: where a piece overlaps the one
//! before, it is blended in by a ramp of 8 bits.

use image::{GrayImage, Luma, RgbImage};

use super::{Error, Tiling};
use crate::imaging::{paste, paste_masked};

/// The grid over a picture; positions are in its pixels, and negative where black comes first.
#[derive(Debug)]
pub(in crate::pipeline) struct Tiles {
    columns: Vec<i64>,
    rows: Vec<i64>,
    tile: (u32, u32),
    size: (u32, u32),
    overlap: u32,
}

impl Tiles {
    pub(in crate::pipeline) fn new(tiling: Tiling, size: (u32, u32)) -> Result<Self, Error> {
        let Tiling { tile, overlap } = tiling;
        if tile == 0 {
            return Ok(Self {
                columns: vec![0],
                rows: vec![0],
                tile: size,
                size,
                overlap: 0,
            });
        }
        if overlap >= tile {
            return Err(Error::Invalid(format!(
                "option `ESRGAN_tile_overlap` must be smaller than `ESRGAN_tile`: `{overlap}` and `{tile}`"
            )));
        }
        // A piece larger than any picture is as good as one that large.
        let tile = tile.min(1 << 16);
        Ok(Self {
            columns: starts(size.0, tile, overlap),
            rows: starts(size.1, tile, overlap),
            tile: (tile as u32, tile as u32),
            size,
            overlap: overlap as u32,
        })
    }

    /// Pieces of `tile` pixels that share `overlap` with their neighbours.
    pub(in crate::pipeline) fn of(
        tile: (u32, u32),
        overlap: u32,
        size: (u32, u32),
    ) -> Result<Self, Error> {
        if overlap >= tile.0.min(tile.1) {
            return Err(Error::Invalid(format!(
                "tile overlap must be smaller than `width` and `height`: `{overlap}` and {}x{}",
                tile.0, tile.1
            )));
        }
        Ok(Self {
            columns: starts(size.0, tile.0 as usize, overlap as usize),
            rows: starts(size.1, tile.1 as usize, overlap as usize),
            tile,
            size,
            overlap,
        })
    }

    pub(in crate::pipeline) fn count(&self) -> usize {
        self.columns.len() * self.rows.len()
    }

    pub(in crate::pipeline) fn columns(&self) -> impl Iterator<Item = i64> {
        self.columns.clone().into_iter()
    }

    pub(in crate::pipeline) fn rows(&self) -> impl Iterator<Item = i64> {
        self.rows.clone().into_iter()
    }

    /// The piece at a column and row, black where the picture is not.
    pub(in crate::pipeline) fn cut(&self, picture: &RgbImage, x: i64, y: i64) -> RgbImage {
        let mut piece = RgbImage::new(self.tile.0, self.tile.1);
        paste(&mut piece, picture, -x, -y);
        piece
    }
}

/// Where the pieces of one axis begin.
fn starts(length: u32, tile: usize, overlap: usize) -> Vec<i64> {
    let (length, tile, overlap) = (i64::from(length), tile as i64, overlap as i64);
    let fresh = tile - overlap;
    // A picture no wider than the overlap leaves A1111 without a piece.
    let count = ((length - overlap + fresh - 1) / fresh).max(1);
    let step = if count > 1 {
        (length - tile) as f64 / (count - 1) as f64
    } else {
        0.0
    };
    (0..count)
        .map(|index| ((index as f64 * step) as i64).min(length - tile))
        .collect()
}

/// The results of pieces, joined.
pub(in crate::pipeline) struct Joined {
    picture: RgbImage,
    row: RgbImage,
    tile: (u32, u32),
    overlap: u32,
    scale: i64,
    ramps: (GrayImage, GrayImage),
}

impl Joined {
    pub(in crate::pipeline) fn new(tiles: &Tiles, scale: u32) -> Self {
        let (width, height) = (tiles.size.0 * scale, tiles.size.1 * scale);
        let tile = (tiles.tile.0 * scale, tiles.tile.1 * scale);
        let overlap = tiles.overlap * scale;
        let ramp = move |at: u32| Luma([(at as f32 * 255.0 / overlap as f32) as u8]);
        Self {
            picture: RgbImage::new(width, height),
            row: RgbImage::new(width, tile.1),
            tile,
            overlap,
            scale: i64::from(scale),
            ramps: (
                GrayImage::from_fn(overlap, tile.1, |x, _| ramp(x)),
                GrayImage::from_fn(width, overlap, |_, y| ramp(y)),
            ),
        }
    }

    /// Adds the result of the piece that began at column `x`.
    pub(in crate::pipeline) fn add(&mut self, piece: &RgbImage, x: i64) {
        let Self { row, overlap, .. } = self;
        let (overlap, at) = (*overlap, x * self.scale);
        if x == 0 {
            paste(row, piece, 0, 0);
            return;
        }
        let blended = crop(piece, (0, 0), (overlap, self.tile.1));
        paste_blended(row, &blended, (at, 0), &self.ramps.0);
        let rest = crop(piece, (overlap, 0), (self.tile.0 - overlap, self.tile.1));
        paste(row, &rest, at + i64::from(overlap), 0);
    }

    /// Adds the row that began at `y`.
    pub(in crate::pipeline) fn end_row(&mut self, y: i64) {
        let (width, height) = self.row.dimensions();
        let row = std::mem::replace(&mut self.row, RgbImage::new(width, height));
        if y == 0 {
            paste(&mut self.picture, &row, 0, 0);
            return;
        }
        let (overlap, at) = (self.overlap, y * self.scale);
        let blended = crop(&row, (0, 0), (width, overlap));
        paste_blended(&mut self.picture, &blended, (0, at), &self.ramps.1);
        let rest = crop(&row, (0, overlap), (width, height - overlap));
        paste(&mut self.picture, &rest, 0, at + i64::from(overlap));
    }

    pub(in crate::pipeline) fn finish(self) -> RgbImage {
        self.picture
    }
}

fn crop(picture: &RgbImage, (x, y): (u32, u32), (width, height): (u32, u32)) -> RgbImage {
    image::imageops::crop_imm(picture, x, y, width, height).to_image()
}

/// Pastes under a mask at a place that may lie partly outside.
fn paste_blended(target: &mut RgbImage, source: &RgbImage, (x, y): (i64, i64), mask: &GrayImage) {
    let from = (x.max(0), y.max(0));
    let to = (
        (x + i64::from(source.width())).min(i64::from(target.width())),
        (y + i64::from(source.height())).min(i64::from(target.height())),
    );
    if from.0 >= to.0 || from.1 >= to.1 {
        return;
    }
    let size = ((to.0 - from.0) as u32, (to.1 - from.1) as u32);
    let inside = ((from.0 - x) as u32, (from.1 - y) as u32);
    let mut part = crop(target, (from.0 as u32, from.1 as u32), size);
    let mask = image::imageops::crop_imm(mask, inside.0, inside.1, size.0, size.1).to_image();
    paste_masked(&mut part, &crop(source, inside, size), &mask);
    paste(target, &part, from.0, from.1);
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    #[test]
    fn pieces_begin_where_a1111s_do() {
        for (length, expected) in [
            (512, &[0, 160, 320][..]),
            (832, &[0, 160, 320, 480, 640]),
            (200, &[0, 8]),
            (192, &[0]),
            (128, &[-64]),
            (5, &[-187]),
        ] {
            assert_eq!(starts(length, 192, 8), expected, "{length}");
        }
    }

    /// Enlarges every pixel to a square.
    fn squares(picture: &RgbImage, scale: u32) -> RgbImage {
        let (width, height) = picture.dimensions();
        RgbImage::from_fn(width * scale, height * scale, |x, y| {
            *picture.get_pixel(x / scale, y / scale)
        })
    }

    #[test]
    fn pieces_that_agree_join_to_the_whole() {
        let picture = RgbImage::from_fn(50, 37, |x, y| Rgb([x as u8 * 5, y as u8 * 6, 77]));
        for (tile, overlap) in [(0, 0), (16, 4), (16, 0), (48, 8), (64, 8), (200, 8)] {
            let tiles = Tiles::new(Tiling { tile, overlap }, picture.dimensions()).unwrap();
            let mut joined = Joined::new(&tiles, 2);
            for y in tiles.rows() {
                for x in tiles.columns() {
                    joined.add(&squares(&tiles.cut(&picture, x, y), 2), x);
                }
                joined.end_row(y);
            }
            assert!(joined.finish() == squares(&picture, 2), "{tile} {overlap}");
        }
    }

    #[test]
    fn a_picture_just_below_a_piece_darkens_at_its_edge_as_a1111s_does() {
        // The ramp of a piece that begins at -1 reaches into the picture, where nothing lies below it.
        let picture = RgbImage::from_pixel(15, 16, Rgb([255; 3]));
        let tiles = Tiles::new(
            Tiling {
                tile: 16,
                overlap: 4,
            },
            picture.dimensions(),
        )
        .unwrap();
        let mut joined = Joined::new(&tiles, 1);
        joined.add(&tiles.cut(&picture, -1, 0), -1);
        joined.end_row(0);
        let row: Vec<u8> = joined
            .finish()
            .rows()
            .next()
            .unwrap()
            .map(|p| p[0])
            .collect();
        assert_eq!(row[..5], [63, 127, 191, 255, 255]);
    }

    #[test]
    fn an_overlap_of_a_whole_piece_is_refused() {
        assert!(
            Tiles::new(
                Tiling {
                    tile: 8,
                    overlap: 8
                },
                (9, 9)
            )
            .is_err()
        );
    }
}
