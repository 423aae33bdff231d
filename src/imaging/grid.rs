//! Contact sheets: how many rows and columns, and the picture itself.
//!
//! Follows A1111's `images.image_grid`: pictures row by row, each in the middle of a cell of the largest size.

use image::{Rgb, RgbImage, imageops};

use super::Error;

/// How the number of rows is chosen (`n_rows`, `grid_prevent_empty_spots`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GridShape {
    /// As square as possible, empty cells allowed.
    #[default]
    Square,
    /// As square as possible without an empty cell.
    Full,
    /// This many rows; at least 1 and at most one per picture.
    Rows(usize),
}

/// Rows and columns for `count` pictures.
#[must_use]
pub fn grid_shape(count: usize, shape: GridShape) -> (usize, usize) {
    let count = count.max(1);
    let rows = match shape {
        GridShape::Rows(rows) => rows,
        GridShape::Square => (count as f64).sqrt().round_ties_even() as usize,
        GridShape::Full => (1..=count.isqrt())
            .rev()
            .find(|rows| count.is_multiple_of(*rows))
            .unwrap_or(1),
    };
    let rows = rows.clamp(1, count);
    (rows, count.div_ceil(rows))
}

/// Draws the pictures on one sheet of colour `background` (A1111's default is white).
///
/// # Errors
/// [`Error::Empty`] if there is no picture or none has pixels.
pub fn grid(
    pictures: &[RgbImage],
    shape: GridShape,
    background: Rgb<u8>,
) -> Result<RgbImage, Error> {
    let (rows, columns) = grid_shape(pictures.len(), shape);
    let width = pictures.iter().map(RgbImage::width).max().unwrap_or(0);
    let height = pictures.iter().map(RgbImage::height).max().unwrap_or(0);
    let (sheet_width, sheet_height) = (
        u32::try_from(columns)
            .ok()
            .and_then(|n| width.checked_mul(n)),
        u32::try_from(rows).ok().and_then(|n| height.checked_mul(n)),
    );
    let (Some(sheet_width @ 1..), Some(sheet_height @ 1..)) = (sheet_width, sheet_height) else {
        return Err(Error::Empty { width, height });
    };
    let mut sheet = RgbImage::from_pixel(sheet_width, sheet_height, background);
    for (index, picture) in pictures.iter().enumerate() {
        let (column, row) = ((index % columns) as u32, (index / columns) as u32);
        let x = column * width + (width - picture.width()) / 2;
        let y = row * height + (height - picture.height()) / 2;
        imageops::replace(&mut sheet, picture, i64::from(x), i64::from(y));
    }
    Ok(sheet)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_a1111s() {
        let square: Vec<_> = (1..=12)
            .map(|count| grid_shape(count, GridShape::Square))
            .collect();
        assert_eq!(
            square,
            [
                (1, 1),
                (1, 2),
                (2, 2),
                (2, 2),
                (2, 3),
                (2, 3),
                (3, 3),
                (3, 3),
                (3, 3),
                (3, 4),
                (3, 4),
                (3, 4)
            ]
        );
        let full: Vec<_> = [1, 2, 5, 6, 8, 9, 12]
            .map(|count| grid_shape(count, GridShape::Full))
            .into();
        assert_eq!(
            full,
            [(1, 1), (1, 2), (1, 5), (2, 3), (2, 4), (3, 3), (3, 4)]
        );
        assert_eq!(
            [(5, 2), (2, 9), (4, 0)].map(|(count, rows)| grid_shape(count, GridShape::Rows(rows))),
            [(2, 3), (2, 1), (1, 4)]
        );
    }

    #[test]
    fn pictures_stand_in_the_middle_of_their_cells() {
        let picture = |width, height, value| RgbImage::from_pixel(width, height, Rgb([value; 3]));
        let sheet = grid(
            &[picture(4, 4, 1), picture(2, 4, 2), picture(4, 2, 3)],
            GridShape::Square,
            Rgb([255; 3]),
        )
        .unwrap();
        assert_eq!(sheet.dimensions(), (8, 8));
        let values: Vec<u8> = [
            (0, 0),
            (4, 0),
            (5, 0),
            (6, 3),
            (7, 0),
            (0, 4),
            (0, 5),
            (3, 6),
            (7, 7),
        ]
        .map(|(x, y)| sheet.get_pixel(x, y)[0])
        .into();
        assert_eq!(values, [1, 255, 2, 2, 255, 255, 3, 3, 255]);
        assert!(grid(&[], GridShape::Square, Rgb([0; 3])).is_err());
    }
}
