//! Named prompt styles: how their texts join a prompt, and the table `styles.csv` that A1111 keeps them in.
//!
//! Follows A1111's `modules/styles.py`. The file is read as Python's `csv` reads its default dialect: fields in double
//! quotes may hold commas, line ends and doubled quotes.

use super::Error;

/// Where a style puts the prompt it is applied to.
const PLACEHOLDER: &str = "{prompt}";

/// One row of the table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Style {
    /// Name in the user interface.
    pub name: String,
    /// Text for the positive prompt.
    pub prompt: String,
    /// Text for the negative prompt.
    pub negative_prompt: String,
}

/// Applies style texts to a prompt, one after the other.
///
/// A text with `{prompt}` embraces the prompt; any other follows it after a comma.
///
/// ```
/// use sdgen::prompt::apply_styles;
/// assert_eq!(apply_styles("a cat", &["{prompt} in ink", " detailed "]), "a cat in ink, detailed");
/// ```
#[must_use]
pub fn apply_styles(prompt: &str, style_texts: &[&str]) -> String {
    style_texts
        .iter()
        .fold(prompt.to_string(), |prompt, style| {
            if style.contains(PLACEHOLDER) {
                return style.replace(PLACEHOLDER, &prompt);
            }
            let parts = [
                prompt.trim_matches(super::is_space),
                style.trim_matches(super::is_space),
            ];
            parts
                .into_iter()
                .filter(|part| !part.is_empty())
                .collect::<Vec<_>>()
                .join(", ")
        })
}

/// Takes one style's text back out of a prompt; `None` if the prompt does not carry it.
fn extract(prompt: &str, style_text: &str) -> Option<String> {
    let style = style_text.trim_matches(super::is_space);
    let prompt = prompt.trim_matches(super::is_space);
    if style.is_empty() {
        return Some(prompt.to_string());
    }
    if let Some((left, right)) = style.split_once(PLACEHOLDER) {
        let inside = prompt.strip_prefix(left)?.strip_suffix(right)?;
        return Some(inside.to_string());
    }
    let before = prompt.strip_suffix(style)?;
    Some(before.strip_suffix(", ").unwrap_or(before).to_string())
}

/// Finds the styles that a prompt pair carries, takes their texts out and names them in the order found.
#[must_use]
pub fn extract_styles(
    prompt: &str,
    negative_prompt: &str,
    styles: &[Style],
) -> (String, String, Vec<String>) {
    let (mut prompt, mut negative) = (prompt.to_string(), negative_prompt.to_string());
    let mut found = Vec::new();
    loop {
        let applied = styles
            .iter()
            .filter(|style| !found.contains(&style.name))
            .find_map(|style| {
                if style.prompt.is_empty() && style.negative_prompt.is_empty() {
                    return None;
                }
                let texts = (
                    extract(&prompt, &style.prompt)?,
                    extract(&negative, &style.negative_prompt)?,
                );
                Some((style.name.clone(), texts))
            });
        let Some((name, texts)) = applied else { break };
        (prompt, negative) = texts;
        found.push(name);
    }
    // The last applied style stands outermost, so it is found first.
    found.reverse();
    (prompt, negative, found)
}

/// Reads the table. Columns may come in any order and others are ignored; the oldest files call the prompt `text`.
///
/// Rows that are separators of A1111's list (`------`) or comments (`#…`) are left out.
///
/// # Errors
/// [`Error::Styles`] if there is no `name` column or a quoted field never ends.
pub fn read_styles(csv: &str) -> Result<Vec<Style>, Error> {
    let mut rows = read_csv(csv.strip_prefix('\u{feff}').unwrap_or(csv))?.into_iter();
    let Some(header) = rows.next() else {
        return Ok(Vec::new());
    };
    let column = |names: &[&str]| {
        names
            .iter()
            .find_map(|name| header.iter().position(|cell| cell == name))
    };
    let name = column(&["name"]).ok_or(Error::Styles {
        line: 1,
        problem: "there is no column `name`",
    })?;
    let (prompt, negative) = (column(&["prompt", "text"]), column(&["negative_prompt"]));
    let cell = |row: &[String], column: Option<usize>| {
        column
            .and_then(|column| row.get(column))
            .cloned()
            .unwrap_or_default()
    };
    Ok(rows
        .map(|row| Style {
            name: cell(&row, Some(name)),
            prompt: cell(&row, prompt),
            negative_prompt: cell(&row, negative),
        })
        .filter(|style| {
            !style.name.is_empty() && !style.name.starts_with("---") && !style.name.starts_with('#')
        })
        .collect())
}

