//! The contact sheet that A1111 puts before the pictures of a saved batch.
//!
//! Geometry follows A1111's `images.py`: rows from the option `n_rows` (-1 = square-ish, 0 = batch size), cells as large as the
//! largest picture, pictures centred on white, row by row.

use image::{Rgb, RgbImage, imageops};

/// How many rows a sheet has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Option `n_rows`.
    pub rows: i64,
    /// Option `grid_prevent_empty_spots`.
    pub prevent_empty_spots: bool,
    /// Pictures per batch.
    pub batch_size: usize,
}

/// Tiles pictures into one. An empty list gives an empty picture.
#[must_use]
pub fn contact_sheet(images: &[&RgbImage], layout: Layout) -> RgbImage {
    let (rows, columns) = shape(images.len(), layout);
    let width = images.iter().map(|image| image.width()).max().unwrap_or(0);
    let height = images.iter().map(|image| image.height()).max().unwrap_or(0);
    let mut sheet = RgbImage::from_pixel(width * columns as u32, height * rows as u32, Rgb([255; 3]));
    for (index, image) in images.iter().enumerate() {
        let (column, row) = (index % columns.max(1), index / columns.max(1));
        let x = column as u32 * width + (width - image.width()) / 2;
        let y = row as u32 * height + (height - image.height()) / 2;
        imageops::replace(&mut sheet, *image, i64::from(x), i64::from(y));
    }
    sheet
}

/// Rows and columns for `count` pictures.
fn shape(count: usize, layout: Layout) -> (usize, usize) {
    if count == 0 {
        return (0, 0);
    }
    let root = (count as f64).sqrt();
    let rows = match layout.rows {
        rows if rows > 0 => rows as usize,
        0 => layout.batch_size,
        _ if layout.prevent_empty_spots => {
            (1..=root as usize).rev().find(|rows| count.is_multiple_of(*rows)).unwrap_or(1)
        }
        _ => root.round_ties_even() as usize,
    };
    let rows = rows.clamp(1, count);
    (rows, count.div_ceil(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SQUARE: Layout = Layout { rows: -1, prevent_empty_spots: false, batch_size: 1 };

    #[test]
    fn sheets_are_as_square_as_in_a1111() {
        let expected = [
            (1, 1), (1, 2), (2, 2), (2, 2), (2, 3), (2, 3), (3, 3), (3, 3), (3, 3), (3, 4), (3, 4), (3, 4),
        ];
        for (index, want) in expected.into_iter().enumerate() {
            assert_eq!(shape(index + 1, SQUARE), want, "{} pictures", index + 1);
        }
        assert_eq!(shape(6, Layout { prevent_empty_spots: true, ..SQUARE }), (2, 3));
        assert_eq!(shape(6, Layout { rows: 0, batch_size: 3, ..SQUARE }), (3, 2));
        assert_eq!(shape(2, Layout { rows: 9, ..SQUARE }), (2, 1));
    }

    #[test]
    fn pictures_are_laid_row_by_row_and_centred() {
        let picture = |value, side| RgbImage::from_pixel(side, side, Rgb([value; 3]));
        let (a, b, c) = (picture(1, 4), picture(2, 4), picture(3, 2));
        let sheet = contact_sheet(&[&a, &b, &c], SQUARE);
        assert_eq!(sheet.dimensions(), (8, 8));
        assert_eq!([sheet.get_pixel(0, 0)[0], sheet.get_pixel(4, 0)[0]], [1, 2]);
        assert_eq!([sheet.get_pixel(0, 4)[0], sheet.get_pixel(1, 5)[0], sheet.get_pixel(7, 7)[0]], [255, 3, 255]);
    }
}
