//! Comments and extra networks: what is taken out of a prompt before its grammar is read.
//!
//! Follows A1111's `modules/processing_scripts/comments.py` and `extra_networks.parse_prompt`.

/// One `<kind:argument:name=argument>` tag.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct ExtraNetwork {
    /// The word before the first colon: `lora`, `lyco`, `hypernet`.
    pub kind: String,
    /// Arguments without `=`, in order.
    pub positional: Vec<String>,
    /// Arguments `name=value`, in order; of equal names the last counts.
    pub named: Vec<(String, String)>,
}

impl ExtraNetwork {
    fn parse(kind: &str, arguments: &str) -> Self {
        let mut network = Self {
            kind: kind.to_string(),
            ..Self::default()
        };
        for argument in arguments.split(':') {
            match argument.split_once('=') {
                // Two `=` make neither a name nor a value.
                Some((name, value)) if !value.contains('=') => {
                    network.named.push((name.into(), value.into()));
                }
                _ => network.positional.push(argument.into()),
            }
        }
        network
    }

    /// The value of argument `name`.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<&str> {
        self.named
            .iter()
            .rev()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// Takes the extra-network tags out of a positive prompt; the text around them is left as it is, spaces included.
///
/// ```
/// let (text, networks) = sdgen::prompt::extract_extra_networks("a cat <lora:ink:0.8>");
/// assert_eq!((text.as_str(), networks[0].positional[0].as_str()), ("a cat ", "ink"));
/// ```
#[must_use]
pub fn extract_extra_networks(prompt: &str) -> (String, Vec<ExtraNetwork>) {
    let mut text = String::with_capacity(prompt.len());
    let mut networks = Vec::new();
    // Behind the last `>` no tag can end, so no `<` there is looked at.
    let (mut rest, tail) = prompt.split_at(prompt.rfind('>').map_or(0, |at| at + 1));
    while let Some(at) = rest.find('<') {
        text.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some((network, after)) = tag(rest) {
            networks.push(network);
            rest = after;
        } else {
            text.push('<');
            rest = &rest[1..];
        }
    }
    text.push_str(rest);
    text.push_str(tail);
    (text, networks)
}

/// The tag at the start of `text`, which begins with `<`, and what follows it.
fn tag(text: &str) -> Option<(ExtraNetwork, &str)> {
    let body = &text[1..];
    let kind_end = body
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|&end| end > 0)?;
    let (arguments, after) = body[kind_end..].strip_prefix(':')?.split_once('>')?;
    (!arguments.is_empty()).then(|| (ExtraNetwork::parse(&body[..kind_end], arguments), after))
}

/// Removes comments: `#` and what follows it on its line. The line end is kept.
///
/// A line that is nothing but a comment goes together with the line end before it.
#[must_use]
pub fn strip_comments(text: &str) -> String {
    let without_lines = strip_comment_lines(text);
    let mut out = String::with_capacity(without_lines.len());
    let mut rest = without_lines.as_str();
    while let Some(at) = rest.find('#') {
        out.push_str(&rest[..at]);
        out.push('\n');
        rest = after_line(&rest[at..]);
    }
    out.push_str(rest);
    out
}

/// Replaces each line that begins with `#`, with the line ends on both its sides, by one line end.
fn strip_comment_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    if rest.starts_with('#') {
        out.push('\n');
        rest = after_line(rest);
    }
    while let Some(at) = rest.find("\n#") {
        out.push_str(&rest[..at]);
        out.push('\n');
        rest = after_line(&rest[at + 1..]);
    }
    out.push_str(rest);
    out
}

fn after_line(text: &str) -> &str {
    text.find('\n').map_or("", |at| &text[at + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_end_at_the_line() {
        // Python: re.sub('#[^\n]*(\n|$)', '\n', re.sub('(^|\n)#[^\n]*(\n|$)', '\n', text))
        for (text, stripped) in [
            ("a\n#b\nc", "a\nc"),
            ("#a", "\n"),
            ("#a\n#b\nc", "\n\nc"),
            ("a #b\nc", "a \nc"),
            ("a #b", "a \n"),
            ("a\n#b\n#c\nd", "a\n\nd"),
            ("no", "no"),
        ] {
            assert_eq!(strip_comments(text), stripped, "{text:?}");
        }
    }

    #[test]
    fn tags_have_positional_and_named_arguments() {
        let (text, networks) =
            extract_extra_networks("a <lora:x:1:te=0.5:a=b=c>, b<1 <b> <:x> <lora:> <lyco:y\nz>");
        assert_eq!(text, "a , b<1 <b> <:x> <lora:> ");
        assert_eq!(networks.len(), 2);
        assert_eq!(networks[0].positional, ["x", "1", "a=b=c"]);
        assert_eq!(networks[0].named("te"), Some("0.5"));
        assert_eq!(
            networks[1],
            ExtraNetwork {
                kind: "lyco".into(),
                positional: vec!["y\nz".into()],
                named: vec![]
            }
        );
    }
}