/// Writes the table as A1111 writes it: a byte order mark, a header and CRLF line ends.
#[must_use]
pub fn write_styles(styles: &[Style]) -> String {
    let mut csv = String::from("\u{feff}name,prompt,negative_prompt\r\n");
    for style in styles {
        let cells =
            [&style.name, &style.prompt, &style.negative_prompt].map(|cell| quote_cell(cell));
        csv.push_str(&cells.join(","));
        csv.push_str("\r\n");
    }
    csv
}

fn quote_cell(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell.to_string()
    }
}

/// Splits a CSV text into rows of cells; blank lines are no rows.
fn read_csv(text: &str) -> Result<Vec<Vec<String>>, Error> {
    let mut rows = Vec::new();
    let mut row = Vec::new();
    let mut cell = String::new();
    let mut quoted_since = None;
    let mut line = 1;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        line += usize::from(c == '\n');
        match (c, quoted_since) {
            ('"', Some(_)) => {
                if chars.next_if_eq(&'"').is_some() {
                    cell.push('"');
                } else {
                    quoted_since = None;
                }
            }
            ('"', None) if cell.is_empty() => quoted_since = Some(line),
            (',', None) => row.push(std::mem::take(&mut cell)),
            ('\r' | '\n', None) => {
                if !row.is_empty() || !cell.is_empty() {
                    row.push(std::mem::take(&mut cell));
                    rows.push(std::mem::take(&mut row));
                }
            }
            _ => cell.push(c),
        }
    }
    if let Some(line) = quoted_since {
        return Err(Error::Styles {
            line,
            problem: "a quoted field never ends",
        });
    }
    if !row.is_empty() || !cell.is_empty() {
        row.push(cell);
        rows.push(row);
    }
    Ok(rows)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn style(name: &str, prompt: &str, negative_prompt: &str) -> Style {
        Style {
            name: name.into(),
            prompt: prompt.into(),
            negative_prompt: negative_prompt.into(),
        }
    }

    #[test]
    fn tables_written_by_a1111_are_read() {
        // Bytes of Python's csv.DictWriter with the utf-8-sig encoding.
        let csv = "\u{feff}name,prompt,negative_prompt\r\nInk,\"{prompt}, ink, \"\"wet\"\"\r\nlines\",\r\n--- Group ---,,\r\nPlain,photo,blurry\r\n";
        let styles = read_styles(csv).unwrap();
        assert_eq!(
            styles,
            [
                style("Ink", "{prompt}, ink, \"wet\"\r\nlines", ""),
                style("Plain", "photo", "blurry")
            ]
        );
        assert_eq!(read_styles(&write_styles(&styles)).unwrap(), styles);
        assert_eq!(
            read_styles("name,text\nold,words\n\n").unwrap(),
            [style("old", "words", "")]
        );
        assert!(read_styles("").unwrap().is_empty());
        assert!(matches!(
            read_styles("a,b\n"),
            Err(Error::Styles { line: 1, .. })
        ));
        assert!(matches!(
            read_styles("name,prompt\nx,\"y"),
            Err(Error::Styles { line: 2, .. })
        ));
    }

    #[test]
    fn styles_come_out_of_a_prompt_as_they_went_in() {
        let styles = [
            style("A", "{prompt}, ink", "blurry"),
            style("B", "detailed", ""),
        ];
        let prompt = apply_styles("a cat", &["{prompt}, ink", "detailed"]);
        let (text, negative, names) = extract_styles(&prompt, "ugly, blurry", &styles);
        assert_eq!(
            (text.as_str(), negative.as_str(), names),
            ("a cat", "ugly", vec!["A".to_string(), "B".to_string()])
        );
        assert_eq!(extract_styles("dog", "", &styles).2, Vec::<String>::new());
    }

    #[test]
    fn empty_parts_are_dropped() {
        assert_eq!(apply_styles(" ", &["", "x "]), "x");
        assert_eq!(
            apply_styles("a {prompt}", &["[{prompt}|{prompt}]"]),
            "[a {prompt}|a {prompt}]"
        );
        assert_eq!(apply_styles(" a ", &[]), " a ");
    }
}
